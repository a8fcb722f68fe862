"""Draws the share of the floor that decoding reaches, against the batch and against the context.

    python benchmarks/plot.py RESULTS.json [RESULTS.json ...] --out docs/images/h200-decode.png

Reads what `benchmarks/gpu.py --table decode` and `--table context` wrote; needs matplotlib (the extra `bench`) and no
device. The floor is the time in which a step's weights and cached positions are read at the copy bandwidth of the same
run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Series = dict[str, list[tuple[float, float]]]

COLORS = {"dsi": "#1b6ca8", "torch.compile": "#d9822b", "stock": "#8a8a8a"}


def series(results: Iterable[Mapping[str, Any]], model: str, against: str, **fixed: float) -> Series:
    """Contender -> (x, share of the floor), by x.

    Args:
        results: of the JSON files.
        model: the results' names begin so.
        against: the fact on the x axis.
        **fixed: facts that must have these values.
    """
    found: dict[str, dict[float, float]] = defaultdict(dict)
    for result in results:
        facts = result["facts"]
        if not result["name"].startswith(model) or "shares" not in facts:
            continue
        if any(facts.get(name) != value for name, value in fixed.items()):
            continue
        for contender, share in facts["shares"].items():
            found[contender][facts[against]] = share
    return {contender: sorted(found[contender].items()) for contender in COLORS if contender in found}


def read(paths: Iterable[Path]) -> tuple[list[dict[str, Any]], str]:
    """All results, and the device's name."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    device = documents[0]["environment"]["gpu"]["name"]
    return [result for document in documents for result in document["results"]], device


def draw(results: list[dict[str, Any]], device: str, out: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = (
        ("LLaMA 7B shape, bfloat16, short texts", "rows", series(results, "llama-7b", "rows", prompt=32)),
        ("Llama 3.2 1B shape, bfloat16, one row", "positions", series(results, "llama-1b", "context")),
    )
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for axis, (title, label, lines) in zip(axes, panels, strict=True):
        for contender, points in lines.items():
            x, y = zip(*points, strict=True)
            axis.plot(x, [100 * share for share in y], "o-", color=COLORS[contender], label=contender)
        axis.set_xscale("log", base=2)
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axis.set_xticks(ticks, [f"{int(tick)}" for tick in ticks])
        axis.minorticks_off()
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_ylim(0, 100)
    axes[0].set_ylabel("% of the floor")
    axes[0].legend(frameon=False)
    figure.suptitle(f"A decode step on one {device}: share of the time that reading its bytes takes", fontsize=10)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, metadata={"Software": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    draw(*read(given.results), given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
