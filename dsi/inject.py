"""Stage and commit: a plan becomes true on one model instance, step by step, and can be taken back.

Each step is built aside first, then its undo goes into the journal, then it makes assignments only. A slot is one step:
its weights are fused and the stock parameters parked before the next slot is touched, so no more than one layer's
weights, or one weight of an embedding and a head, exist twice at any time. When a step fails or is interrupted,
wherever that is, the undos run in reverse and the model is bitwise what it was.

Past 500 lines: the steps and what takes each back stand side by side, so that they are read, and changed, together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from dsi.config import InferenceConfig
from dsi.containers.casting import Residue, cast_with_residue, is_lossless
from dsi.containers.conv import FusedConv, Window
from dsi.containers.layouts import row_permutation
from dsi.containers.linear import FusedLinear, Source, stack
from dsi.containers.ops import NormOp
from dsi.containers.packed_table import Packed as PackedWeight
from dsi.containers.packed_table import PackedTable
from dsi.containers.shared_products import SharedLinear, SharedProduct
from dsi.containers.stand_in import StandIn, fused_class, parked
from dsi.errors import InjectionError, RestoreError
from dsi.fit import Reason, class_name, submodule
from dsi.parallel import Group, LayerShard, ShardedContainer, SummedLinear, shard_layer, sharded_class, take
from dsi.planner import persistent_buffers
from dsi.plans import BlockPlan, LeftPlan, Plan, TablePlan
from dsi.policy import Concat, Conv, Keep, Linear, Norm, Packed, Slot
from dsi.structure import Structure

logger = logging.getLogger(__name__)

Residues = dict[Tensor, Residue]


@attrs.frozen(eq=False)
class Step:
    """Something to do to a model.

    Args:
        act: does it, by assignments alone.
        undo: takes it back; right before, in the midst of and after `act`, and any number of times.
    """

    act: Callable[[], object]
    undo: Callable[[], object]


class Journal:
    """The steps done so far, newest last."""

    def __init__(self) -> None:
        self._steps: list[Step] = []

    def do(self, step: Step) -> None:
        """Do one step. It is in the journal before it begins, so that an interrupt cannot come between."""
        self._steps.append(step)
        step.act()

    def undo(self) -> None:
        """Take everything back, newest first; an interrupt meanwhile is raised once that is done.

        Raises:
            RestoreError: an undo failed; the others have run all the same, and a second call tries those that failed
                again.
        """
        failed: list[Step] = []
        failure: Exception | None = None
        interrupt: KeyboardInterrupt | None = None
        while self._steps:
            try:
                failure = self._undo_last(failed) or failure
            except KeyboardInterrupt as error:
                interrupt = error
        self._steps = failed[::-1]
        if failure is not None:
            raise RestoreError(f"{len(failed)} steps could not be taken back: {failure!r}") from failure
        if interrupt is not None:
            raise interrupt

    def _undo_last(self, failed: list[Step]) -> Exception | None:
        step, failure = self._steps[-1], None
        try:
            step.undo()
        except Exception as error:  # noqa: BLE001 - the rest must be undone, whatever this one meets
            failed.append(step)
            failure = error
        self._steps.pop()
        return failure

    def __len__(self) -> int:
        return len(self._steps)


@attrs.define(eq=False)
class Injection:
    """A plan that is now true of a model.

    Args:
        plan: what was done.
        journal: what takes it back.
        residues: by parameter, what its cast lost; empty when it was not kept.
        containers: the layers now in the model, by path.
        group: the ranks that the layers are split over, or None.
        shards: this rank's part of each layer, by path; empty where nothing is split.
        products: the shared products, by name, width, dtype and device.
        active: it has not been taken back.
        at: the layer that is being replaced, in words.
    """

    plan: Plan
    journal: Journal
    residues: Residues = attrs.field(factory=dict)
    containers: dict[str, StandIn] = attrs.field(factory=dict)
    group: Group | None = None
    shards: dict[str, LayerShard] = attrs.field(factory=dict)
    products: dict[tuple[Any, ...], SharedProduct] = attrs.field(factory=dict)
    active: bool = True
    at: str = ""

    def undo(self) -> None:
        """Give the original model back.

        Raises:
            RestoreError: a cast lost bits that were not kept, and nothing is changed; or there was no memory for a part
                of the original, and a second call tries again.
        """
        if not self.active:
            return
        if self.group is not None:
            raise RestoreError(f"the original's weights are on {self.group.size} ranks, and this one has only its own")
        if not self.plan.restorable:
            raise RestoreError(
                f"the cast {self.plan.dtype_before} -> {self.plan.dtype_after} cannot be undone bit for bit",
                hint='pass keep_original="host" to keep the lost bits in host memory',
            )
        try:
            with _plain_mode():
                self.journal.undo()
        finally:
            self.active = len(self.journal) > 0


@contextmanager
def _plain_mode() -> Iterator[None]:
    """No gradients, and no inference mode either: tensors made in it can never be written to outside."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def inject(
    model: nn.Module,
    plan: Plan,
    config: InferenceConfig,
    attach: Callable[[Injection], None] | None = None,
    group: Group | None = None,
) -> Injection:
    """Make a plan true.

    Args:
        model: the model the plan was made for; changed in place.
        plan: from `dsi.planner.make_plan`.
        config: the same as the plan's.
        attach: called last, to add steps of the layers above through `injection.journal`.
        group: the ranks over which the layers are split; each keeps its part and gives up the rest, for good.

    Raises:
        SplitError: a layer does not split over that many ranks; nothing is changed.
        InjectionError: a step failed; the model is bitwise what it was.
    """
    injection = Injection(plan=plan, journal=Journal())
    # a plugin's container may do to the stock layers what no step knows of
    before = Structure.of(model)
    if group is not None and group.size > 1:
        injection.group, injection.shards = group, _shards(model, plan, group)
        note = f"this is rank {group.rank} of {group.size}: what other ranks hold of the layers is given up for good"
        injection.plan = attrs.evolve(plan, restorable=False, notes=(*plan.notes, note))
    residues = injection.residues
    try:
        with _plain_mode():
            _run_steps(model, injection)
            if attach is not None:
                attach(injection)
            injection.residues = _kept(residues, plan, config)
        if injection.group is not None:
            # what could give the whole layers back holds them
            injection.journal = Journal()
        return injection
    except BaseException as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            # the frames of the failed step hold tensors; let go of them before memory is needed for the way back
            error.__traceback__ = None
        injection.residues = residues
        step = len(injection.journal) + 1
        with _plain_mode():
            _take_back(before, injection)
        # also SystemExit: a container ends no host
        if isinstance(error, Exception | SystemExit):
            what = f"step {step} failed; the model is what it was before: {error!r}"
            raise InjectionError(what, hint=injection.at) from error
        raise


