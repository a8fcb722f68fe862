"""The steps of transformers' own loops, beams and the rest, through captured graphs.

Such a loop calls the model with one new token a row and a cache. For the length of a `generate` call a `StepForward`
stands in the place of the model's forward: it knows such a call, replays the graph of a step, and gives copies of the
logits. Every other call is the model's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers.utils import ModelOutput

from dsi.runtime.decode import DecodeRunner
from dsi.runtime.graph_pool import GraphPool
from dsi.runtime.graph_run import WORTH_IT, GraphRun, Text, graph_obstacle
from dsi.runtime.kv_cache import PreallocatedCache
from dsi.runtime.route import window_reason
from dsi.runtime.session import Session
from dsi.runtime.sliding_window import windows

# arguments of a call that a step stands for
_READ = ("input_ids", "past_key_values", "attention_mask", "position_ids")
# arguments that change nothing at these values
_NEUTRAL = {"use_cache": (True,), "return_dict": (True,), "logits_to_keep": (0, 1)}


@attrs.frozen
class _Call:
    ids: Tensor
    cache: PreallocatedCache
    mask: Tensor | None
    positions: Tensor | None


# transformers' base class asks for one
@dataclass
class StepOutput(ModelOutput):
    """What a loop reads of a forward: logits [B, 1, vocab], and the cache."""

    logits: Tensor | None = None
    past_key_values: Any = None


class StepForward:
    """Stands for a model's forward while transformers' loop runs.

    Args:
        model: an injected model on CUDA.
        session: its session, with a runner and a pool of graphs.
        forward: the model's own.
    """

    def __init__(self, model: Any, session: Session, forward: Any) -> None:
        assert session.runner is not None
        assert session.graphs is not None
        self.model, self.session, self.forward = model, session, forward
        self.runner: DecodeRunner = session.runner
        self.pool: GraphPool = session.graphs
        self.run: GraphRun | None = None
        # why there are no graphs any more
        self.reason = ""
        self.taken = 0
        # that the text's cache is filled up to in the end, once somebody knows
        self.slots = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = None if args or self.reason else self._step(kwargs)
        logits = None if call is None else self._logits(call)
        if logits is None or call is None:
            return self.forward(*args, **kwargs)
        self.taken += 1
        return StepOutput(logits=logits.unsqueeze(1), past_key_values=call.cache)

    def _step(self, given: dict[str, Any]) -> _Call | None:
        """The call, where it is one new token a row and nothing else is asked for."""
        for name, value in given.items():
            if name in _READ or value is None or value is False:
                continue
            if value not in _NEUTRAL.get(name, ()):
                return None
        ids, cache, mask, positions = (given.get(name) for name in _READ)
        if type(cache) is not PreallocatedCache or len(cache.layers) != self.runner.layers:
            return None
        length = cache.get_seq_length()
        if not isinstance(ids, Tensor) or ids.shape[1:] != (1,) or not length or torch.is_grad_enabled():
            return None
        if mask is not None and (mask.dim() != 2 or mask.shape[1] != length + 1):
            return None
        if positions is not None and positions.shape[-1] != 1:
            return None
        return _Call(ids, cache, mask, positions)

    def _logits(self, call: _Call) -> Tensor | None:
        """[B, vocab], or None where there is no graph."""
        if not self._goes_on(call) and not self._begins(call):
            return None
        assert self.run is not None
        logits = self.run.logits(call.ids[:, 0], call.positions)
        self.run.settle()
        return logits

    def _goes_on(self, call: _Call) -> bool:
        """Whether the graph stands where this call's text does."""
        run = self.run
        if run is None or run.graph is None or run.cache is not call.cache or run.key.batch != call.ids.shape[0]:
            return False
        return run.graph.writes_to(run.layers) and run.length == call.cache.get_seq_length()

    def _begins(self, call: _Call) -> bool:
        if self.run is not None and self.run.cache is not call.cache:
            # each cache would ask for a graph of its own
            self.reason = "the loop keeps several caches"
            return False
        kept = window_reason(self.runner.windows, windows(call.cache))
        self.reason = graph_obstacle(self.runner, call.cache, WORTH_IT) or kept
        if self.reason:
            return False
        length = call.cache.get_seq_length()
        mask = None if call.mask is None or bool(call.mask.all()) else call.mask[:, None, None].bool()
        # the positions of a step that goes by its mask are those of the cache, or before
        text = Text(positions=length, reach=length + 1, mask=mask, slots=self.slots)
        self.run = GraphRun(self.pool, self.model, self.runner, call.cache, text)
        if not self.run.ready(call.ids[:, 0]):
            self.run, self.reason = None, self.pool.reason
            return False
        return True


def step_forward(model: Any, session: Session, given: dict[str, Any]) -> StepForward | None:
    """What stands for the model's forward in transformers' loop; None where the model has no graphs at all."""
    if session.graphs is None or session.runner is None or model.config.is_encoder_decoder:
        return None
    steps = StepForward(model, session, model.forward)
    steps.reason = _obstacle(model.config, session.runner, given)
    return steps


def _obstacle(config: Any, runner: DecodeRunner, given: dict[str, Any]) -> str:
    """Why no step of transformers' loop can be a graph, or ""."""
    if given.get("position_ids") is not None:
        return "position_ids are given"
    # an early exit from the layers
    if getattr(config, "num_hidden_layers", runner.layers) != runner.layers:
        return f"{config.num_hidden_layers} of {runner.layers} layers are asked for"
    if getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False):
        return "the config asks for hidden states or attentions"
    return runner.obstacle() or runner.graph_obstacle()
