"""How a text begins in dsi's loop: its prompt as a graph, past the model's own forward, or neither."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsi.containers.ops import Heads
from dsi.runtime.decode import Step
from dsi.runtime.prompt_graph import bucket, too_large
from dsi.runtime.prompt_pass import PromptPass, PromptRoute, prompt_obstacle, ragged_obstacle
from dsi.runtime.ragged import Ragged
from dsi.runtime.session import Session

# positions of a prompt whose biases, of every head and pair of positions, a graph holds: 16 MiB at 32 heads
MOST_BIASED = 512


class PromptStart:
    """The prompt of one `generate` call.

    Args:
        session: of the model; `last_prompt` tells afterwards how the prompt ran.
        step: the model's parts, bound for the text.
        inputs: what generation gives the model beside the ids, the cache among them.
        kept: nobody else has the cache; whoever gets it in the end gets a copy, or the graphs go.
        ones: the mask is of nothing else; the numbers of any other are counted as positions, a 2 as two.
    """

    def __init__(self, session: Session, step: Step, inputs: Mapping[str, Any], *, kept: bool, ones: bool) -> None:
        assert session.runner is not None
        self.session, self.step, self.inputs, self.kept = session, step, inputs, kept
        self.ones = ones
        self.runner = session.runner
        self.cache = inputs["past_key_values"]

    def logits(self, ids: Tensor, *, padded: bool) -> Tensor | None:
        """float32 logits [B, vocab] after the prompt, which fills the cache; None where the model's own forward must.

        Args:
            ids: int64 [B, S].
            padded: some of them are padding.
        """
        session, on_gpu = self.session, self.session.on_cuda or self.session.graphs is not None
        reason = prompt_obstacle(self.runner, self.inputs, ids) if on_gpu else "the model is on no GPU"
        if reason:
            session.last_prompt = PromptRoute(reason=reason)
            return None
        if padded:
            return self._ragged(ids)
        reason = self._bucket_obstacle(ids)
        if not reason and (logits := self._bucketed(ids)) is not None:
            return logits
        session.last_prompt = PromptRoute(own=True, reason=reason or "the cache has no room for a graph's length")
        return PromptPass(self.step, self.runner.containers()).logits(ids, self._positions(), self.cache).float()

    def _ragged(self, ids: Tensor) -> Tensor | None:
        """The logits of a prompt with padding, without it; None where the model's own forward must."""
        mask: Tensor = self.inputs["attention_mask"]
        if mask.shape != ids.shape:
            self.session.last_prompt = PromptRoute(reason="the mask is not one of tokens")
            return None
        ragged = Ragged(mask)
        reason = ragged_obstacle(self.runner, self.inputs, ragged)
        self.session.last_prompt = PromptRoute(own=not reason, reason=reason or "some of the prompt is padding")
        if reason:
            return None
        parts, positions = PromptPass(self.step, self.runner.containers()), self.inputs.get("position_ids")
        return parts.logits(ids, positions, self.cache, ragged=ragged).float()

    def _positions(self) -> Tensor | None:
        """int64 [1 or B, S]."""
        given: Tensor | None = self.inputs.get("position_ids")
        # without padding, generation's own are those of any row
        return given if given is None or self._placed else given[:1]

    @property
    def _placed(self) -> bool:
        """The caller says where the tokens stand."""
        return self.session.prompt is None or self.session.prompt.placed or not self.ones

    def _bucket_obstacle(self, ids: Tensor) -> str:
        """Why the prompt is never a graph, or ""."""
        if self.session.graphs is None:
            return "no graphs are wanted"
        if not self.kept:
            return "the cache is the caller's"
        if self._placed:
            return "positions are given"
        if not self.runner.static_rope:
            return "the rotary terms depend on the text's length"
        if self.runner.parts.alibi is not None and bucket(ids.shape[1]) > MOST_BIASED:
            return f"biases of more than {MOST_BIASED} positions are not held for a graph"
        known = self.runner.learned_positions
        if known is not None and bucket(ids.shape[1]) > known:
            return "the graph would be longer than the positions that the model knows"
        return too_large(*ids.shape) or self.runner.graph_obstacle()

    def _bucketed(self, ids: Tensor) -> Tensor | None:
        """The logits, from a graph or from what it would launch; None, and nothing told, in too small a cache."""
        session, (rows, length), layers = self.session, ids.shape, self.runner.containers()
        assert session.graphs is not None
        like = torch.empty((), dtype=layers[0].dtype, device=ids.device)
        for container, layer in zip(layers, self.cache.layers, strict=True):
            heads, kv_heads, width = container.shape
            layer.reserve(rows, Heads(heads, kv_heads * container.repeat, width), length, like)
        if min(layer.capacity for layer in self.cache.layers) < bucket(length):
            for layer in self.cache.layers:
                layer.crop(-length)
            return None
        pool, where = session.graphs, (self.runner.model, self.runner, self.cache, rows, length)
        reason = pool.prompts.obstacle(rows, length)
        graph = None if reason else pool.prompt(*where)
        session.last_prompt = PromptRoute(own=True, graph=graph is not None, reason=reason or pool.prompts.failure)
        if graph is not None:
            return graph.replay(ids)
        plain = pool.plain_prompt(*where)
        with pool.prompts.watch(rows, length):
            return plain.run(ids)
