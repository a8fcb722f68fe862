"""Whether a block fits a layer of a loaded model: facts read, weights found, nothing left over, nothing in the way.

Pure questions; nothing is touched. The answer is a `Fit`, or a `Reason` why the layer is left alone. A policy whose
paths do not exist on the layer, or that leaves a parameter unread, is a `PolicyError`: the policy is wrong, not the
model.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import attrs
import torch
from torch import Tensor, nn

from dsi.containers.map_base import MapContainer
from dsi.containers.pair_base import PairContainer
from dsi.containers.stand_in import StandIn, holds
from dsi.errors import PolicyError
from dsi.policy import (
    ABSENT,
    Attr,
    Block,
    Concat,
    Config,
    Conv,
    Inverse,
    Keep,
    Linear,
    Norm,
    Packed,
    Refusal,
    RotaryTable,
    Slot,
)

ReasonCode = Literal[
    "no_policy",
    "root",
    "refused",
    "switched_off",
    "training_mode",
    "already_replaced",
    "quantized",
    "wrapped",
    "hook_present",
    "patched_forward",
    "meta",
    "offloaded",
    "dtensor",
    "dtype",
    "mixed",
    "tied",
    "shared",
    "attention",
    "layout",
]

CONV1D = "transformers.pytorch_utils:Conv1D"
LINEAR = "torch.nn.modules.linear:Linear"
CONV = "torch.nn.modules.conv:Conv2d"
LINEAR_OR_CONV = "linear or 1x1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@attrs.frozen
class Reason:
    """Why something is left alone: a code out of a closed list, and words."""

    code: ReasonCode
    text: str


def _read_only(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(dict(facts))


@attrs.frozen(eq=False, kw_only=True)
class Fit:
    """A block that fits a layer.

    Args:
        container: the container's class.
        block: as it holds for this layer, without the slots of places that are empty here.
        facts: fact -> value read.
        config: of the nearest enclosing model, or None.
    """

    container: type[StandIn]
    block: Block
    config: Any = None
    facts: Mapping[str, Any] = attrs.field(converter=_read_only)


def class_name(obj: object) -> str:
    """ "module:Class" of an instance."""
    cls = type(obj)
    return f"{cls.__module__}:{cls.__qualname__}"


def load_class(name: str) -> type[StandIn]:
    """The container class that "module:Class" names.

    Raises:
        PolicyError: it cannot be imported, or is no container.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    # it is a plugin's module that runs here, for the first time
    except (Exception, SystemExit) as error:
        raise PolicyError(f"container {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, StandIn)):
        raise PolicyError(f"container {name!r} is {found!r}, not a subclass of dsi.containers.Container")
    return found


def fit(block: Block, layer: nn.Module, config: Any, where: str, *, loaded: bool = True) -> Fit | Reason:
    """Match one block against one layer.

    Args:
        block: of the policy chosen.
        layer: an instance of `block.layer`.
        config: the config of the nearest enclosing model.
        where: the layer's path, for messages.
        loaded: False for a skeleton on the meta device, planned as if its weights were there.

    Raises:
        PolicyError: the policy does not describe this layer class.
    """
    container = load_class(block.container)
    obstacle = _obstacle(layer, config, block.call.attention, loaded)
    if obstacle is not None:
        return obstacle
    block = _present(block, container, layer)
    wrong = _not_neutral(block, layer) or _wrong_source(block, layer, where)
    if wrong is not None:
        return wrong
    _check_complete(block, layer, where)
    _check_places(block, container, where)
    _check_rotary_table(block, layer, where)
    _check_inputs(block, container, where)
    facts = _read_facts(block, container, layer, config, where)
    if isinstance(facts, Reason):
        return facts
    refusal = _checked(container, facts, block, where)
    if refusal is not None:
        return Reason("refused", f"{refusal.reason}. {refusal.hint}".strip())
    return Fit(container=container, block=block, facts=facts, config=config)


def _checked(container: type[StandIn], facts: Mapping[str, Any], block: Block, where: str) -> Refusal | None:
    try:
        # a copy of the facts, so that a check which changes them changes nothing
        answer: Any = container.check(dict(facts), block.slots)
    except (Exception, SystemExit) as error:
        found = f"check() of {block.container} raised {type(error).__name__}: {error}"
        raise PolicyError(f"{where}: {found}") from error
    if answer is not None and not isinstance(answer, Refusal):
        raise PolicyError(f"{where}: check() of {block.container} returned {answer!r}, no Refusal and not None")
    return answer


# --- what stands in the way -------------------------------------------------------------------------------------------


def _obstacle(layer: nn.Module, config: Any, known: frozenset[str], loaded: bool) -> Reason | None:
    if isinstance(layer, StandIn):
        return Reason("already_replaced", "a dsi container stands here already; engine.restore() first")
    if layer.training:
        return Reason("training_mode", "the model is in training mode; call model.eval() first")
    attention = getattr(config, "_attn_implementation", None)
    if attention is not None and attention not in known:
        return Reason("attention", f"attention implementation {attention!r}; supported: {', '.join(sorted(known))}")
    return _patched(layer) or _unusable_weights(layer, loaded)


def _patched(layer: nn.Module) -> Reason | None:
    for name, module in layer.named_modules():
        if "_hf_hook" in module.__dict__:
            where = name or "the layer"
            return Reason("offloaded", f"{where} carries an accelerate hook; remove_hook_from_module first")
        if "forward" in module.__dict__:
            return Reason("patched_forward", f"{name or 'the layer'} has its own forward on the instance")
        if name and _user_hooks(module):
            return Reason("hook_present", f"{name} has a forward hook, which a fused layer would never run")
    return None


def _user_hooks(module: nn.Module) -> bool:
    """Forward hooks other than transformers' own output capture."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)


def _unusable_weights(layer: nn.Module, loaded: bool) -> Reason | None:
    tensors: list[Tensor] = list(layer.parameters())
    kinds = {(t.dtype, t.device) for t in tensors}
    for name, tensor in layer.named_parameters():
        if type(tensor) is not nn.Parameter or type(tensor.data) is not Tensor:
            code: ReasonCode = "dtensor" if "DTensor" in type(tensor.data).__name__ else "quantized"
            return Reason(code, f"{name} is a {type(tensor.data).__name__}, not a plain tensor")
        if loaded and tensor.is_meta:
            return Reason("meta", f"{name} is on the meta device; load the weights first")
        if tensor.dtype not in DTYPES:
            return Reason("dtype", f"{name} is {tensor.dtype}; float32, float16 and bfloat16 are supported")
    if len(kinds) > 1:
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        return Reason("mixed", f"the layer mixes {found}")
    return None


def _present(block: Block, container: type[StandIn], layer: nn.Module) -> Block:
    """The block without slots that the container can do without and this layer does not have."""
    slots = {
        place: slot
        for place, slot in block.slots.items()
        if container.SLOTS.get(place, True) or not any(_ends_in_none(layer, path) for path in slot.sources())
    }
    return block if len(slots) == len(block.slots) else attrs.evolve(block, slots=slots)


def _ends_in_none(layer: nn.Module, path: str) -> bool:
    """Whether an attribute on the way to a submodule is None."""
    found: Any = layer
    for name in path.split(".") if path else ():
        found = getattr(found, name, ABSENT)
        if found is None:
            return True
    return False


def _not_neutral(block: Block, layer: nn.Module) -> Reason | None:
    """Something about the layer that the container knows nothing of."""
    for path, value in block.neutral.items():
        if holds(layer, tuple(path.split(".")), value):
            continue
        found: Any = layer
        for name in path.split("."):
            found = getattr(found, name, ABSENT)
        words = class_name(found) if isinstance(found, nn.Module) else repr(found)
        return Reason("refused", f"{path} is {words}; {value!r} is implemented")
    return None


def _wrong_source(block: Block, layer: nn.Module, where: str) -> Reason | None:
    """A projection or norm that is not the class its slot is made for: quantized, wrapped by adapters, or replaced."""
    for place, slot in block.slots.items():
        for path in slot.sources():
            if _ends_in_none(layer, path):
                return Reason("refused", f"{path} is None")
            module = submodule(layer, path, f"{where}: slot {place!r}")
            if isinstance(slot, Keep):
                continue
            wanted = _wanted_class(slot, module)
            found = class_name(module)
            if found == wanted:
                if (unknown := _unknown_window(slot, module)) is not None:
                    return Reason("refused", f"{path or 'the layer'} {unknown}")
                continue
            code: ReasonCode = "wrapped" if any(word in found.lower() for word in ("lora", "peft")) else "quantized"
            return Reason(code, f"{path} is {found}, not {wanted}")
    return None


def _wanted_class(slot: Slot, module: nn.Module) -> str:
    if isinstance(slot, Norm):
        return slot.cls
    if isinstance(slot, Conv):
        return CONV
    if isinstance(slot, Linear) and slot.cls == LINEAR_OR_CONV:
        return CONV if class_name(module) == CONV else LINEAR
    if isinstance(slot, Linear | Concat | Packed):
        return slot.cls or (CONV1D if slot.transposed else LINEAR)
    raise PolicyError(f"slot {slot!r} is of no kind that dsi knows")


def _unknown_window(slot: Slot, module: nn.Module) -> str | None:
    """What a convolution does that no container computes, in words."""
    if not isinstance(module, nn.Conv2d):
        return None
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return f"pads with {module.padding_mode}, by {module.padding}; zeros by numbers are implemented"
    one = {(1, 1)} == {module.kernel_size, module.stride} and module.padding == (0, 0) and module.groups == 1
    if isinstance(slot, Linear) and not one:
        return f"is a convolution of {module.kernel_size}, not of one pixel"
    return None


# --- what the policy says ---------------------------------------------------------------------------------------------


def submodule(layer: nn.Module, path: str, where: str) -> nn.Module:
    """The module at a dotted path; "" is the layer itself.

    Raises:
        PolicyError: nothing is there.
    """
    found: Any = layer
    for name in path.split(".") if path else ():
        found = getattr(found, name, None)
        if not isinstance(found, nn.Module):
            raise PolicyError(f"{where}: {type(layer).__name__} has no submodule {path!r} (stopped at {name!r})")
    return found


def _check_complete(block: Block, layer: nn.Module, where: str) -> None:
    """Every parameter of the layer is read exactly once or ignored by name."""
    readers: dict[str, str] = {}
    for place, slot in block.slots.items():
        for path in slot.sources():
            if path in readers:
                raise PolicyError(f"{where}: {path} feeds both slot {readers[path]!r} and slot {place!r}")
            readers[path] = place
    known = tuple(f"{path}." if path else "" for path in (*readers, *block.ignore))
    left = [name for name, _ in layer.named_parameters(remove_duplicate=False) if not name.startswith(known)]
    if left:
        raise PolicyError(
            f"{where}: the policy reads no slot from {', '.join(left)}",
            hint="add them to a slot, or to Block.ignore if they take no part",
        )
    buffers = [name for name in layer.state_dict() if not name.startswith(known)]
    if buffers:
        raise PolicyError(f"{where}: the policy says nothing of the persistent buffers {', '.join(buffers)}")


def _check_places(block: Block, container: type[StandIn], where: str) -> None:
    unknown = sorted(block.slots.keys() - container.SLOTS.keys())
    missing = sorted(place for place, required in container.SLOTS.items() if required and place not in block.slots)
    renamed = sorted(place for place, slot in block.slots.items() if isinstance(slot, Keep) and slot.path != place)
    if renamed:
        raise PolicyError(f"{where}: Keep leaves a module under its own name; rename the slots {', '.join(renamed)}")
    if unknown or missing:
        raise PolicyError(
            f"{where}: {container.__name__} takes the slots {', '.join(container.SLOTS)}; "
            f"unknown: {', '.join(unknown) or 'none'}; missing: {', '.join(missing) or 'none'}"
        )


def _check_inputs(block: Block, container: type[StandIn], where: str) -> None:
    known = container.INPUTS if issubclass(container, MapContainer) else frozenset()
    unknown = sorted(block.call.inputs.keys() - known)
    if unknown:
        raise PolicyError(
            f"{where}: {container.__name__} takes the inputs {', '.join(sorted(known)) or '(none)'}; "
            f"unknown: {', '.join(unknown)}"
        )
    if issubclass(container, PairContainer) != (block.call.returns == "pair"):
        wanted = "needs" if issubclass(container, PairContainer) else "knows no"
        raise PolicyError(f'{where}: {container.__name__} {wanted} Call(returns="pair")')


def _check_rotary_table(block: Block, layer: nn.Module, where: str) -> None:
    table = block.call.rope
    if not isinstance(table, RotaryTable):
        return
    owner_path, _, name = table.path.rpartition(".")
    owner = submodule(layer, owner_path, f"{where}: rotary table") if owner_path else layer
    rows = getattr(owner, name, None)
    if not isinstance(rows, Tensor) or rows.dim() != 2:
        raise PolicyError(f"{where}: rotary table {table.path!r} is {type(rows).__name__}, not a 2-D tensor")


def _read_facts(
    block: Block, container: type[StandIn], layer: nn.Module, config: Any, where: str
) -> dict[str, Any] | Reason:
    missing = sorted(container.FACTS - block.facts.keys())
    unknown = sorted(block.facts.keys() - container.FACTS - container.OPTIONAL_FACTS.keys())
    if missing or unknown:
        raise PolicyError(
            f"{where}: {container.__name__} needs the facts {', '.join(sorted(container.FACTS))}; "
            f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
        )
    facts = dict(container.OPTIONAL_FACTS)
    for name, source in block.facts.items():
        try:
            facts[name] = _read(source, layer, config)
        except (AttributeError, TypeError, ZeroDivisionError) as error:
            return Reason("refused", f"fact {name!r} cannot be read: {error}")
    return facts


def _read(source: Any, layer: nn.Module, config: Any) -> Any:
    if isinstance(source, Config):
        return getattr(config, source.name)
    if isinstance(source, Inverse):
        return 1.0 / _read(source.of, layer, config)
    if isinstance(source, Attr):
        found: Any = layer
        for name in source.path.split("."):
            found = getattr(found, name)
        return found
    return source.value
