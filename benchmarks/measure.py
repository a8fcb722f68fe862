"""Interleaved timing, comparison and reporting, shared by the benchmarks.

A result exists only if its check is green: a case raises `Refused` before it measures anything where dsi's numbers are
wrong.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs
import torch
from documents import merged
from torch import Tensor

FP32_TOLERANCE = 1e-5
# our error against float32, as a share of the original's own
HALF_TOLERANCE = 1.2


class Refused(Exception):
    """A correctness check is red, so there is nothing to report."""


@attrs.frozen(kw_only=True)
class Sample:
    """Times of one contender in milliseconds: the median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Sample:
        if len(milliseconds) < 2:
            return cls(median=milliseconds[0], low=milliseconds[0], high=milliseconds[0])
        low, median, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
        return cls(median=median, low=low, high=high)


@attrs.frozen(kw_only=True)
class Goal:
    """One bar of a case, and what was found.

    Args:
        name: what is judged, e.g. "share of the floor".
        found: the measured value.
        bar: what it must reach.
        at_most: the bar is an upper one.
    """

    name: str
    found: float
    bar: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.found <= self.bar if self.at_most else self.found >= self.bar

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        return f"{self.name} {self.found:.4g} ({sign} {self.bar:g}: {'met' if self.met else 'NOT MET'})"


@attrs.frozen(kw_only=True)
class Result:
    """One line of the table.

    Args:
        name: what was measured, e.g. "bert-base fp32 1x128".
        unit: of the times, "ms" or "ms/token".
        times: contender -> its times; "dsi" is ours, all others are bars' references.
        bars: contender -> how many times as fast dsi must be.
        check: what was compared before anything was measured, and how it came out.
        ceiling: what the time means beside what this machine can do, e.g. {"GFLOP/s": 180, "of peak": 0.9}.
        goals: bars that are no ratio to a contender.
        facts: how it was measured, and what was seen on the way.
    """

    name: str
    unit: str
    times: Mapping[str, Sample]
    bars: Mapping[str, float]
    check: Mapping[str, Any]
    ceiling: Mapping[str, float] = attrs.field(factory=dict)
    goals: tuple[Goal, ...] = ()
    facts: Mapping[str, Any] = attrs.field(factory=dict)

    @property
    def ratios(self) -> dict[str, float]:
        """How many times as fast as each other contender dsi is."""
        ours = self.times["dsi"].median
        return {name: sample.median / ours for name, sample in self.times.items() if name != "dsi"}

    @property
    def met(self) -> dict[str, bool]:
        """Whether each bar is reached."""
        return {name: self.ratios[name] >= bar for name, bar in self.bars.items()}

    def to_dict(self) -> dict[str, Any]:
        goals = [{**attrs.asdict(goal), "met": goal.met} for goal in self.goals]
        return {**attrs.asdict(self), "ratios": self.ratios, "met": self.met, "goals": goals}


# --- timing -------------------------------------------------------------------------------------------------------


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    budget: float = 60.0,
    sync: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Milliseconds of every round of each contender, all in turns, so that they meet the same machine.

    Args:
        contenders: name -> what is timed.
        rounds: kept rounds.
        warmup: rounds before those, not kept.
        budget: seconds after which no further round starts, once three are kept; for slow and busy machines.
        sync: waits until a device has finished; called before each clock is read.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    deadline = time.perf_counter() + budget
    for round_ in range(warmup + rounds):
        if round_ >= warmup + 3 and time.perf_counter() > deadline:
            break
        for name, function in contenders.items():
            sync()
            start = time.perf_counter()
            function()
            sync()
            elapsed = 1e3 * (time.perf_counter() - start)
            if round_ >= warmup:
                times[name].append(elapsed)
    return times


def per_token(
    generators: Mapping[str, Callable[[int], object]],
    *,
    short: int,
    long: int,
    rounds: int,
    sync: Callable[[], object] = lambda: None,
) -> dict[str, Sample]:
    """Milliseconds a decoded token: the difference of two lengths, in which prefill and set-up cancel out.

    Args:
        generators: name -> function of the number of new tokens.
        short, long: the two numbers of new tokens.
        rounds: kept rounds.
        sync: see `interleaved`.
    """
    contenders = {
        (name, length): lambda generate=generate, length=length: generate(length)
        for name, generate in generators.items()
        for length in (short, long)
    }
    times = interleaved(contenders, rounds=rounds, warmup=1, sync=sync)
    return {
        name: Sample.of([(b - a) / (long - short) for a, b in zip(times[name, short], times[name, long], strict=True)])
        for name in generators
    }


@attrs.frozen(kw_only=True)
class Writer:
    """A contender that writes text.

    Args:
        write: function of the number of new tokens.
        long: how many it writes when it is timed.
        rounds: how often.
    """

    write: Callable[[int], object]
    long: int
    rounds: int


