"""A whole prompt without the model's own forward: embedding, layers, norm and head of the last position.

    h = embed(ids) [-> project_in] [-> embed_norm] [+ positions]
    h = layer.run(h) for each layer, keys and values written to the cache
    logits = head([project_out] [norm] h[last]) [, capped]

The parts are those of a decode step (`dsi.runtime.decode`). A model's own forward makes a mask, looks for its inputs
and goes through four calls a layer: of a prompt of 128 tokens through 7B's layers the device worked 5 ms of 17.6 (H200
machine). It runs wherever something is asked for that a step does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from torch import Tensor

from dsi.containers.base import Container, LayerCall
from dsi.containers.ops import with_bias
from dsi.containers.packing import AROUND
from dsi.parallel import ShardedContainer
from dsi.runtime.decode import DecodeRunner, Step
from dsi.runtime.kv_cache import PreallocatedLayer, WindowedLayer
from dsi.runtime.ragged import Ragged

# arguments of the model that a pass reads, or that change nothing of the last position's logits
_READ = frozenset({"past_key_values", "attention_mask", "position_ids", "use_cache", "logits_to_keep", "return_dict"})


@attrs.frozen
class PromptRoute:
    """How the latest prompt ran.

    Args:
        own: past the model's own forward.
        graph: as a CUDA graph.
        reason: why not past it, or why not as a graph.
    """

    own: bool = False
    graph: bool = False
    reason: str = ""


class PromptPass:
    """The parts of a model, looked up: calling it takes a prompt. Good for one `generate` call, not longer.

    Args:
        step: the model's parts, bound for the prompt's positions.
        layers: the containers, in order.
    """

    def __init__(self, step: Step, layers: list[Container]) -> None:
        self.step, self.layers = step, layers

    def logits(
        self,
        ids: Tensor,
        positions: Tensor | None,
        cache: Any,
        last: Tensor | None = None,
        ragged: Ragged | None = None,
    ) -> Tensor:
        """Logits after the last position, [B, vocab].

        Args:
            ids: int64 [B, S], no padding among them where it is not told.
            positions: int64 [1 or B, S], where they stand; None where the model does not ask.
            cache: has `layers`, in order, each empty; each holds S positions afterwards.
            last: int64 [1], the last position where others follow it that nobody will see; None for S - 1.
            ragged: where the tokens are.
        """
        if ragged is not None:
            ids, positions = ragged.pack(ids), None if positions is None else ragged.pack(positions.expand_as(ids))
        step, hidden = self.step, ids
        for op in step.embed:
            hidden = op(hidden)
        if step.positions is not None:
            hidden = hidden + step.positions[positions]
        # a kernel of a whole prompt wants the rows themselves
        rope = None if step.rope is None or positions is None else step.rope(hidden, positions).taken()
        mask = None
        if step.biases is not None:
            # the same in all layers and rows
            length = hidden.shape[1]
            mask = with_bias(None, step.biases.additive(hidden.dtype, length), length, causal=True)
        for layer in self.layers:
            layer.__dict__["fused_calls"] += 1
            hidden = layer.run(LayerCall(hidden, mask, cache, rope, True, packed=ragged))
        # one row a text from here on
        if ragged is not None:
            hidden = ragged.last(hidden)
        else:
            hidden = hidden[:, -1] if last is None else hidden.index_select(1, last)[:, 0]
        hidden = hidden.contiguous()
        for op in step.tail:
            hidden = op(hidden)
        return hidden


def prompt_obstacle(runner: DecodeRunner, inputs: Mapping[str, Any], ids: Tensor) -> str:
    """Why a prompt takes the model's own forward, or "".

    Args:
        runner: of the model; its `obstacle` is none.
        inputs: what generation gives the model beside the ids.
        ids: int64 [B, S].
    """
    for name, value in inputs.items():
        if name not in _READ and value is not None and value is not False:
            return f"argument {name}"
    return _cache_obstacle(inputs["past_key_values"], ids) or _layers_obstacle(runner, ids.shape[1])


def _cache_obstacle(cache: Any, ids: Tensor) -> str:
    if cache.get_seq_length():
        return "there are positions in the cache"
    if not all(type(layer) in (PreallocatedLayer, WindowedLayer) for layer in cache.layers):
        return "a layer keeps another kind of cache"
    return "no tokens" if not ids.numel() else ""


def _layers_obstacle(runner: DecodeRunner, length: int) -> str:
    if any(window is not None and window < length for window in runner.windows):
        return "the prompt is longer than a layer's window"
    if AROUND.get() is not None:
        return "somebody looks at the layers"
    layers = runner.containers()
    if getattr(runner.model.config, "num_hidden_layers", len(layers)) != len(layers):
        return "not all layers are asked for"
    if any(isinstance(layer, ShardedContainer) for layer in layers):
        return "the layers are split over ranks"
    # biases come in a mask that says it
    causal = runner.parts.alibi is not None or all(layer.facts["causal"] for layer in layers)
    return "" if causal else "a layer looks ahead"


def ragged_obstacle(runner: DecodeRunner, inputs: Mapping[str, Any], ragged: Ragged) -> str:
    """Why a prompt with padding takes the model's own forward, or "".

    Args:
        runner, inputs: of `prompt_obstacle`.
        ragged: where the prompt's tokens are.
    """
    if runner.parts.alibi is not None:
        return "the scores have position biases, and some of the prompt is padding"
    if any(layer.softcap is not None for layer in runner.containers()):
        return "the scores are capped, and some of the prompt is padding"
    if inputs.get("position_ids") is None and runner.placed:
        return "some of the prompt is padding, and nobody says where the tokens stand"
    return ragged.obstacle
