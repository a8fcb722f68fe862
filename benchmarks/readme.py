"""Writes the H200's figures into README.md, from the committed results, so that the two cannot part.

    python benchmarks/readme.py [--take FOLDER ...] [--check]

`--take` first lays the files that `benchmarks/gpu.py --out FOLDER` wrote over the committed ones, case by case, and
draws the plot. What stands between the two markers is what `section` makes of `benchmarks/results/h200-<table>.json`;
with `--check` a difference is an error and nothing is written. A test of the suite does the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from documents import Document, ceilings, merged
from plot import draw, read

ROOT = Path(__file__).resolve().parent.parent
RESULTS, README = ROOT / "benchmarks" / "results", ROOT / "README.md"
BEGIN, END = "<!-- h200: made by benchmarks/readme.py -->", "<!-- h200 ends -->"
PLOT = "docs/images/h200-decode.png"
TABLES = ("decode", "sampling", "context", "prefill", "encoders", "ready")


def take(folder: Path, results: Path = RESULTS) -> list[Path]:
    """Lay a run's files over the committed ones; returns those that were written."""
    written = []
    for found in sorted(folder.glob("*.json")):
        target = results / f"h200-{found.name}"
        before = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
        document = merged(before, json.loads(found.read_text(encoding="utf-8")))
        if document["results"]:
            target.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
            written.append(target)
    return written


def documents(folder: Path = RESULTS) -> dict[str, Document]:
    """Table -> its committed results, for the tables that have some."""
    paths = {table: folder / f"h200-{table}.json" for table in TABLES}
    return {table: json.loads(path.read_text(encoding="utf-8")) for table, path in paths.items() if path.exists()}


def section(known: Mapping[str, Document], *, plot: bool) -> str:
    """What stands between the markers, in Markdown."""
    lines = [BEGIN]
    if known:
        environment = next(iter(known.values()))["environment"]
        lines += [
            *textwrap.wrap(_how(environment, known), width=128),
            "",
            "| case | dsi | compile | stock | |",
            "|---|---|---|---|---|",
            *(_row(result) for document in known.values() for result in document["results"]),
        ]
        missed = [
            f"{result['name']}: {goal}"
            for document in known.values()
            for result in document["results"]
            for goal in _missed(result)
        ]
        missed += [f"{case}: refused" for document in known.values() for case in document.get("refused", ())]
        if missed:
            lines += ["", f"Bars that are not met: {'; '.join(missed)}."]
        if plot:
            lines += ["", f"![Share of the floor against batch and context]({PLOT})"]
    return "\n".join([*lines, END])


def _how(environment: Mapping[str, Any], known: Mapping[str, Document]) -> str:
    versions = environment["versions"]
    measured = [found for document in known.values() for found in ceilings(document)]
    copies = [found["GB/s copy"] / 1e3 for found in measured]
    products = [found["TFLOP/s bf16"] for found in measured]
    return (
        f"One {environment['gpu']['name']}, torch {versions['torch']}, triton {versions['triton']}, transformers "
        f"{versions['transformers']}, random weights at real size; a copy runs at {_span(copies, 2)} TB/s, an 8192^3 "
        f"bf16 product at {_span(products, 0)} TFLOP/s. For text `compile` is a greedy loop of our own over a static "
        'cache and `torch.compile(mode="reduce-overhead", fullgraph=True)`. The floor of a token is the time in which '
        "its weights and cached positions are read as fast as a copy runs."
    )


def _span(values: list[float], digits: int) -> str:
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _row(result: Mapping[str, Any]) -> str:
    times, unit = result["times"], result["unit"]

    def cell(contender: str) -> str:
        return f"{times[contender]['median']:.3g}" if contender in times else ""

    remarks = "; ".join(_remarks(result))
    return f"| {result['name']}, {unit} | {cell('dsi')} | {cell('torch.compile')} | {cell('stock')} | {remarks} |"


def _remarks(result: Mapping[str, Any]) -> Iterator[str]:
    if (share := result["facts"].get("shares", {}).get("dsi")) is not None:
        yield f"{100 * share:.0f} % of the floor"
    for goal in result["goals"]:
        if goal["name"] not in ("share of the floor", "ms", "ms a step"):
            yield f"{goal['name']} {goal['found']:.3g}"
    if "compile_failed" in result["facts"]:
        yield "compile fails"
    if "dsi, no padding" in result["ratios"]:
        yield f"{result['ratios']['dsi, no padding']:.2f} times as fast as without padding"


def _missed(result: Mapping[str, Any]) -> Iterator[str]:
    for goal in result["goals"]:
        if not goal["met"]:
            yield f"{goal['name']} {goal['found']:.3g}, wanted {goal['bar']:g}"
    for contender, met in result["met"].items():
        if not met:
            ratio = result["ratios"][contender]
            yield f"{ratio:.2f} times as fast as {contender}, wanted {result['bars'][contender]:g}"


def placed(readme: str, text: str) -> str:
    """The README with `text` where the markers stand.

    Raises:
        ValueError: the markers are missing.
    """
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md: the markers {BEGIN} and {END} are missing")
    return head + text + tail


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether README.md is what it should be")
    parser.add_argument("--take", nargs="+", type=Path, default=[], metavar="FOLDER", help="of runs, the latest last")
    given = parser.parse_args()
    for path in (path for folder in given.take for path in take(folder)):
        print(f"written to {path.relative_to(ROOT)}")
    drawn = [path for path in (RESULTS / f"h200-{table}.json" for table in ("decode", "context")) if path.exists()]
    if given.take and drawn:
        draw(*read(drawn), ROOT / PLOT)
    before = README.read_text(encoding="utf-8")
    after = placed(before, section(documents(), plot=(ROOT / PLOT).exists()))
    if given.check:
        return int(before != after)
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