def token_times(writers: Mapping[str, Writer], *, sync: Callable[[], object]) -> dict[str, Sample]:
    """Milliseconds a token after the first: what `long` tokens take beyond what one takes, in turns.

    Slow writers write fewer tokens, and less often: their rounds are the first ones.
    """
    times: dict[str, list[float]] = {name: [] for name in writers}
    for writer in writers.values():
        writer.write(writer.long)
        writer.write(1)
    for turn in range(max(writer.rounds for writer in writers.values())):
        for name, writer in writers.items():
            if turn < writer.rounds:
                whole, first = (_timed(writer.write, count, sync) for count in (writer.long, 1))
                times[name].append((whole - first) / (writer.long - 1))
    return {name: Sample.of(values) for name, values in times.items()}


def _timed(write: Callable[[int], object], count: int, sync: Callable[[], object]) -> float:
    sync()
    start = time.perf_counter()
    write(count)
    sync()
    return 1e3 * (time.perf_counter() - start)


# --- comparing ----------------------------------------------------------------------------------------------------


def relative_error(reference: Tensor, ours: Tensor) -> float:
    """The largest absolute difference over the largest magnitude of the reference, computed in float64."""
    exact = reference.double()
    return ((ours.double() - exact).abs().max() / exact.abs().max()).item()


def check_fp32(name: str, stock: Tensor, ours: Tensor) -> dict[str, float]:
    """The error of ours against stock; refused above 1e-5."""
    error = relative_error(stock, ours)
    if not error <= FP32_TOLERANCE:
        raise Refused(f"{name}: relative error {error:.2e}, allowed {FP32_TOLERANCE:.0e}")
    return {"relative_error": error, "allowed": FP32_TOLERANCE}


def check_half(name: str, reference: Tensor, stock: Tensor, ours: Tensor) -> dict[str, float]:
    """Our error against a float32 reference beside stock's own; refused above 1.2 times that."""
    theirs, mine = relative_error(reference, stock), relative_error(reference, ours)
    if not mine <= HALF_TOLERANCE * theirs:
        raise Refused(f"{name}: error {mine:.2e} against fp32, stock's own is {theirs:.2e}, allowed {HALF_TOLERANCE}x")
    return {"error": mine, "stock_error": theirs, "ratio": mine / theirs, "allowed": HALF_TOLERANCE}


def rms_error(reference: Tensor, ours: Tensor) -> float:
    """The norm of the difference over the norm of the reference, in float64."""
    exact = reference.double()
    return float((ours.double() - exact).norm() / exact.norm())


def check_rms(name: str, reference: Tensor, stock: Tensor, ours: Tensor) -> dict[str, float]:
    """As `check_half`, by the norm of all differences: what is wrong by chance at one place does not decide."""
    theirs, mine = rms_error(reference, stock), rms_error(reference, ours)
    if not mine <= HALF_TOLERANCE * theirs:
        raise Refused(f"{name}: error {mine:.2e} against fp32, stock's own is {theirs:.2e}, allowed {HALF_TOLERANCE}x")
    return {"rms_error": mine, "stock_rms_error": theirs, "ratio": mine / theirs, "allowed": HALF_TOLERANCE}


def check_tokens(name: str, stock: Tensor, ours: Tensor) -> dict[str, bool]:
    """Whether the two wrote the same tokens; refused where they did not."""
    if not torch.equal(stock, ours):
        first = (stock != ours).any(0).nonzero()[0].item() if stock.shape == ours.shape else "the shape"
        raise Refused(f"{name}: tokens differ from stock's, first at {first}")
    return {"tokens_equal": True}


