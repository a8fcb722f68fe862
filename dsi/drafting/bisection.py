"""`bisect`: the first layer, and the first place in it, where a policy's container and the stock layer part ways.

Each container is given what stock gave its layer, so that one layer's fault is not blamed on the next. Inside the
layer, what each place reads and writes is held against what the stock modules of its slot read and write. Where the
first difference lies between two places, other answers to what the policy says are tried, and the one that mends it is
named.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from dsi.api import init_inference
from dsi.containers.base import Container
from dsi.containers.layouts import row_permutation
from dsi.drafting.alternatives import Alternative, alternatives
from dsi.drafting.replay import LayerCalled, Replay, Run, record
from dsi.drafting.tape import ACTIVATION, Event, Tape
from dsi.engine import InferenceEngine
from dsi.errors import UnsupportedModelError
from dsi.plans import BlockPlan
from dsi.policy import Block, Norm, Packed, Policy
from dsi.testing.compare import distance, forward
from dsi.testing.inputs import Reads

ALLOWED: Mapping[torch.dtype, float] = {torch.float32: 1e-5, torch.float16: 4 * 2**-10, torch.bfloat16: 4 * 2**-7}
"""Largest difference as a share of the largest value: in 16 bits four units in the last place."""

_LENGTH = 9
_NEW = 6
# what lies between two places, by the place that reads it
_BETWEEN = {"out": "attention", "down": ACTIVATION}
# what is no place of a container, so that what mends it says more
_BETWEEN_PLACES = ("attention", ACTIVATION, "residual", "cache", "call", "after ")


@attrs.frozen(kw_only=True)
class Finding:
    """Where a model and stock part ways.

    Args:
        layer: path of the first layer that differs; "" where none does.
        place: of the container, or what lies between two: "attention", "activation", "residual", "cache".
        what: the difference, in words.
        call: what the model was given.
        measured, allowed: the difference, as a share of the largest value.
        mend: what makes it equal, where something was found that does.
    """

    layer: str
    place: str
    what: str
    call: str = ""
    measured: float = 0.0
    allowed: float = 0.0
    mend: str = ""

    @property
    def equal(self) -> bool:
        """Nothing differs."""
        return not self.layer and not self.place

    def __str__(self) -> str:
        if self.equal:
            return f"equal: {self.what} (measured {self.measured:.1e}, allowed {self.allowed:.1e})"
        head = f"{self.layer or 'the model'}: {self.place}: {self.what}"
        lines = [head, f"  measured {self.measured:.1e}, allowed {self.allowed:.1e}; {self.call}"]
        return "\n".join([*lines, *([f"  {self.mend}"] if self.mend else [])])


def bisect(
    model: Any,
    policy: Policy | str | None = None,
    inputs: Mapping[str, Any] | None = None,
    *,
    allowed: float | None = None,
) -> Finding:
    """The first place where `init_inference(model, injection_policy=policy)` differs from the model.

    Args:
        model: a loaded model in eval mode; it is optimized and restored.
        policy: as for `init_inference`.
        inputs: keyword arguments of a forward; where left out a plain text, a padded one and a decode step.
        allowed: see `ALLOWED`.

    Raises:
        DsiError: the policy cannot be applied at all.
    """
    return _Bisection(model, policy, inputs, allowed).find()


class _Bisection:
    def __init__(self, model: Any, policy: Any, inputs: Mapping[str, Any] | None, allowed: float | None) -> None:
        self.model, self.policy, self.own = model, policy, inputs is None
        dtype = next(model.parameters()).dtype
        self.allowed = ALLOWED.get(dtype, 1e-5) if allowed is None else allowed
        self.runs: dict[str, Callable[[], Any]] = dict(_own_runs(model) if inputs is None else [_given(model, inputs)])

    def find(self) -> Finding:
        """The finding; the model is what it was."""
        paths = self._planned()
        layers = [self.model.get_submodule(path) for path in paths]
        whole = {name: run() for name, run in self.runs.items()}
        searched = self._search()
        calls = {name: record(self.model, layers, run) for name, run in self.runs.items()}
        engine = self._inject()
        try:
            blocks = {block.path: block for block in engine.plan.blocks}
            worst = 0.0
            for index, path in enumerate(paths):
                for name, recorded in calls.items():
                    mine = [call for call in recorded if call.layer is layers[index]]
                    for call in mine:
                        found = _Layer(self, blocks[path], call, name).find()
                        if not found.equal:
                            return found
                        worst = max(worst, found.measured)
            return self._outside(whole, worst, len(paths)) or self._loop(searched, worst, len(paths))
        finally:
            engine.restore()

    def _planned(self) -> list[str]:
        engine = self._inject()
        try:
            left = [one for one in engine.plan.left if one.reason.code != "no_policy"]
            if left or not engine.plan.blocks:
                why = f"{left[0].path}: {left[0].reason.text}" if left else engine.plan.why_nothing
                raise UnsupportedModelError(f"there is nothing to compare: {why}")
            return [block.path for block in engine.plan.blocks]
        finally:
            engine.restore()

    def _inject(self) -> InferenceEngine:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return init_inference(self.model, injection_policy=self.policy)

    def _outside(self, whole: dict[str, Any], worst: float, count: int) -> Finding | None:
        """All layers are equal by themselves: what of the model?"""
        for name, theirs in whole.items():
            apart, where = distance(self.runs[name](), theirs)
            # the layers' roundings add up
            if apart > self.allowed * max(count, 1):
                what = f"every layer is equal to stock by itself, and {where} is not"
                return Finding(
                    layer="", place="around the layers", what=what, call=name, measured=apart, allowed=self.allowed
                )
        return None

    @torch.no_grad()
    def _search(self) -> Any:
        """Logits of a greedy search, or None where the model does not generate."""
        reads = Reads.of(self.model)
        if not (self.model.can_generate() and reads.vocabulary and self.own):
            return None
        options = {"max_new_tokens": _NEW, "min_new_tokens": _NEW, "do_sample": False, "pad_token_id": reads.pad_id}
        text = reads.inputs(2, 5, "left")
        found = self.model.generate(**text, **options, output_logits=True, return_dict_in_generate=True)
        return list(found.logits)

    def _loop(self, searched: Any, worst: float, count: int) -> Finding:
        """The model's forward is equal: what of dsi's own decode loop, and the parts that `models` names for it?"""
        apart, where = (0.0, "") if searched is None else distance(self._search(), searched)
        if apart <= self.allowed * max(count, 1):
            what = f"{count} layers, {len(self.runs)} inputs{'' if searched is None else ', greedy search'}"
            return Finding(layer="", place="", what=what, measured=worst, allowed=self.allowed)
        what = f"the model's forward is equal, and dsi's decode loop is not, at {where}: look at models and at window"
        return Finding(
            layer="", place="decode loop", what=what, call="greedy search", measured=apart, allowed=self.allowed
        )


class _Layer:
    """One call of one layer."""

    def __init__(self, whole: _Bisection, plan: BlockPlan, call: LayerCalled, name: str) -> None:
        self.whole, self.plan, self.call, self.name = whole, plan, call, name
        container = whole.model.get_submodule(plan.path)
        assert isinstance(container, Container)
        self.container = container
        self.block: Block = plan.block

    def find(self) -> Finding:
        """The first place of this layer that differs; `equal` where none does."""
        tape = Tape(self.container)
        before = self.container.stock_calls
        try:
            with tape.recording():
                ours = self._run(self.container)
        # whatever a container raises over sizes it was told wrong
        except Exception as error:  # noqa: BLE001
            place = f"after {tape.events[-1].place}" if tape.events else "call"
            return self._finding(place, f"raised {type(error).__name__}: {error}", math.inf)
        apart = self._distance(ours)
        if apart <= self.whole.allowed:
            return Finding(layer="", place="", what="equal", measured=apart, allowed=self.whole.allowed)
        if self.container.stock_calls > before:
            return self._finding("call", "the container hands this call to the stock layer, which gives others", apart)
        return self._inside(tape.events, apart)

    def _distance(self, ours: tuple[Any, Any]) -> float:
        """Of (output, cache) to what stock gives."""
        return distance(ours, (self.call.output, self._cache_after()))[0]

    @torch.no_grad()
    def _run(self, layer: nn.Module) -> tuple[Any, Any]:
        arguments = copy.deepcopy(self.call.arguments)
        name = next(iter(arguments))
        output = layer(arguments.pop(name), **arguments)
        return output, arguments.get(self.block.call.cache)

    def _stock(self) -> Run:
        with self.container.weights_in_original() as original:
            return Replay(attrs.evolve(self.call, layer=original)).base

    def _cache_after(self) -> Any:
        """The cache as stock leaves it."""
        with self.container.weights_in_original() as original:
            return self._run(original)[1]

    def _inside(self, events: list[Event], apart: float) -> Finding:
        stock = self._stock()
        for event in events:
            found = self._difference(event, stock)
            if found is not None:
                return found
        if distance(self._run(self.container)[0], self.call.output)[0] <= self.whole.allowed:
            return self._finding("cache", "what the layer leaves in the cache differs: look at layer_idx", apart)
        return self._finding("residual", "every place is equal, and what the layer gives is not", apart)

    def _difference(self, event: Event, stock: Run) -> Finding | None:
        if event.place == ACTIVATION:
            return None
        slot = self.block.slots.get(event.place)
        sources = slot.sources() if slot is not None else ()
        if not sources or any(path not in stock.inputs for path in sources):
            return None
        path = sources[0]
        apart = _apart(event.read, stock.inputs[path])
        if apart > self.whole.allowed:
            place = _BETWEEN.get(event.place, event.place)
            return self._finding(place, f"{event.place} reads other numbers than {path} does", apart)
        apart = _apart(event.wrote, self._written(event.place, stock))
        if apart > self.whole.allowed:
            kind = "norm" if isinstance(slot, Norm) else "product"
            return self._finding(event.place, f"the {kind} gives other numbers than {', '.join(sources)}", apart)
        return None

    def _written(self, place: str, stock: Run) -> Tensor:
        """What the stock modules of a place wrote, in the container's row order."""
        slot = self.block.slots[place]
        wrote = torch.cat([stock.outputs[path] for path in slot.sources()], dim=-1)
        if not isinstance(slot, Packed) or slot.layout == "halves":
            return wrote
        sizes = {name: self.plan.fit.facts[name] for name in ("heads", "kv_heads", "head_dim")}
        order = row_permutation(slot.layout, **sizes)
        return wrote if order is None else wrote[..., order]

    # --- what would mend it -----------------------------------------------------------------------------------

    def _finding(self, place: str, what: str, apart: float) -> Finding:
        cure = next(self._cures(), None)
        mend = "" if cure is None else f"equal with {cure.words}"
        if cure is not None and place.startswith(_BETWEEN_PLACES):
            place = cure.place
        return Finding(
            layer=self.plan.path,
            place=place,
            what=what,
            call=self.name,
            measured=apart,
            allowed=self.whole.allowed,
            mend=mend,
        )

    def _cures(self) -> Iterator[Alternative]:
        """Other answers under which the layer is equal, one change at a time."""
        with self.container.weights_in_original() as original:
            layer = copy.deepcopy(original)
        for one in alternatives(self.block, self.plan.fit.facts, self._index):
            if self._equal_with(one.block, layer):
                yield one

    @property
    def _index(self) -> int | None:
        """The layer's place in its stack, by its path."""
        last = self.plan.path.rpartition(".")[2]
        return int(last) if last.isdigit() else None

    def _equal_with(self, block: Block, layer: nn.Module) -> bool:
        alone = _Alone(copy.deepcopy(layer), self.plan.fit.config)
        policy = Policy(name="alternative", blocks=(block,))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                engine = init_inference(alone, injection_policy=policy)
            output = self._run(alone.layer)
        # an alternative that fits even less
        except Exception:  # noqa: BLE001
            return False
        # a policy that is refused leaves the stock layer, which is equal
        return bool(engine.plan.blocks) and self._distance(output) <= self.whole.allowed


