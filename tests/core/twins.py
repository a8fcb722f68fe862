"""A stock model and its optimized copy, side by side, and how far apart their outputs are."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import dsi
from dsi.containers import Container, FusedLinear
from tests.support import tiny

FP32 = 1e-5
"""What is promised in fp32: the largest difference, as a share of the largest value."""

# one or two layers of this size are held in oneDNN's blocked form, see dsi.containers.linear.PACK_FROM
LARGE: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 768, "intermediate_size": 1024, "num_attention_heads": 12, "num_hidden_layers": 1},
    "gpt2": {"n_embd": 768, "n_inner": 1024, "n_head": 12, "n_layer": 1},
    "opt": {
        "hidden_size": 768,
        "word_embed_proj_dim": 768,
        "ffn_dim": 1024,
        "num_attention_heads": 12,
        "num_hidden_layers": 1,
    },
    "llama": {
        "hidden_size": 768,
        "intermediate_size": 1024,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_hidden_layers": 1,
    },
}


@attrs.frozen(eq=False)
class Twins:
    """Two models of the same weights.

    Args:
        stock: never met dsi.
        model: optimized.
        engine: the handle on `model`.
    """

    stock: PreTrainedModel
    model: PreTrainedModel
    engine: dsi.InferenceEngine

    @property
    def containers(self) -> list[Container]:
        return containers(self.model)

    @property
    def fused_calls(self) -> int:
        return sum(container.fused_calls for container in self.containers)

    @property
    def stock_calls(self) -> int:
        return sum(container.stock_calls for container in self.containers)


def twins(family: str, head: str | None = None, *, config: dict[str, Any] | None = None, **overrides: Any) -> Twins:
    """Fresh twins.

    Args:
        family, head, **overrides: see `tests.support.tiny`.
        config: of dsi.
    """
    return twins_of(tiny(family, head, **overrides), config)


def twins_of(stock: PreTrainedModel, config: dict[str, Any] | None = None) -> Twins:
    """Fresh twins of a model at hand, which becomes the stock one."""
    model = copy.deepcopy(stock)
    return Twins(stock, model, dsi.init_inference(model, config))


def one_layer(family: str) -> dict[str, int]:
    """Overrides for a model of a single layer."""
    return {{"gpt2": "n_layer", "distilbert": "n_layers"}.get(family, "num_hidden_layers"): 1}


def containers(model: nn.Module) -> list[Container]:
    """The containers in a model, in order."""
    return [module for module in model.modules() if isinstance(module, Container)]


def linears(model: nn.Module) -> list[FusedLinear]:
    """The fused linear layers in a model, in order."""
    return [module for module in model.modules() if isinstance(module, FusedLinear)]


def tensors(output: Any) -> Iterator[Tensor]:
    """Every floating tensor of an output, nested ones and the contents of caches included."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif hasattr(output, "layers"):
        for layer in output.layers:
            yield from (layer.keys, layer.values)
    elif hasattr(output, "to_tuple"):
        yield from tensors(output.to_tuple())
    elif isinstance(output, tuple | list):
        for item in output:
            yield from tensors(item)


def distance(found: Any, wanted: Any) -> float:
    """The largest difference of two outputs as a share of the largest value, the worst of all their tensors."""
    worst = 0.0
    for one, other in zip(tensors(found), tensors(wanted), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert torch.isfinite(one).all()
        one, other = one.detach(), other.detach()
        if one.numel():
            worst = max(worst, float((one - other).abs().max() / other.abs().max().clamp(min=1e-30)))
    return worst


def assert_twins(pair: Twins, *, fused: bool = True, tolerance: float = FP32, **inputs: Any) -> Any:
    """Both give the same for the same call, and every layer took the path it should. Returns what stock gave."""
    before = pair.fused_calls, pair.stock_calls
    with torch.no_grad():
        wanted = pair.stock(**copy.deepcopy(inputs))
        found = pair.model(**inputs)
    assert type(found) is type(wanted)
    assert distance(found, wanted) <= tolerance
    calls = pair.fused_calls - before[0], pair.stock_calls - before[1]
    layers = len(pair.containers)
    assert calls == ((layers, 0) if fused else (0, layers))
    return wanted


def assert_same_bits(one: Any, other: Any) -> None:
    """Two outputs are equal bit for bit."""
    for found, wanted in zip(tensors(one), tensors(other), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def bytes_of(tensor: Tensor) -> int:
    """Of its values; a packed weight's padding counts."""
    return int(torch.ops.mkldnn._nbytes(tensor.detach())) if tensor.is_mkldnn else tensor.nbytes


def held(*, collect: bool = True) -> int:
    """Bytes of every tensor that Python can reach, each memory once; of garbage too unless it is collected first."""
    if collect:
        gc.collect()
    memories: dict[int, int] = {}
    for thing in gc.get_objects():
        # by its exact type: isinstance wakes lazy modules, and the compiler's fake tensors have no memory
        if type(thing) not in (Tensor, nn.Parameter) or thing.is_meta:
            continue
        if thing.is_mkldnn:
            # a strided view of packed bytes is the same memory
            memories[torch.ops.mkldnn.data_ptr(thing.detach())] = bytes_of(thing)
        else:
            storage = thing.untyped_storage()
            memories[storage.data_ptr()] = storage.nbytes()
    return sum(memories.values())
