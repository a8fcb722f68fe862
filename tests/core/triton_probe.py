"""Containers with the Triton table of operations, on a CPU: `TRITON_INTERPRET=1 python -m tests.core.triton_probe`.

The variable is read when triton is first imported, hence the process of its own. Everything else is as on a GPU: the
same containers, the same decode loop, the same kernels; only who executes them is not.
"""

from __future__ import annotations

import json
import sys
from collections import Counter

import torch
from torch import Tensor

import dsi.containers.linear
import dsi.containers.stand_in
import dsi.containers.transformer
import dsi.planner
import dsi_kernels
from tests.core import positions
from tests.core.twins import Twins, distance, one_layer, twins, twins_of
from tests.support import FAMILIES, inputs_for

OPS = (
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "bias_activation",
    "decode_attention",
    "gated_activation",
    "layer_norm",
    "linear_fused",
    "linear_norm",
    "prompt_linear",
    "rms_norm",
    "rope_kv_write",
)
# name -> family, overrides
CASES = {
    "bert": ("bert", {}),
    "clip_text": ("clip_text", {}),
    "gpt2": ("gpt2", {}),
    "opt without biases": ("opt", {"enable_bias": False}),
    "opt_post_norm": ("opt_post_norm", {}),
    "llama with biases": ("llama_mha", {}),
    "llama of odd sizes": ("llama", {"hidden_size": 30, "num_attention_heads": 6, "head_dim": 14}),
}
# the same, on a device of which the tables say that our products and attention are the fastest
TUNED = {
    "bert, tuned": ("bert", {}),
    "opt_post_norm, tuned": ("opt_post_norm", {}),
    "llama, tuned": ("llama", {"hidden_size": 30, "num_attention_heads": 6, "head_dim": 14}),
}
# the same, on one of which they say so of the products that its memory accelerator feeds
HALVES = {
    "llama, accelerated": ("llama", {"head_dim": 16, "dtype": torch.float16}),
    "opt, accelerated": ("opt", {"dtype": torch.float16}),
}
# tokens that the MLP takes at once in those
FEW = 3
# kinds of which the kernels do not know the attention
MIXED = tuple(kind for kind in positions.KINDS if kind != "normed sum")


def count_launches(launches: Counter[str]) -> None:
    """Have every kernel count its calls."""
    for name in OPS:

        def counted(
            *args: object, _op: object = getattr(dsi_kernels, name), _name: str = name, **kwargs: object
        ) -> object:
            launches[_name] += 1
            return _op(*args, **kwargs)  # type: ignore[operator]

        setattr(dsi_kernels, name, counted)


def choose_ours() -> None:
    """Every table's answer from here on: our kernels."""
    linear = {"block_m": 16, "block_n": 32, "block_k": 32, "group_m": 2, "num_warps": 4, "stages": 2, "splits": 2}
    whole = {"block_s": 16, "block_t": 16, "num_warps": 4, "stages": 2}
    # the package has the ops under their modules' names
    sys.modules["dsi_kernels.linear_fused"].linear_config = lambda *_: linear | {"choice": 2}  # type: ignore[attr-defined]
    sys.modules["dsi_kernels.attention"].attention_config = lambda *_, **__: whole | {"choice": 2}  # type: ignore[attr-defined]
    # as weights are held on a GPU
    dsi.containers.linear.choose_form = lambda *_, **__: "aten"
    dsi.containers.transformer.CHUNK = FEW


def accelerate() -> None:
    """Every table's answer from here on: the accelerator's products."""
    blocks = {"block_m": 16, "block_n": 16, "block_k": 16, "group_m": 2, "num_warps": 4, "stages": 2, "choice": 2}
    module = sys.modules["dsi_kernels.prompt_linear"]
    module.takes = lambda x, _: x.dtype is torch.float16  # type: ignore[attr-defined]
    module.prompt_config = lambda *_: blocks  # type: ignore[attr-defined]
    sys.modules["dsi_kernels.linear_fused"].linear_config = lambda *_: {"choice": 1}  # type: ignore[attr-defined]


def tokens(model: object, inputs: dict[str, Tensor]) -> Tensor:
    return model.generate(**inputs, max_new_tokens=3, do_sample=False)  # type: ignore[attr-defined, no-any-return]


def probe(pair: Twins, family: str, launches: Counter[str], *, causal: bool) -> dict[str, object]:
    launches.clear()
    result: dict[str, object] = {"ops": sorted({layer.ops_name for layer in pair.containers})}
    inputs = inputs_for(family, 2, 4, "ragged")
    with torch.no_grad():
        result["distance"] = distance(pair.model(**inputs), pair.stock(**inputs))
    if causal:
        result["tokens"] = torch.equal(tokens(pair.model, inputs), tokens(pair.stock, inputs))
        result["fast"] = pair.model._dsi.last_route.fast
    result["stock_calls"] = pair.stock_calls
    result["launches"] = dict(launches)
    return result


if __name__ == "__main__":
    assert dsi_kernels.INTERPRETED
    torch.set_num_threads(1)
    for module in (dsi.containers.stand_in, dsi.planner):
        module.choose_ops = lambda _device, _use_triton: "triton"  # type: ignore[attr-defined]
    counter: Counter[str] = Counter()
    count_launches(counter)
    # one layer: a program of the interpreter takes milliseconds
    results = {
        name: probe(twins(family, **overrides, **one_layer(family)), family, counter, causal=FAMILIES[family].causal)
        for name, (family, overrides) in CASES.items()
    }
    for kind in MIXED:
        model = positions.positioned(kind, **positions.one_layer(kind))
        results[kind] = probe(twins_of(model), "gpt2", counter, causal=True)
    choose_ours()
    for name, (family, overrides) in TUNED.items():
        pair = twins(family, **overrides, **one_layer(family))
        results[name] = probe(pair, family, counter, causal=FAMILIES[family].causal)
    accelerate()
    for name, (family, overrides) in HALVES.items():
        pair = twins(family, **overrides, **one_layer(family))
        results[name] = probe(pair, family, counter, causal=True)
    sys.stdout.write(json.dumps(results))