def _take_back(before: Structure, injection: Injection) -> None:
    try:
        before.put_back_()
    finally:
        injection.journal.undo()


def _run_steps(model: nn.Module, injection: Injection) -> None:
    injection.journal.do(_drop_attribute(model, "_compiled_call"))
    for block in injection.plan.blocks:
        injection.at = f"it was {block.container} that was to replace {block.path}, by the policy {block.policy}"
        _replace(model, block, injection)
    injection.at = ""
    if injection.plan.cast is not None:
        _cast_rest(model, injection)
    for table in injection.plan.tables:
        _pack_table(model, table, injection)


def _kept(residues: Residues, plan: Plan, config: InferenceConfig) -> Residues:
    """What a restore will need: everything, on the host, if that was asked for; else of casts that lose nothing."""
    if config.keep_original == "host":
        return {tensor: residue.to_host() for tensor, residue in residues.items()}
    return {
        tensor: residue
        for tensor, residue in residues.items()
        if plan.cast is None or is_lossless(residue.dtype, plan.cast)
    }


def _shards(model: nn.Module, plan: Plan, group: Group) -> dict[str, LayerShard]:
    """This rank's part of every layer, by path."""
    shards = {}
    for planned in plan.blocks:
        layer = submodule(model, planned.path, planned.path)
        shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
        fit = planned.fit
        every = shard_layer(planned.block, fit.container, fit.facts, shapes, group.size, planned.path)
        shards[planned.path] = every[group.rank]
    return shards


