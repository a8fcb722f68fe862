"""What would become of a model, decided without touching it: a `dsi.plans.Plan`.

Every module with parameters is named once: as a block that is replaced, or as something left alone, with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from dsi.config import InferenceConfig
from dsi.containers.casting import is_lossless
from dsi.containers.conv import choose_conv_form
from dsi.containers.linear import choose_form
from dsi.containers.packed_table import may_join, packs_table
from dsi.containers.stand_in import StandIn
from dsi.containers.tables import choose_ops
from dsi.errors import ConfigError, PolicyError, UnsupportedModelError
from dsi.fit import Fit, Reason, class_name, fit, submodule
from dsi.plans import BlockPlan, LeftPlan, Plan, SlotPlan, TablePlan
from dsi.policy import Block, CausalLM, Conv, Keep, Norm, Policy
from dsi.registry import Choice, Registry, Rejected, stands
from dsi.structure import Structure

_FAST = "dsi's decode loop for greedy search and sampling, transformers' loop for every other mode"
_NO_POLICY = Reason("no_policy", "no policy claims this class")


def make_plan(model: nn.Module, config: InferenceConfig, registry: Registry, *, assume_loaded: bool = False) -> Plan:
    """Decide for every module of a model what becomes of it.

    Args:
        model: a loaded model.
        config: see `dsi.config`.
        registry: the plugins' policies.
        assume_loaded: the model is a skeleton on the meta device; plan as if its weights were there, on CPU.

    Raises:
        UnsupportedModelError: `model` is no torch module, or has no floating parameters.
        PolicyError, AmbiguousPolicyError, UnknownPolicyError: see `dsi.errors`.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"expected a torch.nn.Module, got {type(model).__module__}.{type(model).__qualname__}",
            hint="for a diffusers pipeline pass a component, e.g. pipe.text_encoder",
        )
    # a name that nobody registered is wrong also where it would have claimed nothing
    registry.resolve(config.injection_policy)
    before = Structure.of(model)
    planner = _Planner(model, config, registry, assume_loaded, before)
    try:
        return planner.plan()
    finally:
        _check_untouched(before, planner)


def _check_untouched(before: Structure, planner: _Planner) -> None:
    """Whoever was asked may have changed what it was asked about.

    Raises:
        PolicyError: the model is not what it was; everything but the values of tensors is put back.
    """
    changes = before.changes()
    if not changes:
        return
    before.put_back_()
    choices = planner.choices.values()
    names = {choice.full_name for choice in choices} | {one.full_name for choice in choices for one in choice.rejected}
    asked = ", ".join(sorted(names - {""})) or "none"
    raise PolicyError(
        f"the model was changed while it was planned ({', '.join(changes[:5])}); policies asked: {asked}",
        hint="it is put back, values of tensors apart; a policy and a container's check may only read",
    )


