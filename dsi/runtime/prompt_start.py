"""How a text begins in dsi's loop: its prompt as a graph, past the model's own forward, or neither."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dsi.containers.ops import Heads
from dsi.runtime.decode import Step
from dsi.runtime.prompt_graph import PromptGraph, bucket
from dsi.runtime.prompt_pass import PromptPass, PromptRoute, prompt_obstacle
from dsi.runtime.session import Session


class PromptStart:
    """The prompt of one `generate` call.

    Args:
        session: of the model; `last_prompt` tells afterwards how the prompt ran.
        step: the model's parts, bound for the text.
        inputs: what generation gives the model beside the ids, the cache among them.
        kept: nobody else has the cache or will see it.
    """

    def __init__(self, session: Session, step: Step, inputs: Mapping[str, Any], *, kept: bool) -> None:
        assert session.runner is not None
        self.session, self.step, self.inputs, self.kept = session, step, inputs, kept
        self.runner = session.runner
        self.cache = inputs["past_key_values"]

    def logits(self, ids: Tensor, *, padded: bool) -> Tensor | None:
        """float32 logits [B, vocab] after the prompt, which fills the cache; None where the model's own forward must.

        Args:
            ids: int64 [B, S].
            padded: some of them are padding.
        """
        session, on_gpu = self.session, self.session.on_cuda or self.session.graphs is not None
        reason = prompt_obstacle(self.runner, self.inputs, ids, padded=padded) if on_gpu else "the model is on no GPU"
        if reason:
            session.last_prompt = PromptRoute(reason=reason)
            return None
        reason = self._graph_obstacle(ids)
        graph = None if reason else self._graph(ids)
        if graph is not None:
            session.last_prompt = PromptRoute(own=True, graph=True)
            return graph.replay(ids)
        pool = session.graphs
        session.last_prompt = PromptRoute(own=True, reason=reason or "there is no graph for it")
        with nullcontext() if pool is None else pool.prompts.watch(*ids.shape):
            logits = PromptPass(self.step, self.runner.containers()).logits(ids, self._positions(), self.cache)
        return logits.float()

    def _positions(self) -> Tensor | None:
        """int64 [1 or B, S]."""
        given: Tensor | None = self.inputs.get("position_ids")
        # without padding, generation's own are those of any row
        return given if given is None or self._placed else given[:1]

    @property
    def _placed(self) -> bool:
        """The caller says where the tokens stand."""
        return self.session.prompt is None or self.session.prompt.placed

    def _graph_obstacle(self, ids: Tensor) -> str:
        if self.session.graphs is None:
            return "no graphs are wanted"
        if not self.kept:
            return "the cache is the caller's"
        if self._placed:
            return "positions are given"
        if not self.runner.static_rope:
            return "the rotary terms depend on the text's length"
        if not self.runner.static_rope:
            return "the rotary terms depend on the prompt's length, which the graph's is not"
        known = self.runner.learned_positions
        if known is not None and bucket(ids.shape[1]) > known:
            return "the graph would be longer than the positions that the model knows"
        return self.session.graphs.prompts.obstacle(*ids.shape) or self.runner.graph_obstacle()

    def _graph(self, ids: Tensor) -> PromptGraph | None:
        """The graph, the cache's layers told of the prompt; None, and nothing told, where there is none."""
        pool, (rows, length), layers = self.session.graphs, ids.shape, self.runner.containers()
        assert pool is not None
        like = torch.empty((), dtype=layers[0].dtype, device=ids.device)
        for container, layer in zip(layers, self.cache.layers, strict=True):
            heads, kv_heads, width = container.shape
            layer.reserve(rows, Heads(heads, kv_heads * container.repeat, width), length, like)
        graph = None
        if min(layer.capacity for layer in self.cache.layers) >= bucket(length):
            graph = pool.prompt(self.runner.model, self.runner, self.cache, rows, length)
        if graph is None:
            for layer in self.cache.layers:
                layer.crop(-length)
        return graph