class _Alone(nn.Module):
    """One layer with its config, and no model around it."""

    def __init__(self, layer: nn.Module, config: Any) -> None:
        super().__init__()
        self.layer, self.config = layer, config
        self.eval()


def _apart(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape and one.numel() == other.numel():
        # heads before positions, or after them
        turned = other.transpose(1, 2) if other.dim() == 4 else other
        other = turned if turned.shape == one.shape else other.reshape(one.shape)
    return distance(one, other)[0]


# --- what a model is given --------------------------------------------------------------------------------------------


def _given(model: Any, inputs: Mapping[str, Any]) -> tuple[str, Callable[[], Any]]:
    return "the inputs given", lambda: forward(model, inputs)


def _own_runs(model: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    reads = Reads.of(model)
    dtype = next(model.parameters()).dtype

    def inputs(padding: Any) -> dict[str, Tensor]:
        found = reads.inputs(2, _LENGTH, padding)
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}

    quiet = {"use_cache": False} if model.can_generate() else {}
    yield "a plain input", lambda: forward(model, inputs("none"), **quiet)
    if reads.masks:
        yield "an input padded on the left", lambda: forward(model, inputs("left"), **quiet)
    if model.can_generate() and reads.vocabulary:
        yield "a text over a cache, and one more token", lambda: _steps(model, inputs("left"))


@torch.no_grad()
def _steps(model: Any, inputs: dict[str, Tensor]) -> Any:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    first = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
    step = model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=first.past_key_values, use_cache=True)
    return [first.logits, step.logits]