# --- reporting ----------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Versions and hardware, as they go into the JSON."""
    packages = ("torch", "transformers", "triton", "dsi")
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "cpu": _cpu_model(),
        "flags": _cpu_flags(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "gpu": _gpu() if torch.cuda.is_available() else None,
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """What was measured: of DSI_COMMIT where the tree was carried without its history."""
    if known := os.environ.get("DSI_COMMIT"):
        return known
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _cpu_model() -> str:
    names = [line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _cpu_flags() -> list[str]:
    wanted = {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_bf16", "amx_int8", "amx_tile"}
    found = {flag for line in _cpu_lines() if line.startswith("flags") for flag in line.split()}
    return sorted(wanted & found)


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_GiB": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


def table(results: Iterable[Result]) -> str:
    """The results as text, one line a contender."""
    lines = [f"{'':34} {'':18} {'median':>9} {'quartiles':>19}  {'unit':8}"]
    for result in results:
        lines.extend(_lines(result))
        lines.append("")
    return "\n".join(lines)


def _lines(result: Result) -> list[str]:
    lines = []
    for place, (contender, sample) in enumerate(result.times.items()):
        lines.append(
            f"{result.name if place == 0 else '':34} {contender:18} {sample.median:9.3f} "
            f"{sample.low:9.3f}-{sample.high:9.3f}  {result.unit:8}"
        )
    return [*lines, f"{'':34} {_verdict(result)}"]


def _verdict(result: Result) -> str:
    verdicts = [str(goal) for goal in result.goals]
    for name, ratio in result.ratios.items():
        bar = result.bars.get(name)
        judged = "" if bar is None else f" (bar {bar:.2f}: {'met' if ratio >= bar else 'NOT MET'})"
        verdicts.append(f"{ratio:.2f} times as fast as {name}{judged}")
    return "; ".join([*verdicts, *(f"{value:.3g} {name}" for name, value in result.ceiling.items())])


@attrs.define(kw_only=True, eq=False)
class Report:
    """What one file holds: the cases of this run, and of earlier runs those that this one did not take up.

    Args:
        ceilings: what this machine was measured to be able to do.
        out: where the JSON goes.
        keep: the file's other cases stay in it; where not, it is written anew.
        order: of the cases in the file.
    """

    ceilings: Mapping[str, float]
    out: Path | None
    keep: bool = False
    order: Sequence[str] = ()
    results: dict[str, Result] = attrs.field(init=False, factory=dict)
    refused: dict[str, str] = attrs.field(init=False, factory=dict)
    skipped: list[str] = attrs.field(init=False, factory=list)
    _before: Mapping[str, Any] = attrs.field(init=False, factory=dict)
    _environment: Mapping[str, Any] = attrs.field(init=False, factory=environment)

    def __attrs_post_init__(self) -> None:
        if self.keep and self.out is not None and self.out.exists():
            self._before = json.loads(self.out.read_text(encoding="utf-8"))

    def write(self) -> None:
        """The file, if there is to be one."""
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(self._document(), indent=2) + "\n", encoding="utf-8")

    def show(self) -> None:
        """Print the table of this run."""
        print("\n".join(f"{name}: {value:.4g}" for name, value in self.ceilings.items()), end="\n\n")
        print(table(self.results.values()))
        for reason in self.refused.values():
            print(f"REFUSED, nothing was measured: {reason}")
        if self.skipped:
            print(f"no time was left for: {', '.join(self.skipped)}")
        if self.out is not None:
            print(f"written to {self.out}")

    def _document(self) -> dict[str, Any]:
        names = ("versions", "gpu", "cpu", "commit", "time")
        facts = {name: self._environment[name] for name in names} | {"ceilings": dict(self.ceilings)}
        found = [{"case": case, **result.to_dict(), "run": facts} for case, result in self.results.items()]
        now = {
            "environment": self._environment,
            "ceilings": dict(self.ceilings),
            "results": found,
            "refused": self.refused,
            "skipped": self.skipped,
            "order": list(self.order),
        }
        return merged(self._before, now)


class Stopped(BaseException):
    """Raised by a signal's handler: what is under way ends, and what was found is reported."""


@attrs.frozen(kw_only=True, eq=False)
class Case:
    """One line to be measured: its name, the function that checks and measures, and where the result goes."""

    name: str
    call: Callable[[], Result]
    report: Report


def ordered(cases: Sequence[Case], only: Sequence[str] | None = None) -> list[Case]:
    """Those whose names begin with one of `only`, in its order; without it all, those of a model together."""
    chosen: dict[int, Case] = {}
    for prefix in only or dict.fromkeys(case.name.split()[0] for case in cases):
        chosen |= {id(case): case for case in cases if id(case) not in chosen and case.name.startswith(prefix)}
    return list(chosen.values())


def run(
    cases: Mapping[str, Callable[[], Result]],
    *,
    ceilings: Mapping[str, float],
    out: Path | None,
    budget: float = float("inf"),
) -> int:
    """Run the cases, write the JSON after each, print their table; returns the exit status, 1 if one was refused.

    Args:
        cases: name -> function that checks, then measures.
        ceilings: what this machine was measured to be able to do.
        out: where the JSON goes.
        budget: seconds after which no further case is begun.
    """
    report = Report(ceilings=ceilings, out=out)
    report.write()
    return run_all([Case(name=name, call=call, report=report) for name, call in cases.items()], budget=budget)


def run_all(cases: Sequence[Case], *, budget: float = float("inf")) -> int:
    """Run the cases in this order, whatever their reports; otherwise as `run`."""
    began = time.perf_counter()
    left = list(cases)
    try:
        while left and time.perf_counter() - began <= budget:
            _one(left[0])
            left.pop(0)
    except Stopped:
        sys.stderr.write(f"stopped within {left[0].name}\n")
    for case in left:
        case.report.skipped.append(case.name)
    reports = list(dict.fromkeys(case.report for case in cases))
    for report in reports:
        report.write()
        report.show()
    return int(any(report.refused for report in reports))


def _one(case: Case) -> None:
    # progress, so that a long run does not look dead
    sys.stderr.write(f"{case.name} ...\n")
    name, report, started = case.name, case.report, time.perf_counter()
    try:
        report.results[name] = case.call()
        # a run that is cut short has shown what it had
        sys.stderr.write("\n".join(_lines(report.results[name])) + "\n")
    except Refused as reason:
        report.refused[name] = str(reason)
        sys.stderr.write(f"REFUSED: {reason}\n")
    # a case that breaks must not cost the results of the others, on a machine that was lent for one run
    except Exception as broken:  # noqa: BLE001
        traceback.print_exc()
        report.refused[name] = f"{name}: {type(broken).__name__}: {broken}"
    sys.stderr.write(f"{name}: {time.perf_counter() - started:.1f} s\n")
    report.write()
