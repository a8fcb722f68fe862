"""What a check found, and the table of all of them.

A row is "pass", "fail", "expected-fail" (the author said so, with a reason) or "not-run"; what did not run never counts
as green. Checks that a policy's kind has no use for (decoding, for an encoder) are named below the table and not
counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

import attrs

Status = Literal["pass", "fail", "expected-fail", "not-run"]
STATUSES: tuple[Status, ...] = ("pass", "fail", "expected-fail", "not-run")


@attrs.frozen(kw_only=True)
class Outcome:
    """What one check found.

    Args:
        status: "pass", "fail", "not-run" (something is missing here), or "absent" (policies of this kind have no use
            for it).
        what: what was compared; for the last two, why.
        measured, allowed: in words, e.g. "3.1e-07" and "1e-05".
        mend: how to mend a failure.
    """

    status: Literal["pass", "fail", "not-run", "absent"]
    what: str
    measured: str = ""
    allowed: str = ""
    mend: str = ""


def passed(what: str, *, measured: object = "", allowed: object = "") -> Outcome:
    """A check that holds."""
    return Outcome(status="pass", what=what, measured=number(measured), allowed=number(allowed))


def failed(what: str, *, mend: str, measured: object = "", allowed: object = "") -> Outcome:
    """A check that does not hold, and how to mend it."""
    return Outcome(status="fail", what=what, measured=number(measured), allowed=number(allowed), mend=mend)


def not_run(reason: str) -> Outcome:
    """A check that cannot run here; it never counts as green."""
    return Outcome(status="not-run", what=reason)


def absent(reason: str) -> Outcome:
    """A check that policies of this kind have no use for."""
    return Outcome(status="absent", what=reason)


def number(value: object) -> str:
    """A measurement as text; floats with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class Failed(Exception):
    """Raised inside a check, from however deep, to end it as failed."""

    def __init__(self, what: str, *, mend: str, measured: object = "", allowed: object = "") -> None:
        super().__init__(what)
        self.outcome = failed(what, mend=mend, measured=measured, allowed=allowed)


@attrs.frozen(kw_only=True)
class Row:
    """One line of a report.

    Args:
        check: its name; a plugin's check has the plugin's name and a colon in front.
        status: see the module.
        what, measured, allowed, mend: of the `Outcome`.
        reason: the author's, for an expected failure.
        blind: what this check cannot see on the configuration that it was given.
        seconds: it took.
    """

    check: str
    status: Status
    what: str
    measured: str = ""
    allowed: str = ""
    mend: str = ""
    reason: str = ""
    blind: tuple[str, ...] = ()
    seconds: float = 0.0


def _read_only(mapping: Mapping[str, str]) -> Mapping[str, str]:
    return MappingProxyType(dict(mapping))


@attrs.frozen(kw_only=True)
class Report:
    """What the kit found out about one policy; `print` it for the table.

    Args:
        policy: its name.
        model: the class that it was tried on.
        rows: one for each check that applies.
        absent: check -> why it does not apply.
    """

    policy: str
    model: str
    rows: tuple[Row, ...]
    absent: Mapping[str, str] = attrs.field(converter=_read_only, factory=dict)

    @property
    def ok(self) -> bool:
        """Nothing failed, and something ran."""
        return any(row.status == "pass" for row in self.rows) and all(row.status != "fail" for row in self.rows)

    def counts(self) -> dict[Status, int]:
        """How many rows have each status."""
        return {status: sum(row.status == status for row in self.rows) for status in STATUSES}

    def row(self, check: str) -> Row:
        """The row of one check.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if row.check == check:
                return row
        raise KeyError(check)

    @property
    def last_line(self) -> str:
        """ "31 checks: 27 pass, 1 expected-fail, 3 not-run (no CUDA)"."""
        parts = [f"{count} {status}" for status, count in self.counts().items() if count]
        reasons = dict.fromkeys(row.what for row in self.rows if row.status == "not-run")
        said = f" ({'; '.join(reasons)})" if reasons else ""
        return f"{len(self.rows)} checks: {', '.join(parts)}{said}"

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.policy} on {self.model}"
        width = max((len(row.check) for row in self.rows), default=0)
        for row in self.rows:
            figures = f"  {row.measured} of {row.allowed}" if row.allowed else ""
            yield f"  {row.check.ljust(width)}  {row.status:<13} {row.seconds:5.2f}s  {row.what}{figures}"
            if row.reason:
                yield f"      expected: {row.reason}"
            if row.mend and row.status != "pass":
                yield f"      measured: {row.measured or '-'}; allowed: {row.allowed or '-'}"
                yield f"      mend: {row.mend}"
        for note, checks in self._blind().items():
            yield f"  blind: {note} ({', '.join(checks)})"
        for reason, checks in self._absent().items():
            yield f"  does not apply: {', '.join(checks)} ({reason})"
        yield self.last_line

    def _blind(self) -> dict[str, list[str]]:
        notes: dict[str, list[str]] = {}
        for row in self.rows:
            for note in row.blind:
                notes.setdefault(note, []).append(row.check)
        return notes

    def _absent(self) -> dict[str, list[str]]:
        reasons: dict[str, list[str]] = {}
        for check, reason in self.absent.items():
            reasons.setdefault(reason, []).append(check)
        return reasons

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        return {
            "policy": self.policy,
            "model": self.model,
            "ok": self.ok,
            "counts": self.counts(),
            "rows": [attrs.asdict(row) for row in self.rows],
            "absent": dict(self.absent),
            "summary": self.last_line,
        }
