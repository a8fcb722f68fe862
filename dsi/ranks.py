"""One model on several ranks: each optimizes its own copy and keeps its part of every layer.

    answers = lockstep(model, Ask(inputs), 2)      threads of this process, meeting at every sum
    answers = gloo(model, Ask(inputs), 2)          real processes of this machine

What is around the layers, embeddings and heads, is whole on every rank, so every rank has the whole output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor, nn

from dsi import parallel
from dsi.config import load_config
from dsi.engine import InferenceEngine, optimize
from dsi.fit import submodule
from dsi.parallel import Group, LayerShard, ProcessGroup, shard_layer, thread_groups
from dsi.plans import Plan

T = TypeVar("T")

Model = nn.Module | Callable[[], nn.Module]
"""A stock model, of which every rank takes a copy; or what makes one, the same at every call."""


def _read_only(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(dict(mapping))


@attrs.frozen(eq=False)
class Answer:
    """What one rank's model said.

    Args:
        outputs: every floating tensor of the forward's output, in order.
        tokens: what `generate` returned, or None where it was not asked.
    """

    outputs: tuple[Tensor, ...]
    tokens: Tensor | None = None


@attrs.define(eq=False)
class Ask:
    """Work for a rank: one forward, and greedy search where tokens are wanted.

    Args:
        inputs: keyword arguments of both.
        new_tokens: how many to generate; 0 for none.
    """

    inputs: dict[str, Any]
    new_tokens: int = 0

    def __call__(self, engine: InferenceEngine) -> Answer:
        with torch.no_grad():
            outputs = tuple(_tensors(engine(**self.inputs)))
            if not self.new_tokens:
                return Answer(outputs)
            tokens = engine.generate(**self.inputs, max_new_tokens=self.new_tokens, do_sample=False)
        return Answer(outputs, tokens)


def _tensors(output: Any) -> list[Tensor]:
    """Floating tensors of an output, nested ones included; caches are not outputs."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    if isinstance(output, tuple | list):
        return [tensor for item in output for tensor in _tensors(item)]
    return []


def init_rank(model: nn.Module, group: Group, **options: Any) -> InferenceEngine:
    """Optimize a model as one rank of a group: its layers keep this rank's part, for good.

    Args:
        model: the whole stock model, the same on every rank; changed in place.
        group: of the ranks, e.g. `dsi.parallel.ProcessGroup()` under torchrun.
        **options: of `dsi.InferenceConfig`, except `tensor_parallel`.

    Raises:
        SplitError: a layer does not split over that many ranks; the model is what it was.
        DsiError: see `dsi.init_inference`.
    """
    return optimize(model, load_config(None, options), group)


def layer_shards(model: nn.Module, plan: Plan, size: int) -> dict[str, tuple[LayerShard, ...]]:
    """By layer path and rank, what each of `size` ranks would hold.

    Args:
        model: the stock model of the plan.
        plan: from `dsi.plan`.
        size: how many ranks.

    Raises:
        SplitError: a layer does not split over that many ranks.
    """
    result = {}
    for planned in plan.blocks:
        layer, fit = submodule(model, planned.path, planned.path), planned.fit
        shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
        result[planned.path] = shard_layer(planned.block, fit.container, fit.facts, shapes, size, planned.path)
    return result


# --- ranks in threads -------------------------------------------------------------------------------------------------


def lockstep(
    model: Model, work: Callable[[InferenceEngine], T], size: int, *, timeout: float = 60.0, **options: Any
) -> list[T]:
    """What `work` returns on each of `size` ranks, by rank; the ranks are threads.

    Args:
        model: a stock model; it is left alone.
        work: called on every rank with its engine, e.g. an `Ask`.
        size: how many ranks.
        timeout: seconds that a rank waits for the others.
        **options: of `dsi.InferenceConfig`; `injection_policy` names the policy. `strict` unless said otherwise.

    Raises:
        RankError: a rank raised; the error is its cause.
        SplitError: a layer does not split over that many ranks.
    """
    options = {"strict": True, **options}
    groups = thread_groups(size, timeout=timeout)
    engines = [init_rank(_copy(model), group, **options) for group in groups]
    return parallel.lockstep(lambda group: work(engines[group.rank]), groups)


def _copy(model: Model) -> nn.Module:
    return copy.deepcopy(model) if isinstance(model, nn.Module) else model()


# --- ranks in processes -----------------------------------------------------------------------------------------------


def gloo(
    model: Model, work: Callable[[InferenceEngine], T], size: int, *, timeout: float = 120.0, **options: Any
) -> list[T]:
    """What `work` returns on each of `size` ranks, by rank; the ranks are processes that talk through gloo.

    Args:
        model, work, **options: as of `lockstep`; they and the results must survive pickling.
        size: how many ranks.
        timeout: seconds for everything, start-up included.

    Raises:
        RankError: a rank raised, died or is stuck; or the model or the work cannot be pickled.
    """
    return parallel.run_gloo(_on_rank, size, model, work, {"strict": True, **options}, timeout=timeout)


def _on_rank(group: ProcessGroup, model: Model, work: Callable[[InferenceEngine], T], options: dict[str, Any]) -> T:
    return work(init_rank(model if isinstance(model, nn.Module) else model(), group, **options))
