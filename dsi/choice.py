"""The choice among the policies that claim one layer class: a `Choice`, with a reason for everyone it passed over.

The stages, in order; each takes candidates out and says why:

    explicit   the policy that the user named, if they named one
    requires   an unmet requirement
    supports   a refusal of this config
    replaces   another candidate that is left names it in `replaces`
    priority   a higher priority is left; or it would outrank a built-in that it does not name in `replaces`

Two candidates left are an error that prints the line that settles it. Order of loading decides nothing.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, Literal

import attrs
from packaging.requirements import Requirement

from dsi.errors import AmbiguousPolicyError
from dsi.policy import Block, Policy, Refusal

logger = logging.getLogger(__name__)

Stage = Literal["explicit", "requires", "supports", "replaces", "priority"]


@attrs.frozen(kw_only=True)
class Candidate:
    """A policy that has a block for the layer class."""

    full_name: str
    policy: Policy
    block: Block
    built_in: bool


@attrs.frozen(kw_only=True)
class Rejected:
    """A candidate that was passed over: at which stage, why, and what would do."""

    full_name: str
    stage: Stage
    reason: str
    hint: str = ""


@attrs.frozen(kw_only=True)
class Choice:
    """The policy and block for one layer class; `None` and "" where there is none."""

    policy: Policy | None = None
    block: Block | None = None
    full_name: str = ""
    rejected: tuple[Rejected, ...] = ()


Guard = Callable[[], list[str]]
"""What has been changed that should not have been, in words; called after each question, it also puts it back."""


def choose(
    layer_class: str,
    candidates: Sequence[Candidate],
    config: Any,
    *,
    explicit: str = "",
    guard: Guard | None = None,
) -> Choice:
    """The one candidate that the stages leave.

    Args:
        layer_class: "module:Class", for messages.
        candidates: in any order.
        config: what `supports` reads.
        explicit: the full name that the user gave; "" for none.
        guard: asked after each `supports`; a policy after which it finds a change is refused.

    Raises:
        AmbiguousPolicyError: several are left, or all replace one another.
    """
    left = sorted(candidates, key=lambda one: one.full_name)
    rejected: list[Rejected] = []
    for stage in (_named(explicit), _requires, _supports(config, guard), _replaces, _outranking, _outranked):
        out = stage(left)
        if out and len(out) == len(left) and stage is _replaces:
            raise AmbiguousPolicyError(_tie(layer_class, left, "replace one another"))
        gone = {one.full_name for one in out}
        left = [one for one in left if one.full_name not in gone]
        rejected += out
    if len(left) > 1:
        raise AmbiguousPolicyError(_tie(layer_class, left, f"all apply with priority {left[0].policy.priority}"))
    if not left:
        return Choice(rejected=tuple(rejected))
    return Choice(policy=left[0].policy, block=left[0].block, full_name=left[0].full_name, rejected=tuple(rejected))


_Stage = Callable[[Sequence[Candidate]], list[Rejected]]


def _tie(layer_class: str, tied: Sequence[Candidate], what: str) -> str:
    names = ", ".join(one.full_name for one in tied)
    lines = " or ".join(f'injection_policy="{one.full_name}"' for one in tied)
    return f"{layer_class}: {names} {what}; settle it with {lines}"


def _named(explicit: str) -> _Stage:
    def stage(candidates: Sequence[Candidate]) -> list[Rejected]:
        return [
            Rejected(full_name=one.full_name, stage="explicit", reason=f"injection_policy asks for {explicit}")
            for one in candidates
            if explicit and one.full_name != explicit
        ]

    return stage


def _requires(candidates: Sequence[Candidate]) -> list[Rejected]:
    return [
        Rejected(full_name=one.full_name, stage="requires", reason=reason, hint=f"pip install {requirement!r}")
        for one in candidates
        for requirement in one.policy.requires
        if (reason := _unmet(requirement))
    ]


def _unmet(text: str) -> str:
    requirement = Requirement(text)
    if requirement.marker is not None and not requirement.marker.evaluate():
        return ""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{text} is not installed"
    # a development version of a release that would do, does
    return "" if requirement.specifier.contains(version, prereleases=True) else f"{text} is unmet by {version}"


def _supports(config: Any, guard: Guard | None) -> _Stage:
    def stage(candidates: Sequence[Candidate]) -> list[Rejected]:
        refusals = [(one, _guarded(one, config, guard)) for one in candidates]
        return [
            Rejected(full_name=one.full_name, stage="supports", reason=refusal.reason, hint=refusal.hint)
            for one, refusal in refusals
            if refusal is not None
        ]

    return stage


_REPORT = "report it to the policy's author"


def _guarded(candidate: Candidate, config: Any, guard: Guard | None) -> Refusal | None:
    refusal = _refusal(candidate, config)
    if guard is not None and (changes := guard()):
        return Refusal(reason=f"supports() changed the model ({', '.join(changes[:5])})", hint=_REPORT)
    return refusal


def _refusal(candidate: Candidate, config: Any) -> Refusal | None:
    """What `supports` answers to a copy of the config, so that whatever it does to it harms nobody."""
    try:
        shown = copy.deepcopy(config)
    except Exception as error:
        logger.debug("no copy of the config", exc_info=True)
        return Refusal(reason=f"the config cannot be copied: {type(error).__name__}: {error}")
    try:
        answer = candidate.policy.supports(shown)
    except AttributeError as error:
        if error.name and error.obj is shown:
            return Refusal(reason=f"config has no attribute {error.name!r}")
        return Refusal(reason=f"supports() raised AttributeError: {error}", hint=_REPORT)
    # also SystemExit: a question ends no host
    except (Exception, SystemExit) as error:
        logger.debug("supports() of %s", candidate.full_name, exc_info=True)
        return Refusal(reason=f"supports() raised {type(error).__name__}: {error}", hint=_REPORT)
    if answer is not None and not isinstance(answer, Refusal):
        return Refusal(reason=f"supports() returned {answer!r}, which is no Refusal and not None", hint=_REPORT)
    if changed := _changed(config, shown):
        return Refusal(
            reason=f"supports() changed the config ({', '.join(changed)}); it may only read it", hint=_REPORT
        )
    return answer


def _changed(config: Any, shown: Any) -> list[str]:
    """Names of the attributes in which a copy of the config is no longer what it was."""
    before, after = (getattr(one, "__dict__", {}) for one in (config, shown))
    gone = object()
    names = sorted(before.keys() | after.keys())
    return [name for name in names if _plain(before.get(name, gone)) != _plain(after.get(name, gone))]


def _plain(value: Any) -> Any:
    """`value` in a form that tells two apart: configs inside configs compare by what they hold."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return type(value).__name__, sorted(map(repr, value))
    if isinstance(value, list | tuple):
        return type(value).__name__, [_plain(item) for item in value]
    held = getattr(value, "__dict__", None)
    if isinstance(held, dict) and not isinstance(value, type) and not callable(value):
        return type(value).__qualname__, {key: _plain(item) for key, item in held.items()}
    # the copy of an object has another address
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _replaces(candidates: Sequence[Candidate]) -> list[Rejected]:
    out = []
    for one in candidates:
        by = [other.full_name for other in candidates if other is not one and one.full_name in other.policy.replaces]
        if by:
            out.append(Rejected(full_name=one.full_name, stage="replaces", reason=f"replaced by {', '.join(by)}"))
    return out


def _outranking(candidates: Sequence[Candidate]) -> list[Rejected]:
    built_in = [one for one in candidates if one.built_in]
    out = []
    for one in candidates:
        below = [b for b in built_in if not one.built_in and one.policy.priority > b.policy.priority]
        if below:
            reason = f"priority {one.policy.priority} does not outrank the built-in {below[0].full_name} by itself"
            hint = f'add replaces=("{below[0].full_name}",) to the policy'
            out.append(Rejected(full_name=one.full_name, stage="priority", reason=reason, hint=hint))
    return out


def _outranked(candidates: Sequence[Candidate]) -> list[Rejected]:
    best = max(candidates, key=lambda one: one.policy.priority, default=None)
    return [
        Rejected(
            full_name=one.full_name,
            stage="priority",
            reason=f"priority {one.policy.priority} is below {best.policy.priority} of {best.full_name}",
        )
        for one in candidates
        if best is not None and one.policy.priority < best.policy.priority
    ]
