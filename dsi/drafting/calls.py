"""The call convention of a layer: which argument is what, by what the model hands over and what changes without it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from dsi.drafting.replay import LayerCalled, Replay, noise, record, same
from dsi.drafting.specimen import Specimen
from dsi.drafting.stack import Stack
from dsi.errors import UnsupportedModelError
from dsi.policy import Call, RotaryTable
from dsi.testing.compare import distance

LENGTH = 7
_ROUNDING = 1e-6
# what every container knows of itself: hooks record, and a layer asked for attentions is stock
_UNDERSTOOD = ("is_causal", "output_attentions", "output_hidden_states")


@attrs.frozen(kw_only=True, eq=False)
class Recorded:
    """The calls of the layers of one model.

    Args:
        plain: without padding and cache, one for each layer.
        padded: with padding, likewise.
        decode: one more position over a cache; empty where the model has none.
    """

    plain: list[LayerCalled]
    padded: list[LayerCalled]
    decode: list[LayerCalled]

    def plain_of(self, layer: nn.Module) -> LayerCalled:
        """The plain call of one layer."""
        return next(call for call in self.plain if call.layer is layer)

    def all(self) -> Iterator[LayerCalled]:
        """Every call."""
        yield from (*self.plain, *self.padded, *self.decode)


def record_calls(specimen: Specimen, stacks: list[Stack]) -> Recorded:
    """What the model really hands its layers.

    Raises:
        UnsupportedModelError: the small model does not run.
    """
    model = specimen.model
    layers = [layer for stack in stacks for layer in stack.layers(model)]
    quiet = {"use_cache": False} if specimen.decodes else {}
    plain, padded = (specimen.reads.inputs(2, LENGTH, kind) for kind in ("none", "left"))
    try:
        return Recorded(
            plain=record(model, layers, lambda: model(**plain, **quiet)),
            padded=record(model, layers, lambda: model(**padded, **quiet)),
            decode=_decode(specimen, layers) if specimen.decodes else [],
        )
    # whatever a model raises whose sizes do not fit together
    except Exception as error:
        raise UnsupportedModelError(f"the small model does not run: {type(error).__name__}: {error}") from error


def _decode(specimen: Specimen, layers: list[nn.Module]) -> list[LayerCalled]:
    ids = specimen.reads.inputs(2, LENGTH)["input_ids"]
    with torch.no_grad():
        cache = specimen.model(input_ids=ids[:, :-1], use_cache=True).past_key_values
    return record(specimen.model, layers, lambda: specimen.model(input_ids=ids[:, -1:], past_key_values=cache))


@attrs.frozen(kw_only=True, eq=False)
class Convention:
    """How the layer is called.

    Args:
        call: in the policy's words; `attention` is not settled here.
        causal: what a missing mask means.
        rotary: the layer gets rotary terms, or makes them.
        freely: arguments that were left out, and nothing changed.
    """

    call: Call
    causal: bool
    rotary: bool
    freely: tuple[str, ...]


def read_convention(layer: nn.Module, recorded: Recorded) -> Convention:
    """The convention of a layer, by the calls that were recorded.

    Raises:
        UnsupportedModelError: an argument has a part that dsi has no word for.
    """
    roles: dict[str, str] = {}
    for call in recorded.all():
        for name, value in list(call.arguments.items())[1:]:
            if value is not None:
                roles[name] = _role(value) or roles.get(name, "")
    named = {role: [name for name, one in roles.items() if one == role] for role in ("mask", "cache", "rope")}
    many = {role: names for role, names in named.items() if len(names) > 1}
    if many:
        raise UnsupportedModelError(f"several arguments could be the {next(iter(many.items()))}")
    mask, cache, rope = (next(iter(named[role]), "") for role in ("mask", "cache", "rope"))
    rest = [name for name, role in roles.items() if not role and name not in _UNDERSTOOD]
    plain = recorded.plain_of(layer)
    replay = Replay(plain)
    # a flag that is off says nothing, and one that is on is not understood
    off = [name for name in rest if plain.arguments.get(name) is False and not _is_free(replay, name)]
    rest = [name for name in rest if name not in off]
    needed = [name for name in rest if not _is_free(replay, name)]
    rope = rope if rope and not _is_free(replay, rope) else ""
    bias, table = _further(layer, replay, needed)
    free = tuple(name for name in (*rest, *named["rope"]) if name not in (*needed, rope))
    usual = Call().free
    return Convention(
        call=Call(
            mask=mask,
            cache=cache,
            rope=table or rope,
            bias=bias,
            free=usual | frozenset(free) if set(free) - usual else usual,
            returns="tuple" if isinstance(plain.output, tuple) else "tensor",
        ),
        causal=_is_causal(plain, mask),
        rotary=bool(rope or table),
        freely=free,
    )


def _role(value: Any) -> str:
    if callable(getattr(value, "update", None)) and hasattr(value, "get_seq_length"):
        return "cache"
    if isinstance(value, Tensor) and value.dim() == 4 and (value.dtype is torch.bool or value.is_floating_point()):
        return "mask"
    pair = isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(x, Tensor) for x in value)
    return "rope" if pair and value[0].shape == value[1].shape and value[0].is_floating_point() else ""


def _is_free(replay: Replay, name: str) -> bool:
    """Whether the layer gives the same without an argument; of a flag, also with its opposite."""
    if name not in replay.call.arguments:
        return True
    value = replay.call.arguments[name]
    try:
        runs = [replay.run(without=(name,))]
        if isinstance(value, bool):
            runs.append(replay.run(other={name: not value}))
    except UnsupportedModelError:
        # the layer cannot do without it
        return False
    return all(distance(run.output, replay.base.output)[0] < _ROUNDING for run in runs)


def _further(layer: nn.Module, replay: Replay, needed: list[str]) -> tuple[str, RotaryTable | None]:
    """(argument of biases, rotary table) for arguments that are needed and no mask, cache or (cos, sin)."""
    bias, table = "", None
    for name in needed:
        value = replay.call.arguments[name]
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == 1 and value.is_floating_point():
            bias = name
        elif isinstance(value, Tensor) and value.dtype is torch.int64 and (path := _table(layer)):
            table = RotaryTable(path=path, positions=name)
        else:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UnsupportedModelError(f"the layer needs its argument {name} ({shape}), which dsi has no word for")
    return bias, table


def _table(layer: nn.Module) -> str:
    """Path of the layer's one table of sines and cosines, or ""."""
    found = [
        f"{path}.{name}" if path else name
        for path, module in layer.named_modules()
        for name, value in (*module._buffers.items(), *vars(module).items())
        if isinstance(value, Tensor) and value.dim() == 2 and _turns(value)
    ]
    return found[0] if len(found) == 1 else ""


def _turns(rows: Tensor) -> bool:
    """Half of each row are sines, and half the cosines of the same angles."""
    if rows.shape[-1] % 2 or not rows.is_floating_point() or not rows.numel():
        return False
    sin, cos = rows.chunk(2, dim=-1)
    return same(sin.square() + cos.square(), torch.ones_like(sin))


@torch.no_grad()
def _is_causal(call: LayerCalled, mask: str) -> bool:
    """Whether without a mask a position is blind for what comes after it."""
    left = {name: value for name, value in call.arguments.items() if name != "is_causal"}
    if mask:
        left[mask] = None
    try:
        replay = Replay(attrs.evolve(call, arguments=copy.deepcopy(left)))
    except UnsupportedModelError:
        # it is never called without a mask
        return False
    other = call.hidden.clone()
    other[:, -1] += noise(other[:, -1])
    moved = replay.run(hidden=other).result
    return same(moved[:, :-1], replay.base.result[:, :-1])