# --- one layer --------------------------------------------------------------------------------------------------------


def _replace(model: nn.Module, planned: BlockPlan, injection: Injection) -> None:
    parent_path, _, name = planned.path.rpartition(".")
    parent = submodule(model, parent_path, planned.path) if parent_path else model
    original = parent._modules[name]
    if original is None:
        raise InjectionError(f"{planned.path} is gone since the plan was made")
    shard, facts = injection.shards.get(planned.path), planned.fit.facts
    container_class: Any = planned.fit.container
    if shard is not None:
        container_class = sharded_class(container_class)
    cls = fused_class(container_class, type(original))
    use_triton = planned.ops != "aten"
    container = cls(original, facts if shard is None else {**facts, **shard.facts}, planned.block.call, use_triton)
    if isinstance(container, ShardedContainer) and shard is not None:
        container.shard = shard
    container.model_config = planned.fit.config
    container.watch(planned.block.neutral)
    for place, slot in planned.block.slots.items():
        if isinstance(slot, Norm):
            _absorb_norm(container, place, slot, injection)
        elif isinstance(slot, Keep):
            _keep(container, place, slot, injection, planned.path)
        else:
            fused, absorb = _absorb(container, place, slot, injection)
            injection.journal.do(absorb)
            if isinstance(fused, FusedLinear):
                fused.many = container.MANY_ROWS
            fused.choose_form_()
    container.finish()
    injection.journal.do(_swap(model, parent, name, container))
    injection.containers[planned.path] = container


def _swap(model: nn.Module, parent: nn.Module, name: str, container: StandIn) -> Step:
    """Put the container in; taking it out finds it wherever the user has moved it, and leaves other edits alone."""
    original = container.original

    def undo() -> None:
        for module in list(model.modules()):
            for key, child in module._modules.items():
                if child is container:
                    module._modules[key] = original

    return Step(lambda: parent._modules.__setitem__(name, container), undo)


def _absorb(container: StandIn, place: str, slot: Slot, injection: Injection) -> tuple[FusedLinear | FusedConv, Step]:
    if isinstance(slot, Conv):
        return _absorb_conv(container, place, slot, injection)
    return _absorb_linear(container, place, slot, injection)


def _absorb_linear(container: StandIn, place: str, slot: Slot, injection: Injection) -> tuple[FusedLinear, Step]:
    """The slot's weights, fused, and the step that puts them into the container and parks the stock parameters."""
    parameters = _parameters(container, place, slot)
    if isinstance(container, ShardedContainer):
        return _absorb_part(container, place, slot, injection, parameters)
    casts, residues = _casts(parameters, injection)
    sources = tuple(_source(path, slot, parameters) for path in slot.sources())
    permutation = _permutation(slot, container.facts)
    weight, bias = stack(sources, permutation, casts)
    # plain at first: packing comes once the stock parameters are gone, so that the weights are never there three times
    if isinstance(slot, Linear | Concat) and slot.shared:
        fused: FusedLinear = SharedLinear(weight, bias, sources, _product(slot.shared, weight, injection))
    else:
        fused = FusedLinear(weight, bias, sources, permutation, "aten")
    absorption = _Absorption(container, place, fused, injection, parameters, residues)
    return fused, Step(absorption.act, absorption.undo)