class _Planner:
    """One walk over one model."""

    def __init__(
        self, model: nn.Module, config: InferenceConfig, registry: Registry, assume_loaded: bool, before: Structure
    ) -> None:
        self.model, self.config, self.registry, self.assume_loaded = model, config, registry, assume_loaded
        self.before = before
        floating = [p for p in model.parameters() if p.is_floating_point()]
        if not floating:
            raise UnsupportedModelError(f"{type(model).__name__} has no floating-point parameters")
        self.device = torch.device("cpu") if assume_loaded else floating[0].device
        if config.use_triton and self.device.type != "cuda":
            raise ConfigError([f"use_triton: True, and the model is on {self.device}; Triton kernels need CUDA"])
        self.cast: torch.dtype | None = getattr(torch, config.dtype) if config.dtype else None
        dtypes = [t.dtype for t in (*floating, *persistent_buffers(model)) if t.is_floating_point()]
        self.lossy = [dtype for dtype in dtypes if self.cast is not None and not is_lossless(dtype, self.cast)]
        changed = [dtype for dtype in dtypes if self.cast not in (None, dtype)]
        self.dtype_before = (self.lossy or changed or dtypes)[0]
        self.uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        self.homes = Counter(id(child) for module in model.modules() for child in module._modules.values())
        self.choices: dict[tuple[str, int, str], Choice] = {}
        self.configs: dict[int, Any] = {}
        self.blocks: list[BlockPlan] = []
        self.reasons: dict[str, Reason] = {}

    def plan(self) -> Plan:
        taken = ""
        kept: tuple[str, ...] = ()
        for path, module, config, holder in walk(self.model):
            # what stands below a layer that is replaced goes with it, but for what it keeps
            if taken and path.startswith(taken) and not path.startswith(kept):
                continue
            self._visit(path, module, config, holder)
            if self._takes(path, module):
                taken = f"{path}." if not (taken and path.startswith(taken)) else taken
                kept = self._kept(path, kept)
        self.blocks = [self._net(block) for block in self.blocks]
        decode, text = self._decode()
        rejected: dict[str, tuple[Rejected, ...]] = {}
        for (layer, *_), choice in self.choices.items():
            rejected[layer] = (*rejected.get(layer, ()), *choice.rejected)
        restorable = self.config.keep_original == "host" or not self.lossy
        return Plan(
            model=class_name(self.model),
            device=str(self.device),
            dtype_before=self.dtype_before,
            dtype_after=self.cast or self.dtype_before,
            cast=self.cast,
            blocks=tuple(self.blocks),
            tables=(tables := tuple(self._tables())),
            left=tuple(self._left(tables)),
            entries=self._entries(),
            decode=decode,
            decode_text=text,
            input_limit=self._input_limit(decode),
            rejected={layer: entries for layer, entries in rejected.items() if entries},
            restorable=restorable,
            notes=tuple(self._notes(restorable)),
        )

    def _kept(self, path: str, kept: tuple[str, ...]) -> tuple[str, ...]:
        """Prefixes of what stays inside layers that are replaced, the one planned last included."""
        if not self.blocks or self.blocks[-1].path != path:
            return kept
        slots = self.blocks[-1].block.slots.values()
        return (*kept, *(f"{path}.{slot.path}." for slot in slots if isinstance(slot, Keep)))

    def _visit(self, path: str, module: nn.Module, config: Any, holder: str) -> None:
        reason = self._off(module)
        layer = class_name(module)
        if reason is None and not self._claimed(layer, holder):
            return
        if reason is None:
            choice = self._choose(layer, config, holder)
            if choice.policy is None or choice.block is None:
                words = "; ".join(f"{r.full_name}: {r.reason}" for r in choice.rejected)
                reason = Reason("refused", words) if words else None
            else:
                found = self._fit(choice.block, module, config, path, choice.full_name)
                if isinstance(found, Fit):
                    self.blocks.append(self._block(path, layer, module, choice, found))
                else:
                    reason = found
        if reason is not None:
            self.reasons[path] = reason

    def _takes(self, path: str, module: nn.Module) -> bool:
        """Whether a container stands at `path`, now or by this plan."""
        planned = bool(self.blocks) and self.blocks[-1].path == path
        return planned or isinstance(module, StandIn)

    def _off(self, module: nn.Module) -> Reason | None:
        if isinstance(module, StandIn):
            return Reason("already_replaced", "a dsi container stands here already; engine.restore() first")
        if not self.config.replace_with_kernel_inject and module is self.model:
            return Reason("switched_off", "replace_with_kernel_inject=False")
        return None

    def _claimed(self, layer: str, holder: str) -> bool:
        if not self.config.replace_with_kernel_inject:
            return False
        explicit = self.config.injection_policy
        if isinstance(explicit, Policy):
            return any(stands(block, layer, holder) for block in explicit.blocks)
        return bool(self.registry.blocks_for(layer, holder))

    def _choose(self, layer: str, config: Any, holder: str) -> Choice:
        key = (layer, id(config), holder)
        if key not in self.choices:
            self.configs[id(config)] = config
            explicit = self.config.injection_policy
            self.choices[key] = self.registry.choose(layer, config, explicit, guard=self._put_back, holder=holder)
        return self.choices[key]

    def _put_back(self) -> list[str]:
        changes = self.before.changes()
        if changes:
            self.before.put_back_()
        return changes

    def _fit(self, block: Block, layer: nn.Module, config: Any, path: str, name: str) -> Fit | Reason:
        if not path:
            return Reason("root", "the layer is the whole model; pass the model around it")
        if self.homes[id(layer)] > 1:
            return Reason("shared", "the same module stands in several places of the model")
        tied = [name for name, p in layer.named_parameters() if self.uses[id(p)] > 1]
        if tied:
            return Reason("tied", f"{', '.join(tied)} is shared with another part of the model")
        named = self.registry.containers.get(block.container)
        if named is not None:
            block = attrs.evolve(block, container=named.impl)
        try:
            return fit(block, layer, config, path or "the model", loaded=not self.assume_loaded)
        except PolicyError as error:
            raise PolicyError(f"policy {name}: {error.message}", hint=error.hint) from error

    def _block(self, path: str, layer: str, module: nn.Module, choice: Choice, found: Fit) -> BlockPlan:
        assert choice.block is not None
        return BlockPlan(
            path=path,
            original=layer,
            container=choice.block.container,
            policy=choice.full_name,
            ops=found.container.operations(choose_ops(self.device, self.config.use_triton), found.facts),
            slots=tuple(
                self._slot(place, slot, module, many=found.container.MANY_ROWS)
                for place, slot in found.block.slots.items()
            ),
            block=found.block,
            fit=found,
        )

    def _slot(self, place: str, slot: Any, layer: nn.Module, *, many: bool) -> SlotPlan:
        modules = [submodule(layer, path, place) for path in slot.sources()]
        tensors = [p for module in modules for p in module.parameters()]
        before = sum(p.nbytes for p in tensors)
        dtype = self.cast or tensors[0].dtype if tensors else self.dtype_before
        after = sum(p.numel() for p in tensors) * dtype.itemsize
        shape, form = self._shape(slot, modules, dtype, many=many)
        return SlotPlan(
            place=place,
            sources=slot.sources(),
            shape=shape,
            form=form,
            bytes_before=before,
            bytes_after=after,
            product=getattr(slot, "shared", ""),
            bias=any(module._parameters.get("bias") is not None for module in modules),
        )

    def _shape(self, slot: Any, modules: list[Any], dtype: torch.dtype, *, many: bool) -> tuple[tuple[int, ...], str]:
        """The shape of a slot's fused weight, and how it will be held."""
        if isinstance(slot, Keep):
            return (), "kept"
        if isinstance(slot, Norm):
            return tuple(next((p.shape for p in modules[0].parameters()), ())), "shared"
        if isinstance(slot, Conv):
            weight, groups = modules[0].weight, modules[0].groups
            return tuple(weight.shape), choose_conv_form(self.device, dtype, tuple(weight.shape), groups)
        weights = [m.weight.t() if slot.transposed else m.weight for m in modules]
        out_features, in_features = sum(w.shape[0] for w in weights), weights[0].shape[1]
        if getattr(slot, "shared", ""):
            return (out_features, in_features), "aten"
        return (out_features, in_features), choose_form(self.device, dtype, out_features, in_features, many=many)

    def _tables(self) -> Iterator[TablePlan]:
        """The embeddings and heads around layers that are replaced whose one weight can be held packed."""
        inside = tuple(f"{block.path}." for block in self.blocks)
        sharing: dict[int, list[tuple[str, nn.Module]]] = {}
        for path, module in self.model.named_modules():
            if inside and not path.startswith(inside) and may_join(module) and self.homes[id(module)] == 1:
                sharing.setdefault(id(module._parameters["weight"]), []).append((path, module))
        for weight_id, found in sharing.items():
            weight: Any = found[0][1]._parameters["weight"]
            if self.uses[weight_id] != 2 or {type(module) for _, module in found} != {nn.Embedding, nn.Linear}:
                continue
            dtype = self.cast or weight.dtype
            here = self.device if self.assume_loaded else weight.device
            if weight.is_contiguous() and packs_table(here, dtype, weight.shape):
                yield TablePlan(
                    paths=tuple(path for path, _ in found),
                    shape=tuple(weight.shape),
                    bytes_before=weight.nbytes,
                    bytes_after=weight.numel() * dtype.itemsize,
                )

    def _left(self, tables: tuple[TablePlan, ...]) -> Iterator[LeftPlan]:
        replaced = {block.path for block in self.blocks} | {path for table in tables for path in table.paths}
        ancestors = {path[:i] for path in replaced | self.reasons.keys() for i in range(len(path)) if path[i] == "."}
        ancestors |= {""} if replaced or self.reasons.keys() - {""} else set()
        yield from self._leave("", self.model, replaced, ancestors)

    def _leave(
        self, path: str, module: nn.Module, replaced: set[str], ancestors: set[str], reason: Reason = _NO_POLICY
    ) -> Iterator[LeftPlan]:
        if path in replaced:
            yield from self._left_inside(path)
            return
        reason = self.reasons.get(path, reason)
        # around a layer that is named itself, only what the module holds directly is left to name
        size = sum(p.nbytes for p in module.parameters(recurse=path not in ancestors))
        if size:
            yield LeftPlan(path=path or "(model)", original=class_name(module), bytes=size, reason=reason)
        if path in ancestors:
            for name, child in module.named_children():
                yield from self._leave(f"{path}.{name}" if path else name, child, replaced, ancestors, reason)

    def _left_inside(self, path: str) -> Iterator[LeftPlan]:
        """What a policy claims and does not get, in what the layer at `path` keeps."""
        for inner, reason in self.reasons.items():
            if inner.startswith(f"{path}."):
                module = submodule(self.model, inner, inner)
                size = sum(p.nbytes for p in module.parameters())
                yield LeftPlan(path=inner, original=class_name(module), bytes=size, reason=reason)

    def _net(self, block: BlockPlan) -> BlockPlan:
        """The block without the bytes of what is replaced inside of it."""
        slots = []
        for slot in block.slots:
            inner = [b for b in self.blocks if slot.form == "kept" and b.path.startswith(f"{block.path}.{slot.place}.")]
            before, after = (sum(getattr(b, name) for b in inner) for name in ("bytes_before", "bytes_after"))
            sizes = {"bytes_before": slot.bytes_before - before, "bytes_after": slot.bytes_after - after}
            slots.append(attrs.evolve(slot, **sizes))
        return attrs.evolve(block, slots=tuple(slots))

    def _decode(self) -> tuple[CausalLM | None, str]:
        """The parts for dsi's own decode loop, if every layer of the language model is replaced."""
        if not callable(getattr(self.model, "generate", None)):
            return None, "the model does not generate"
        name, where = class_name(self.model), {block.path for block in self.blocks}
        policies = {choice.full_name: choice.policy for choice in self.choices.values() if choice.policy is not None}
        for parts in (part for policy in policies.values() for part in policy.models if part.model == name):
            layers = submodule(self.model, parts.layers, name)
            if all(f"{parts.layers}.{child}" in where for child, _ in layers.named_children()):
                return parts, _FAST
            return None, "transformers' loop: not every layer is replaced"
        return None, "transformers' loop: no policy describes the parts around the layers of this class"

    def _entries(self) -> tuple[str, ...]:
        """The parts that are run in the place of the model's forward, by the word of a policy that is used here."""
        name = class_name(self.model)
        policies = {choice.full_name: choice.policy for choice in self.choices.values() if choice.policy is not None}
        for entries in (one for policy in policies.values() for one in policy.entries if one.model == name):
            for path in entries.parts:
                submodule(self.model, path, name)
            return entries.parts
        return ()

    def _input_limit(self, decode: CausalLM | None) -> int | None:
        """The most positions one forward may take: as configured, else the shortest table of learned positions."""
        limits: list[int] = []
        for (_, config_id, _), choice in self.choices.items():
            if choice.policy is not None and choice.policy.context is not None:
                context, config = choice.policy.context, self.configs[config_id]
                skipped = getattr(config, context.after) + 1 if context.after else 0
                limits.append(int(getattr(config, context.config)) - skipped)
        limit, wanted = min(limits, default=None), self.config.max_out_tokens
        if limit is not None and wanted is not None and wanted > limit:
            raise ConfigError([f"max_out_tokens: {wanted} is more than the model's {limit} learned positions"])
        own = int(getattr(self.model.config, decode.context)) if decode is not None and decode.context else limit
        reach = wanted or own
        if reach is not None and self.config.min_out_tokens > reach:
            raise ConfigError([f"min_out_tokens: {self.config.min_out_tokens} is more than the context of {reach}"])
        return wanted or limit

    def _notes(self, restorable: bool) -> Iterator[str]:
        if self.blocks:
            yield (
                "unknown arguments, attention weights wanted, paged attention, autocast and training mode run the "
                "stock layer, with its weights put back for the call"
            )
        if not restorable:
            yield (
                f"the cast {self.dtype_before} -> {self.cast} loses bits: restore() will refuse; "
                'keep_original="host" keeps them in host memory'
            )


def persistent_buffers(model: nn.Module) -> Iterator[Tensor]:
    """The buffers that `state_dict` writes, and a cast of the model changes."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield buffer


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any, str]]:
    """Every module, parents first: its path, the config of the nearest enclosing module that has one, its holder.

    The holder is the class of the module that holds it, past lists and dictionaries of modules; "" for the model.
    """
    stack: list[tuple[str, nn.Module, Any, str]] = [("", model, getattr(model, "config", None), "")]
    while stack:
        path, module, config, holder = stack.pop()
        yield path, module, config, holder
        holds = holder if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential) else class_name(module)
        for name, child in reversed(list(module.named_children())):
            own = getattr(child, "config", None)
            stack.append((f"{path}.{name}" if path else name, child, config if own is None else own, holds))
