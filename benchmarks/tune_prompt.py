"""Finds where the products of a prompt go through `dsi_kernels.prompt_linear` on this CUDA device, and with what tiles.

    python benchmarks/tune_prompt.py [--out FOLDER] [--tokens 512 2048] [--quick]

A product is timed with all that follows it until the next: the library's with kernels of their own, ours with what it
leaves. All candidates of a case take turns, a few launches each in one CUDA graph, so that none has a device that is
cooler; the median of the turns counts. What is found for the matrices of a 7B and of a 1B layer together is the answer
for all large ones. A candidate whose result is not the library's is refused.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dsi_kernels as dk
from dsi_kernels.prompt_linear import LIBRARY, OWN

TOKENS = (128, 256, 512, 1024, 2048, 4096)
# what follows -> [N, K] of the matrices; a gated one has twice the rows
MATRICES: Mapping[str, tuple[tuple[int, int], ...]] = {
    "gate": ((11008, 4096), (8192, 2048)),
    "add": ((4096, 4096), (4096, 11008)),
    "activation": ((16384, 4096),),
}
# rows, columns and terms of a tile, warps, stages
BLOCKS: Mapping[str, tuple[tuple[int, int, int, int, int], ...]] = {
    "gate": ((128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (64, 128, 64, 4, 3), (64, 128, 64, 8, 4), (128, 64, 64, 4, 4)),
    "add": ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4), (64, 128, 64, 4, 5),
            (256, 128, 64, 8, 3)),
    "activation": ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 4), (64, 128, 64, 4, 5)),
}  # fmt: skip
GROUPS = (8, 16)
TURNS, LAUNCHES = 9, 3
# ours has to win by so much to be worth a choice
MARGIN = 0.99

Call = Callable[[Mapping[str, int] | None], Tensor]


def case(follows: str, tokens: int, N: int, K: int) -> Call:
    """One product and what follows it: by our kernel, or without a configuration by the library."""
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(1, tokens, K, **options)
    weight = torch.randn(2 * N if follows == "gate" else N, K, **options) / K**0.5
    residual, gamma = torch.randn(1, tokens, N, **options), torch.randn(N, **options)
    if follows == "gate":
        return lambda config: (
            dk.gated_activation(F.linear(x, weight), "silu")
            if config is None
            else dk.prompt_linear(x, weight, kind="silu", gated=True, config=config)
        )
    if follows == "activation":
        return lambda config: (
            dk.bias_activation(F.linear(x, weight), gamma, "relu")
            if config is None
            else dk.prompt_linear(x, weight, gamma, kind="relu", config=config)
        )
    if follows == "add":
        return lambda config: (
            dk.add_rms_norm(F.linear(x, weight), residual, gamma)[0]
            if config is None
            else dk.rms_norm(dk.prompt_linear(x, weight, residual=residual, config=config), gamma)
        )


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            call()
    return graph


def times(call: Call, configs: list[Mapping[str, int]]) -> dict[int, float]:
    """Microseconds of the library, at -1, and of each configuration that runs and is right."""
    wanted, graphs = call(None).float(), {-1: captured(lambda: call(None))}
    scale = wanted.abs().max()
    for index, config in enumerate(configs):
        try:
            wrong = (call(config).float() - wanted).abs().max() / scale
            if wrong < 0.02:
                graphs[index] = captured(lambda config=config: call(config))
            else:
                sys.stdout.write(f"    WRONG by {wrong:.3f}: {dict(config)}\n")
        # too much shared memory, or a compiler's own: the others go on
        except Exception as error:  # noqa: BLE001
            sys.stdout.write(f"    {type(error).__name__}: {str(error)[:100]}: {dict(config)}\n")
            torch.cuda.synchronize()
    found: dict[int, list[float]] = {index: [] for index in graphs}
    for _ in range(TURNS):
        for index, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            found[index].append(1e3 * start.elapsed_time(end) / LAUNCHES)
    return {index: median(values) for index, values in found.items()}


def candidates(follows: str, *, quick: bool) -> list[Mapping[str, int]]:
    names = ("block_m", "block_n", "block_k", "num_warps", "stages")
    groups = GROUPS[:1] if quick else GROUPS
    return [
        dict(zip(names, block, strict=True)) | {"group_m": group, "choice": OWN}
        for block in BLOCKS[follows]
        for group in groups
    ]


def tune(follows: str, tokens: int, *, quick: bool) -> tuple[str, Mapping[str, int]]:
    """(shape, what won over all matrices)."""
    configs = candidates(follows, quick=quick)
    totals: dict[int, float] | None = None
    for N, K in MATRICES[follows]:
        found = times(case(follows, tokens, N, K), configs)
        line = " ".join(f"{index}:{value:.1f}" for index, value in sorted(found.items(), key=lambda one: one[1])[:6])
        rows = 2 * N if follows == "gate" else N
        best = min(found.values())
        sys.stdout.write(
            f"{follows:10} {tokens:5} x {rows} x {K}: library {found[-1]:.1f} best {best:.1f} us "
            f"({2 * tokens * rows * K / best / 1e6:.0f} TFLOP/s) | {line}\n"
        )
        sys.stdout.flush()
        totals = found if totals is None else {i: t + found[i] for i, t in totals.items() if i in found}
    assert totals is not None
    best_of = min((i for i in totals if i >= 0), key=totals.__getitem__, default=-1)
    won = best_of >= 0 and totals[best_of] < MARGIN * totals[-1]
    settings: Mapping[str, int] = configs[best_of] if won else {"choice": LIBRARY}
    return f"m={tokens},matrix=large,then={follows},bytes=2", settings


def write(found: Mapping[str, Mapping[str, int]], folder: Path) -> None:
    """Beside other shapes of the device; the longest prompts are as those of 4,096 tokens."""
    name = re.sub(r"[^A-Za-z0-9]+", "_", torch.cuda.get_device_name())
    path = folder / "prompt_linear" / f"{name}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for shape, settings in found.items():
        known[shape] = dict(settings)
        if shape.startswith("m=4096,"):
            for longer in (8192, 16384):
                known[shape.replace("m=4096,", f"m={longer},")] = dict(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder in which prompt_linear/<device>.json is written")
    parser.add_argument("--tokens", type=int, nargs="+", choices=TOKENS, default=list(TOKENS))
    parser.add_argument("--quick", action="store_true", help="one group of row tiles alone")
    return parser.parse_args()


@torch.no_grad()
def main() -> int:
    given = arguments()
    found = dict(tune(follows, tokens, quick=given.quick) for tokens in given.tokens for follows in MATRICES)
    for shape, settings in found.items():
        sys.stdout.write(f"{shape}: {dict(settings)}\n")
    if given.out is not None:
        write(found, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