def _absorb_conv(container: StandIn, place: str, slot: Conv, injection: Injection) -> tuple[FusedConv, Step]:
    """As `_absorb_linear`, of a convolution."""
    parameters = _parameters(container, place, slot)
    casts, residues = _casts(parameters, injection)
    prefix = f"{slot.path}." if slot.path else ""
    weight, bias = casts[f"{prefix}weight"].clone(memory_format=torch.channels_last), casts.get(f"{prefix}bias")
    stock: Any = submodule(container.original, slot.path, place)
    fused = FusedConv(weight, None if bias is None else bias.clone(), slot.path, Window.of(stock))
    absorption = _Absorption(container, place, fused, injection, parameters, residues)
    return fused, Step(absorption.act, absorption.undo)


def _parameters(container: StandIn, place: str, slot: Slot) -> dict[str, nn.Parameter]:
    """The stock parameters of a slot by path."""
    return {
        f"{path}.{name}" if path else name: parameter
        for path in slot.sources()
        for name, parameter in submodule(container.original, path, place).named_parameters()
    }


def _casts(
    parameters: Mapping[str, nn.Parameter], injection: Injection
) -> tuple[dict[str, Tensor], dict[str, Residue]]:
    """The parameters in the dtype that the plan gives them, and what the casts lose."""
    pairs = {
        name: cast_with_residue(parameter.data, injection.plan.cast or parameter.dtype)
        for name, parameter in parameters.items()
    }
    return {name: cast for name, (cast, _) in pairs.items()}, {name: residue for name, (_, residue) in pairs.items()}


def _product(name: str, weight: Tensor, injection: Injection) -> SharedProduct:
    """The shared product that a layer's rows are the next of, with room for those of all layers of the plan."""
    columns = weight.shape[1]
    key = (name, columns, weight.dtype, weight.device)
    if key not in injection.products:
        parts = [slot for block in injection.plan.blocks for slot in block.slots if slot.product == name]
        parts = [slot for slot in parts if slot.shape[1] == columns]
        rows, bias = sum(slot.shape[0] for slot in parts), any(slot.bias for slot in parts)
        injection.products[key] = SharedProduct(name, rows, columns, weight, bias=bias)
    return injection.products[key]


class _Absorption:
    """One slot's weights on their way into a container, and back.

    Args:
        container, place: where they go.
        fused: holds them.
        injection: keeps the residues once the step is done.
        parameters: the stock parameters by path.
        residues: what their cast lost, by path.
    """

    def __init__(
        self,
        container: StandIn,
        place: str,
        fused: FusedLinear | FusedConv,
        injection: Injection,
        parameters: dict[str, nn.Parameter],
        residues: dict[str, Residue],
    ) -> None:
        self.container, self.place, self.fused, self.injection = container, place, fused, injection
        self.parameters, self.residues = parameters, residues
        self.dtype = fused.weight.dtype
        self.shapes = {name: (parameter.shape, parameter.stride()) for name, parameter in parameters.items()}
        self.empty = {name: parked(parameter) for name, parameter in parameters.items()}
        self.gone: set[str] = set()

    def act(self) -> None:
        """Assignments alone: nothing here needs memory."""
        self.container.add_module(self.place, self.fused)
        self.injection.residues.update({self.parameters[name]: one for name, one in self.residues.items()})
        self.residues.clear()
        for name, parameter in self.parameters.items():
            self.gone.add(name)
            parameter.data = self.empty[name]

    def undo(self) -> None:
        """Fill the stock parameters again; what was done before a failure stays done when it is called again."""
        # before anything is copied, so that the weights are never there three times
        self.fused.unpack_()
        weights = self.fused.export() if self.gone else {}
        # a move or cast may have put other Parameter objects in the place of the first ones
        current = dict(self.container.original.named_parameters(remove_duplicate=False))
        for name in sorted(self.gone):
            parameter = current.get(name, self.parameters[name])
            parameter.data = _as_it_was(weights[name], self._residue(name), *self.shapes[name], self.dtype)
            self.gone.discard(name)
            self.injection.residues.pop(self.parameters[name], None)
        self.container._modules.pop(self.place, None)

    def _residue(self, name: str) -> Residue | None:
        residue = self.residues.get(name) or self.injection.residues.get(self.parameters[name])
        if residue is not None and name in self.container.loaded:
            # what the cast lost was of another value
            return Residue(dtype=residue.dtype)
        return residue


