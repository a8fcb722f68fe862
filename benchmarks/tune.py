"""Finds the launch configurations of the kernels on this CUDA device and writes them as dsi_kernels reads them.

    python benchmarks/tune.py [--out FOLDER] [--op matvec attention] [--rows 1 2] [--only SHAPE]

Each candidate multiplies a ring of matrices, more than the L2 cache holds, inside one CUDA graph; what counts is the
median of its replays. Beside it stand the share of the copy bandwidth of the same run, and cuBLAS. A candidate whose
result is not the reference's is refused.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import triton
from torch import Tensor

import dsi_kernels

# [N, K] of the products of a decode step, gated ones with both halves: what models of these shapes have
SHAPES: Mapping[str, tuple[tuple[str, int, int], ...]] = {
    "llama-2-7b": (("norm", 12288, 4096), ("add", 4096, 4096), ("gate", 22016, 4096), ("add", 4096, 11008),
                   ("norm", 32000, 4096)),
    "llama-3-8b": (("norm", 6144, 4096), ("gate", 28672, 4096), ("add", 4096, 14336), ("norm", 128256, 4096)),
    "llama-3.2-1b": (("norm", 3072, 2048), ("add", 2048, 2048), ("gate", 16384, 2048), ("add", 2048, 8192),
                     ("norm", 128256, 2048)),
    "opt-6.7b": (("layer", 12288, 4096), ("layer-relu", 16384, 4096), ("add", 4096, 16384), ("layer", 50272, 4096)),
    "gpt2-xl": (("layer", 4800, 1600), ("add", 1600, 1600), ("layer-gelu_tanh", 6400, 1600), ("add", 1600, 6400),
                ("layer", 50257, 1600)),
}  # fmt: skip
CANDIDATES = tuple(
    {"block_n": n, "block_k": k, "num_warps": w, "stages": stages}
    for n, k, w, stages in (
        (2, 1024, 2, 1), (2, 1024, 4, 1), (4, 512, 2, 1), (4, 1024, 2, 1), (4, 1024, 4, 1), (4, 2048, 4, 1),
        (8, 512, 4, 1), (8, 1024, 4, 1), (16, 512, 8, 1), (4, 512, 2, 3), (4, 512, 4, 3), (4, 1024, 4, 3),
        (8, 512, 4, 3), (8, 512, 4, 4), (16, 256, 4, 4), (16, 512, 8, 3), (4, 1024, 4, 4),
    )
)  # fmt: skip
RING_BYTES = 320 << 20


def graph_time(step: Callable[[int], object], count: int, *, replays: int = 15) -> float:
    """Microseconds of one of `count` steps, from replays of a graph that holds them all."""
    step(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            step(index)
    times = []
    for turn in range(replays + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if turn >= 3:
            times.append(start.elapsed_time(end) * 1e3 / count)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """GB/s of a large device-to-device copy, bytes read and written."""
    data = torch.empty(2**28, device="cuda")
    target = torch.empty_like(data)
    return 2 * data.nbytes / graph_time(lambda _: target.copy_(data), 4) / 1e3


def operands(role: str, N: int, K: int, rows: int, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, object]]:
    """A ring of matrices, and everything else that a product of this role takes."""
    count = max(2, -(-RING_BYTES // (N * K * dtype.itemsize)))
    options = {"device": "cuda", "dtype": dtype}
    weights = [torch.randn(N, K, **options) / K**0.5 for _ in range(count)]
    given: dict[str, object] = {"x": torch.randn(rows, K, **options)}
    if role == "add":
        given |= {"residual": torch.randn(rows, N, **options)}
    if role in ("norm", "gate"):
        given |= {"norm": "rms", "norm_weight": torch.randn(K, **options)}
    if role == "gate":
        given |= {"kind": "silu", "gated": True}
    if role.startswith("layer"):
        given |= {"norm": "layer", "norm_weight": torch.randn(K, **options), "norm_bias": torch.randn(K, **options)}
        given |= {"bias": torch.randn(N, **options), "kind": role.partition("-")[2]}
    return weights, given


def candidates(weights: list[Tensor], given: dict[str, object]) -> Iterator[tuple[float, dict[str, int]]]:
    """(microseconds, configuration) of every candidate that computes what it should."""
    wanted = dsi_kernels.matvec_reference(weight=weights[0], **given).float()
    for config in CANDIDATES:
        found = dsi_kernels.matvec(weight=weights[0], **given, config=config).float()
        if float((found - wanted).norm() / wanted.norm()) > 1e-2:
            sys.stdout.write(f"    refused, wrong: {config}\n")
            continue
        time = graph_time(lambda i, c=config: dsi_kernels.matvec(weight=weights[i], **given, config=c), len(weights))
        yield time, config


def tune(name: str, rows: int, dtype: torch.dtype, copy: float) -> Iterator[tuple[str, dict[str, int]]]:
    """(shape, its best configuration) of every product of a model."""
    for role, N, K in SHAPES[name]:
        weights, given = operands(role, N, K, rows, dtype)
        found = sorted(candidates(weights, given), key=lambda pair: pair[0])
        x = given["x"]
        library = graph_time(lambda i, x=x, w=weights: torch.nn.functional.linear(x, w[i]), len(weights))
        (best, config), floor = found[0], N * K * dtype.itemsize / copy / 1e3
        sys.stdout.write(
            f"{name:13} {role:15} rows {rows} {N:6} x {K:5}  {best:7.2f} us  {100 * floor / best:5.1f} % of copy   "
            f"cuBLAS alone {library:7.2f} us  {config}  second {found[1][0]:.2f} {found[1][1]}\n"
        )
        sys.stdout.flush()
        yield f"rows={rows},n={N},k={K},bytes={dtype.itemsize}", config


# (heads, kv heads, head size) of the attention of a decode step, and the lengths at which it is measured
ATTENTION = ((32, 32, 128), (32, 8, 128), (32, 8, 64), (25, 25, 64))
LENGTHS = (160, 1024, 8192)


def attention_settings() -> Iterator[dict[str, int]]:
    for tile, warps, stages, split in itertools.product((8192, 16384, 32768), (4, 8), (1, 2, 3), (64, 256)):
        yield {
            "tile_bytes": tile, "num_warps": warps, "stages": stages, "min_split": split, "programs_per_sm": 2,
        }  # fmt: skip


def tune_attention(copy: float) -> Iterator[tuple[str, dict[str, int]]]:
    """(shape, the configuration with the least time, summed over the lengths as shares of the best of each)."""
    for heads, kv_heads, width in ATTENTION:
        options = {"device": "cuda", "dtype": torch.bfloat16}
        q, times = torch.randn(1, heads, 1, width, **options), {}
        for length in LENGTHS:
            capacity = -(-length // 256) * 256
            count = max(4, RING_BYTES // (2 * kv_heads * capacity * width * 2))
            rings = [torch.randn(2, 1, kv_heads, capacity, width, **options) for _ in range(min(count, 64))]
            filled = torch.tensor(length, device="cuda")
            for config in attention_settings():
                try:
                    times[length, tuple(config.items())] = graph_time(
                        lambda i, q=q, r=rings, f=filled, c=config: dsi_kernels.decode_attention(q, *r[i], f, config=c),
                        len(rings),
                    )
                # a configuration that the device has no shared memory for
                except triton.runtime.errors.OutOfResources:
                    continue
        best = {length: min(t for (n, _), t in times.items() if n == length) for length in LENGTHS}
        keys = {key for _, key in times if all((n, key) in times for n in LENGTHS)}
        key = min(keys, key=lambda key: sum(times[n, key] / best[n] for n in LENGTHS))
        for length in LENGTHS:
            floor = 2 * kv_heads * length * width * 2 / copy / 1e3
            own = [c for (n, c), t in times.items() if n == length and t == best[length]]
            sys.stdout.write(
                f"attention {heads}/{kv_heads} x {width}, {length:6} positions: {times[length, key]:7.2f} us, "
                f"{100 * floor / times[length, key]:5.1f} % of copy; best {best[length]:7.2f} {dict(own[0])}\n"
            )
        sys.stdout.write(f"    chosen {dict(key)}\n")
        yield f"head_dim={width},group={heads // kv_heads},bytes=2", dict(key)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder in which matvec/<device>.json is written")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--op", nargs="+", choices=["matvec", "attention"], default=["matvec", "attention"])
    parser.add_argument("--only", choices=sorted(SHAPES), help="one model only")
    return parser.parse_args()


@torch.no_grad()
def main() -> int:
    given = arguments()
    # the first one warms up
    copy = max(copy_bandwidth() for _ in range(3))
    sys.stdout.write(f"copy {copy:.0f} GB/s\n")
    tables: dict[str, dict[str, dict[str, int]]] = {}
    if "attention" in given.op:
        tables["decode_attention"] = dict(tune_attention(copy))
    if "matvec" in given.op:
        names = [given.only] if given.only else list(SHAPES)
        found = (tune(name, rows, torch.bfloat16, copy) for name, rows in itertools.product(names, given.rows))
        tables["matvec"] = dict(itertools.chain.from_iterable(found))
    slug = re.sub(r"[^A-Za-z0-9]+", "_", torch.cuda.get_device_name())
    for op, table in tables.items():
        if given.out is not None:
            target = given.out / op / f"{slug}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
