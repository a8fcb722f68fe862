"""Running the checks: one after another over one subject, each with its row."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, Literal

import attrs

from dsi.errors import ConfigError, PluginError
from dsi.policy import Check, Policy
from dsi.registry import Registry
from dsi.testing.blind import blind_notes
from dsi.testing.report import Failed, Outcome, Report, Row, failed, not_run
from dsi.testing.subject import Subject, Unfit

OWN = "kit:"
"""The plugin that brings dsi's own checks; their names are shown without it."""
ROOT = "applies"
"""The check that fails where the policy cannot be applied; the others are not run then."""

_UNFIT = f"the policy cannot be applied, see {ROOT}"

CheckFunction = Callable[[Subject], Outcome]


def _read_only(mapping: Mapping[str, str]) -> Mapping[str, str]:
    return MappingProxyType(dict(mapping))


@attrs.frozen(kw_only=True)
class Expectations:
    """What an author says of the checks.

    Args:
        failures: check -> why it fails; a check that passes all the same fails for it.
        require: "run", or "all" to make a check that is not run a failure.
    """

    failures: Mapping[str, str] = attrs.field(converter=_read_only, factory=dict)
    require: Literal["run", "all"] = attrs.field(default="run")

    @failures.validator
    def _with_reasons(self, _attribute: attrs.Attribute[Any], value: Mapping[str, str]) -> None:
        empty = sorted(name for name, reason in value.items() if not (isinstance(reason, str) and reason.strip()))
        if empty:
            raise ValueError(f"expected_failures: {', '.join(empty)}: say why, for those who use the policy")

    @require.validator
    def _known(self, _attribute: attrs.Attribute[Any], value: str) -> None:
        if value not in ("run", "all"):
            raise ValueError(f"require={value!r}; use 'run' or 'all'")

    def check_names(self, known: Collection[str]) -> None:
        """Refuse a failure that is expected of no check.

        Raises:
            ConfigError: with the names of the checks that there are.
        """
        unknown = sorted(self.failures.keys() - set(known))
        if unknown:
            raise ConfigError([f"expected_failures: no check {', '.join(unknown)}; there are: {', '.join(known)}"])


def checks_of(registry: Registry) -> dict[str, Check]:
    """Every registered check by the name that reports show, dsi's own first.

    Raises:
        PluginError: there are none of dsi's own.
    """
    named = {full_name.removeprefix(OWN): check for full_name, check in registry.checks.items()}
    own = {name: check for name, check in named.items() if ":" not in name}
    if not own:
        record = next((one for one in registry.records if one.name == OWN[:-1]), None)
        why = "is not installed" if record is None else f"is {record.state}: {record.reason}"
        raise PluginError(f"there is nothing to check with: the plugin {OWN[:-1]} {why}")
    return own | named


def conformance(
    policy: Policy | str,
    tiny_config: Callable[[], Any],
    *,
    model_class: type | str | None = None,
    expected_failures: Mapping[str, str] | None = None,
    tolerances: Mapping[str, float] | None = None,
    require: Literal["run", "all"] = "run",
    only: Collection[str] | None = None,
    module: str = "",
    registry: Registry | None = None,
) -> Report:
    """Hold a policy to the conformance kit.

    Args:
        policy: a policy, or the full name of a registered one.
        tiny_config: gives a small config of the architecture, a new one each time.
        model_class, module, tolerances, registry: see `dsi.testing.Subject`.
        expected_failures: check -> why it fails. One that passes fails for it.
        require: "all" makes a check that is not run a failure.
        only: run these checks alone.

    Raises:
        ConfigError: an unknown check in `only` or `expected_failures`.
        ValueError: an unknown tolerance, or an expected failure without a reason.
        UnknownPolicyError: `policy` is no registered name.
        PluginError: the kit's own plugin is not loaded.
    """
    expected = Expectations(failures=expected_failures or {}, require=require)
    subject = Subject(
        policy, tiny_config, model_class=model_class, module=module, tolerances=tolerances, registry=registry
    )
    checks = checks_of(subject.registry)
    expected.check_names(checks)
    unknown = sorted(set(only or ()) - checks.keys())
    if unknown:
        raise ConfigError([f"only: no check {', '.join(unknown)}; there are: {', '.join(checks)}"])
    chosen = [name for name in checks if only is None or name in only]
    return run_checks(subject, {name: checks[name] for name in chosen}, expected)


def run_checks(subject: Subject, checks: Mapping[str, Check], expected: Expectations) -> Report:
    """The report of some checks over one subject."""
    rows: list[Row] = []
    left: dict[str, str] = {}
    for name, check in checks.items():
        row = run_check(subject, name, check, expected)
        if isinstance(row, Outcome):
            left[name] = row.what
        else:
            rows.append(row)
    return Report(policy=subject.name, model=subject.model_class.__name__, rows=tuple(rows), absent=left)


def run_check(subject: Subject, name: str, check: Check, expected: Expectations) -> Row | Outcome:
    """The row of one check, or its outcome where it does not apply."""
    start = time.perf_counter()
    outcome = _outcome(subject, name, check)
    seconds = time.perf_counter() - start
    if outcome.status == "absent":
        return outcome
    row = Row(
        check=name,
        status=outcome.status,
        what=outcome.what,
        measured=outcome.measured,
        allowed=outcome.allowed,
        mend=outcome.mend,
        seconds=seconds,
        blind=() if subject.fault else blind_notes(subject, name),
    )
    return _judged(row, expected)


def _judged(row: Row, expected: Expectations) -> Row:
    reason = expected.failures.get(row.check, "")
    if row.status == "not-run" and expected.require == "all":
        mend = "run the kit where it can be run, or without require='all'"
        return attrs.evolve(row, status="fail", what=f"not run: {row.what}", mend=mend)
    if not reason or row.status == "not-run":
        return row
    if row.status == "fail":
        return attrs.evolve(row, status="expected-fail", reason=reason)
    return attrs.evolve(
        row, status="fail", what=f"passes, and was expected to fail: {reason}", mend="take it out of expected_failures"
    )


def _outcome(subject: Subject, name: str, check: Check) -> Outcome:
    try:
        return _function(check)(subject)
    except Failed as failure:
        return failure.outcome
    except Unfit:
        return not_run(_UNFIT)
    # whatever a policy's container raises is what the check found
    except Exception as error:  # noqa: BLE001
        if name != ROOT and subject.fault:
            return not_run(_UNFIT)
        return failed(
            f"raised {type(error).__name__}: {' '.join(str(error).split())[:400]}",
            measured=type(error).__name__,
            allowed="no error",
            mend="the error above comes out of a call that works on the stock model",
        )


def _function(check: Check) -> CheckFunction:
    module, _, name = check.impl.partition(":")
    function: CheckFunction = getattr(importlib.import_module(module), name)
    return function