def _absorb_part(
    container: ShardedContainer, place: str, slot: Slot, injection: Injection, parameters: dict[str, nn.Parameter]
) -> tuple[FusedLinear, Step]:
    """As `_absorb_linear`, of this rank's part."""
    group, shard, cast = injection.group, container.shard, injection.plan.cast
    assert group is not None
    parts = {
        name: take(shard.pieces[name], parameter.data).to(cast or parameter.dtype)
        for name, parameter in parameters.items()
        if name in shard.pieces
    }
    sources = tuple(_source(path, slot, parts) for path in slot.sources())
    permutation = _permutation(slot, container.facts)
    weight, bias = stack(sources, permutation, parts)
    if place in shard.sums:
        fused: FusedLinear = SummedLinear(weight, bias, sources, group.all_reduce)
    else:
        fused = FusedLinear(weight, bias, sources, permutation, "aten")
    absorption = _PartAbsorption(container, place, fused, injection, parameters, {})
    return fused, Step(absorption.act, absorption.undo)


class _PartAbsorption(_Absorption):
    """One slot's part on its way into a container: what other ranks hold is kept here until the injection is done."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.whole = {name: parameter.data for name, parameter in self.parameters.items()}

    def undo(self) -> None:
        for name in sorted(self.gone):
            self.parameters[name].data = self.whole[name]
        self.gone.clear()
        self.container._modules.pop(self.place, None)


def _source(path: str, slot: Any, parameters: Mapping[str, Tensor]) -> Source:
    weight = parameters[f"{path}.weight"]
    rows = weight.shape[1] if slot.transposed else weight.shape[0]
    bias, tail = f"{path}.bias" in parameters, tuple(weight.shape[2:])
    return Source(path=path, rows=rows, transposed=slot.transposed, bias=bias, tail=tail)


def _permutation(slot: Slot, facts: Any) -> Tensor | None:
    if not isinstance(slot, Packed):
        return None
    return row_permutation(slot.layout, heads=facts["heads"], kv_heads=facts["kv_heads"], head_dim=facts["head_dim"])


def _as_it_was(
    value: Tensor, residue: Residue | None, shape: torch.Size, stride: tuple[int, ...], cast: torch.dtype
) -> Tensor:
    """The stock tensor in memory of its own; a model that the user has cast since keeps that dtype."""
    if residue is not None and residue.dtype != cast == value.dtype:
        value = residue.join(value)
        if value.stride() == stride:
            return value
    result = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
    return result.copy_(value)


def _absorb_norm(container: StandIn, place: str, slot: Norm, injection: Injection) -> None:
    """A norm shares the stock parameters, cast where asked."""
    stock = submodule(container.original, slot.path, place)
    for parameter in stock.parameters():
        _cast(parameter, injection)
    weight, bias = stock._parameters.get("weight"), stock._parameters.get("bias")
    groups = int(stock.num_groups) if isinstance(stock, nn.GroupNorm) else 1
    norm = NormOp(slot.kind, weight, bias, float(getattr(stock, slot.eps)), slot.offset, groups)
    injection.journal.do(_entry(container._modules, place, norm))


def _keep(container: StandIn, place: str, slot: Keep, injection: Injection, where: str) -> None:
    """A stock module that the container calls as it is, cast where asked; layers in it are replaced afterwards."""
    stock = submodule(container.original, slot.path, place)
    inner, prefix = [block.path for block in injection.plan.blocks], f"{where}.{slot.path}."
    layers = [submodule(stock, path.removeprefix(prefix), path) for path in inner if path.startswith(prefix)]
    later = {id(tensor) for layer in layers for tensor in (*layer.parameters(), *layer.buffers())}
    for tensor in (*stock.parameters(), *persistent_buffers(stock)):
        if tensor.is_floating_point() and id(tensor) not in later:
            _cast(tensor, injection)
    injection.journal.do(_entry(container._modules, place, stock))


# --- a weight of two modules ------------------------------------------------------------------------------------------


def _pack_table(model: nn.Module, planned: TablePlan, injection: Injection) -> None:
    """Hold the weight that an embedding and a head share packed; where that cannot be, the plan says so."""
    modules = [submodule(model, path, path) for path in planned.paths]
    stock = modules[0]._parameters["weight"]
    if stock is None or any(module._parameters["weight"] is not stock for module in modules):
        raise InjectionError(f"{' and '.join(planned.paths)} share no weight since the plan was made")
    held = None if injection.group is not None else PackedWeight.of(stock.data)
    if held is None:
        reason = Reason("layout", _UNREADABLE if injection.group is None else "the layers are split over ranks")
        left = [
            LeftPlan(path=path, original=class_name(module), bytes=stock.nbytes, reason=reason)
            for path, module in zip(planned.paths, modules, strict=True)
        ]
        tables = tuple(table for table in injection.plan.tables if table is not planned)
        injection.plan = attrs.evolve(injection.plan, tables=tables, left=(*injection.plan.left, *left))
        return
    table = PackedTable(stock)
    injection.journal.do(Step(partial(table.pack_, held, modules), table.unpack_))


_UNREADABLE = "the processor's packed layout gives back other rows, so an embedding cannot read it"


# --- the rest of the model --------------------------------------------------------------------------------------------


def _cast_rest(model: nn.Module, injection: Injection) -> None:
    """Cast every floating parameter and persistent buffer outside the containers."""
    inside = {id(p) for container in injection.containers.values() for p in container.parameters()}
    tensors: list[Tensor] = [p for p in model.parameters() if id(p) not in inside]
    tensors += persistent_buffers(model)
    for tensor in tensors:
        if tensor.is_floating_point():
            _cast(tensor, injection)


def _cast(tensor: Tensor, injection: Injection) -> None:
    before, after = tensor.dtype, injection.plan.cast
    if after is None or before == after:
        return
    cast, residue = cast_with_residue(tensor.data, after)
    shape, stride, version = tensor.shape, tensor.stride(), _version(tensor)

    def act() -> None:
        injection.residues[tensor] = residue
        tensor.data = cast

    def undo() -> None:
        if tensor.dtype == before:
            return
        kept = injection.residues.get(tensor)
        if kept is not None and _version(tensor) != version:
            # somebody has written to it since: what the cast lost was of another value
            kept = Residue(dtype=before)
        tensor.data = _as_it_was(tensor.data, kept, shape, stride, after)
        injection.residues.pop(tensor, None)

    injection.journal.do(Step(act, undo))


def _version(tensor: Tensor) -> int:
    """Counts what was written to the tensor; inference tensors do not."""
    return 0 if tensor.is_inference() else tensor._version


# --- plain attributes -------------------------------------------------------------------------------------------------


def set_attribute(model: nn.Module, name: str, value: Any) -> Step:
    """A step that sets one plain instance attribute."""
    return _entry(model.__dict__, name, value)


def _entry(mapping: dict[str, Any], name: str, value: Any) -> Step:
    """A step that sets one entry of a dict."""
    if name in mapping:
        old = mapping[name]
        return Step(lambda: mapping.__setitem__(name, value), lambda: mapping.__setitem__(name, old))

    def undo() -> None:
        mapping.pop(name, None)

    return Step(lambda: mapping.__setitem__(name, value), undo)


def _drop_attribute(model: nn.Module, name: str) -> Step:
    """Remove an instance attribute that would outlive what it was made from."""
    attributes = model.__dict__
    if name not in attributes:
        return Step(lambda: None, lambda: None)
    value = attributes[name]
    return Step(lambda: attributes.__delitem__(name), lambda: attributes.__setitem__(name, value))
