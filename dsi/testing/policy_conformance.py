"""The kit as a pytest class: one test for each check.

class TestMine(PolicyConformance):
    policy = MINE

    def tiny_config(self):
        return MineConfig(hidden_size=32, num_hidden_layers=2, ...)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import attrs
import pytest

from dsi.policy import Check, Policy
from dsi.registry import Registry
from dsi.testing.report import Outcome, Report, Row
from dsi.testing.runner import Expectations, checks_of, run_check
from dsi.testing.subject import Subject


@attrs.define(eq=False)
class _Run:
    """The checks of one class as they are run."""

    subject: Subject
    expected: Expectations
    rows: list[Row] = attrs.field(factory=list)
    absent: dict[str, str] = attrs.field(factory=dict)

    def report(self) -> Report:
        return Report(
            policy=self.subject.name,
            model=self.subject.model_class.__name__,
            rows=tuple(self.rows),
            absent=self.absent,
        )


class _Summaries:
    """A pytest plugin that ends the session with each class's counts."""

    NAME = "dsi-conformance"

    def __init__(self) -> None:
        self.lines: list[str] = []

    @classmethod
    def of(cls, config: pytest.Config) -> _Summaries:
        found = config.pluginmanager.get_plugin(cls.NAME)
        if not isinstance(found, cls):
            found = cls()
            config.pluginmanager.register(found, cls.NAME)
        return found

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("dsi conformance")
        for line in self.lines:
            terminalreporter.write_line(line)


class PolicyConformance:
    """Base of a conformance test; see the module.

    Attributes:
        policy: a policy, or the full name of a registered one.
        model_class: the transformers class to build, or its name; see `dsi.testing.Subject`.
        expected_failures: check -> why it fails. Strict: one that passes fails.
        tolerances: see `dsi.testing.subject.Tolerances`.
        require: "all" makes a check that is not run a failure.
        module: the plugin's module, where it cannot be found by the policy.
        model_inputs: a static method, (model, rows, length, seed) -> keyword arguments of its forward, where the kit
            cannot tell from the model what it reads.
    """

    policy: ClassVar[Policy | str]
    model_class: ClassVar[type | str | None] = None
    expected_failures: ClassVar[Mapping[str, str]] = MappingProxyType({})
    tolerances: ClassVar[Mapping[str, float]] = MappingProxyType({})
    require: ClassVar[Literal["run", "all"]] = "run"
    module: ClassVar[str] = ""
    model_inputs: ClassVar[Callable[[Any, int, int, int], Mapping[str, Any]] | None] = None

    def tiny_config(self) -> Any:
        """A small config of the architecture: two layers, fewer kv heads than heads, sizes that differ."""
        raise NotImplementedError(f"{type(self).__name__} needs tiny_config(); return a config of the architecture")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "policy"):
            # a base of the author's own
            return
        checks = checks_of(Registry.load())
        Expectations(failures=cls.expected_failures, require=cls.require).check_names(checks)
        for name, check in checks.items():
            method = f"test_{name.replace(':', '_').replace('-', '_')}"
            if method not in vars(cls):
                setattr(cls, method, _test(name, check))

    @pytest.fixture(scope="class")
    @classmethod
    def conformance_run(cls, request: pytest.FixtureRequest) -> Iterator[_Run]:
        """The subject that the tests of this class share."""
        run = _Run(
            Subject(
                cls.policy,
                cls().tiny_config,
                model_class=cls.model_class,
                module=cls.module,
                tolerances=cls.tolerances,
                inputs=cls.model_inputs,
            ),
            Expectations(failures=cls.expected_failures, require=cls.require),
        )
        yield run
        _Summaries.of(request.config).lines.append(f"{cls.__name__}: {run.report().last_line}")


def _test(name: str, check: Check) -> Callable[..., None]:
    def test(self: PolicyConformance, conformance_run: _Run) -> None:
        row = run_check(conformance_run.subject, name, check, conformance_run.expected)
        if isinstance(row, Outcome):
            conformance_run.absent[name] = row.what
            pytest.skip(f"does not apply: {row.what}")
        conformance_run.rows.append(row)
        _tell(row)

    test.__name__ = test.__qualname__ = f"test_{name}"
    test.__doc__ = f"The check {name} of the conformance kit."
    return test


def _tell(row: Row) -> None:
    """A row in pytest's terms."""
    if row.status == "not-run":
        pytest.skip(f"not run: {row.what}")
    if row.status == "expected-fail":
        pytest.xfail(row.reason)
    if row.status == "fail":
        pytest.fail(
            f"{row.what}\n  measured: {row.measured or '-'}\n  allowed:  {row.allowed or '-'}\n  mend:     {row.mend}",
            pytrace=False,
        )
