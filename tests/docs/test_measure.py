"""What benchmarks/measure.py reports, refuses, and keeps where a run is cut short."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch


@pytest.fixture
def measure(root, monkeypatch):
    monkeypatch.syspath_prepend(root / "benchmarks")
    spec = importlib.util.spec_from_file_location("benchmarks_measure", root / "benchmarks" / "measure.py")
    found = importlib.util.module_from_spec(spec)
    # attrs looks its classes' module up
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    yield found
    del sys.modules[spec.name]


def _result(measure, name, ours=2.0):
    times = {"dsi": measure.Sample.of([ours]), "stock": measure.Sample.of([6.0])}
    goals = (measure.Goal(name="share", found=0.9, bar=0.88), measure.Goal(name="ms", found=ours, bar=1, at_most=True))
    return measure.Result(name=name, unit="ms", times=times, bars={"stock": 2.5}, check={}, goals=goals)


def test_bars_and_goals(measure):
    told = _result(measure, "case").to_dict()
    assert told["met"] == {"stock": True}
    assert [goal["met"] for goal in told["goals"]] == [True, False]


def test_what_is_wrong_is_refused_and_costs_nobody_else(measure, tmp_path, capsys):
    out = tmp_path / "out.json"

    def wrong():
        exact = torch.ones(4)
        measure.check_rms("wrong", exact, exact + 0.01, exact + 0.013)
        return _result(measure, "wrong")

    def broken():
        # what came before is on disk by now
        assert [one["name"] for one in json.loads(out.read_text())["results"]] == ["first"]
        raise ZeroDivisionError("no")

    cases = {"first": lambda: _result(measure, "first"), "wrong": wrong, "broken": broken}
    cases["last"] = lambda: _result(measure, "last")
    assert measure.run(cases, ceilings={"GB/s": 1.0}, out=out) == 1
    document = json.loads(out.read_text())
    assert [one["name"] for one in document["results"]] == ["first", "last"]
    assert "stock's own is" in document["refused"]["wrong"]
    assert document["refused"]["broken"] == "broken: ZeroDivisionError: no"
    assert "REFUSED" in capsys.readouterr().out


def test_an_error_within_the_allowance_passes(measure):
    exact = torch.ones(4)
    found = measure.check_rms("case", exact, exact + 0.01, exact + 0.0119)
    assert found["ratio"] == pytest.approx(1.19, rel=1e-3)


def test_a_budget_that_is_spent_skips(measure, tmp_path):
    out = tmp_path / "out.json"
    assert measure.run({"case": lambda: _result(measure, "case")}, ceilings={}, out=out, budget=-1) == 0
    document = json.loads(out.read_text())
    assert (document["results"], document["skipped"]) == ([], ["case"])


def test_a_token_is_what_many_cost_beyond_one(measure, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def write(count):
        # 5 s for the prompt, 0.25 s a token
        clock[0] += 5 + 0.25 * count

    writers = {
        "dsi": measure.Writer(write=write, long=9, rounds=3),
        "slow": measure.Writer(write=write, long=3, rounds=1),
    }
    times = measure.token_times(writers, sync=lambda: None)
    assert (times["dsi"].median, times["slow"].median) == (250.0, 250.0)


def _run(measure, out, names, **options):
    report = measure.Report(ceilings={"GB/s": 1.0}, out=out, keep=True)
    cases = [measure.Case(name=name, call=call, report=report) for name, call in names.items()]
    return measure.run_all(cases, **options), json.loads(out.read_text())


def test_a_later_run_replaces_its_own_cases_alone(measure, tmp_path, monkeypatch):
    monkeypatch.setenv("DSI_COMMIT", "first")
    out = tmp_path / "table.json"

    def refuse():
        raise measure.Refused("wrong")

    first = {"a": lambda: _result(measure, "a 1x8"), "b": lambda: _result(measure, "b"), "c": refuse}
    _run(measure, out, first)
    _run(measure, out, {"d": refuse}, budget=-1)
    monkeypatch.setenv("DSI_COMMIT", "second")
    status, found = _run(measure, out, {"b": refuse, "a": lambda: _result(measure, "a 1x8", 3.0)})
    assert status == 1
    assert [(kept["case"], kept["times"]["dsi"]["median"], kept["run"]["commit"]) for kept in found["results"]] == [
        ("a", 3.0, "second")
    ]
    assert set(found["refused"]) == {"b", "c"}
    assert found["skipped"] == ["d"]
    _, found = _run(measure, out, {"d": lambda: _result(measure, "d")})
    assert [kept["run"]["commit"] for kept in found["results"]] == ["second", "second"]
    assert found["skipped"] == []


def test_a_run_that_is_stopped_reports_what_it_had(measure, tmp_path, capsys):
    def stop():
        raise measure.Stopped

    names = {"a": lambda: _result(measure, "a"), "b": stop, "c": lambda: _result(measure, "c")}
    status, found = _run(measure, tmp_path / "table.json", names)
    assert status == 0
    assert [kept["case"] for kept in found["results"]] == ["a"]
    assert found["skipped"] == ["b", "c"]
    assert "no time was left for: b, c" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("only", "wanted"),
    [(None, ["a 1", "a 2", "b 1"]), (["b", "a 2", "a"], ["b 1", "a 2", "a 1"]), (["a 2"], ["a 2"]), (["c"], [])],
)
def test_cases_run_in_the_order_asked_for(measure, only, wanted):
    report = measure.Report(ceilings={}, out=None)
    cases = [measure.Case(name=name, call=lambda: None, report=report) for name in ("a 1", "b 1", "a 2")]
    assert [case.name for case in measure.ordered(cases, only)] == wanted
