"""What checks cannot see on the configuration that they were given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import attrs

from dsi.plans import BlockPlan
from dsi.policy import Config, Keep, Norm
from dsi.testing.subject import Subject

_NUMBERS = ("numerics_fp32", "decode_equals_full")


@attrs.frozen
class _Blindness:
    """A note, the checks it belongs to, and whether it holds for a subject and one of its blocks."""

    note: str
    checks: tuple[str, ...]
    holds: Callable[[Subject, BlockPlan], bool]


def blind_notes(subject: Subject, check: str) -> tuple[str, ...]:
    """What one check cannot see."""
    blocks = subject.plan.blocks[:1]
    return tuple(
        one.note for one in _BLINDNESSES if check in one.checks and any(one.holds(subject, block) for block in blocks)
    )


def _one_kind_of_head(subject: Subject, block: BlockPlan) -> bool:
    """The architecture could have fewer kv heads than heads, and has not."""
    source = block.block.facts.get("kv_heads")
    heads, kv_heads = block.fit.facts.get("heads"), block.fit.facts.get("kv_heads")
    return heads is not None and heads == kv_heads and source != block.block.facts.get("heads")


def _square_heads(subject: Subject, block: BlockPlan) -> bool:
    heads, width = block.fit.facts.get("heads"), block.fit.facts.get("head_dim")
    hidden = getattr(block.fit.config, "hidden_size", None)
    free = hasattr(block.fit.config, "head_dim")
    return free and None not in (heads, width, hidden) and heads * width == hidden  # type: ignore[operator]


def _without_biases(subject: Subject, block: BlockPlan) -> bool:
    """The config can switch biases on, and every one of them is off."""
    switches = {name: value for name, value in vars(block.fit.config).items() if "bias" in name}
    return bool(switches) and not any(switches.values()) and not any(_biases(subject, block))


def _biases(subject: Subject, block: BlockPlan) -> Iterator[bool]:
    layer = subject.stock().get_submodule(block.path)
    for slot in block.block.slots.values():
        if not isinstance(slot, Norm | Keep):
            yield from (layer.get_submodule(path).bias is not None for path in slot.sources())


def _common_width(subject: Subject, block: BlockPlan) -> bool:
    inner, hidden = _config_sizes(block.fit.config)
    return inner is not None and inner in (hidden, 4 * hidden)


def _config_sizes(config: Any) -> tuple[int | None, int]:
    names = ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "ffn_hidden_size")
    inner = next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)
    return inner, int(getattr(config, "hidden_size", 0))


def _one_layer(subject: Subject, block: BlockPlan) -> bool:
    return len(subject.plan.blocks) < 2


def _other_classes(subject: Subject, block: BlockPlan) -> bool:
    return {one.original for one in subject.plan.blocks} != {one.layer for one in subject.policy.blocks}


def _short_window(subject: Subject, block: BlockPlan) -> bool:
    """The architecture has windows, and this config none."""
    config = block.fit.config
    return "sliding_window" in vars(config) and not config.sliding_window


def _no_kernel_scale(subject: Subject, block: BlockPlan) -> bool:
    """The scale is what everyone assumes, and the config could say otherwise."""
    source = block.block.facts.get("scale")
    width, scale = block.fit.facts.get("head_dim"), block.fit.facts.get("scale")
    named = isinstance(source, Config) or "query_pre_attn_scalar" in vars(block.fit.config)
    return named and width is not None and scale is not None and abs(scale - width**-0.5) < 1e-9


_BLINDNESSES = (
    _Blindness(
        "as many kv heads as heads: a wrong kv group cannot show; set fewer",
        (*_NUMBERS, "tp_shards_reassemble", "tp_equals_single"),
        _one_kind_of_head,
    ),
    _Blindness(
        "heads * head_dim is hidden_size: one taken for the other cannot show; set another head_dim",
        _NUMBERS,
        _square_heads,
    ),
    _Blindness(
        "every bias is off: a lost one cannot show; switch them on, or run the kit twice",
        (*_NUMBERS, "parameters_once", "tp_equals_single"),
        _without_biases,
    ),
    _Blindness(
        "the inner size is hidden_size or four times that: a size that is assumed cannot show; set another",
        ("numerics_fp32", "plan_is_true"),
        _common_width,
    ),
    _Blindness(
        "one layer: layers that are swapped or share a cache cannot show; set two or more",
        (*_NUMBERS, "plan_is_true", "hidden_states"),
        _one_layer,
    ),
    _Blindness(
        "some layer classes of the policy are not in this model; run the kit on one that has them",
        ("applies",),
        _other_classes,
    ),
    _Blindness(
        "no sliding window is set: one that is ignored cannot show; set one of a few tokens",
        (*_NUMBERS, "chunked_prefill"),
        _short_window,
    ),
    _Blindness(
        "the scale is head_dim ** -0.5: one that is assumed cannot show; set another",
        _NUMBERS,
        _no_kernel_scale,
    ),
)

NOTES = MappingProxyType({one.holds.__name__.strip("_"): one.note for one in _BLINDNESSES})
