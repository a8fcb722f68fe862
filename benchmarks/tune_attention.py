"""The fastest launch configurations of a decode step's attention on this device: a table, and the tuned JSON.

    python benchmarks/tune_attention.py [--out FOLDER] [--only SHAPE] [--rows 1 8 32] [--lengths 160 1024 8192 32768]

Every candidate is held to the reference first. Times are those of a CUDA graph over a ring of caches that no L2 holds;
shares are of the copy bandwidth of the same run. One configuration serves all lengths and rows of a shape: the one
whose times, as shares of the best of each, are the least in sum.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from tune import RING_BYTES, copy_bandwidth, graph_time

import dsi_kernels
from dsi_kernels.step_attention import StepRope

# (heads, kv heads, head size) of models
SHAPES = {
    "llama-2-7b": (32, 32, 128),
    "llama-3-8b": (32, 8, 128),
    "llama-3.2-1b": (32, 8, 64),
    "gpt2-xl": (25, 25, 64),
    "falcon-7b": (71, 1, 64),
}
LENGTHS = (160, 1024, 8192, 32768)
# bytes of one ring that are left to the caches
MOST_BYTES = 32 << 30


def settings() -> Iterator[dict[str, int]]:
    for tile, warps, stages, split, programs in itertools.product(
        (8192, 16384), (4, 8), (2, 3), (64, 128, 256), (2, 4, 8)
    ):
        yield {
            "tile_bytes": tile, "num_warps": warps, "stages": stages, "min_split": split, "programs_per_sm": programs,
        }  # fmt: skip


def step(name: str, rows: int, length: int) -> tuple[Callable[..., torch.Tensor], int, float]:
    """(a step with the ring's i-th cache, caches in the ring, bytes read)."""
    heads, kv_heads, width = SHAPES[name]
    options = {"device": "cuda", "dtype": torch.bfloat16}
    capacity = -(-(length + 1) // 256) * 256
    one = 4 * rows * kv_heads * capacity * width
    rings = [
        torch.randn(2, rows, kv_heads, capacity, width, **options)
        for _ in range(max(1, min(RING_BYTES // one + 2, MOST_BYTES // one, 64)))
    ]
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * width, **options)
    table, at = torch.randn(2, 1, length + 1, width, **options), torch.full((rows, 1), length, device="cuda")
    start, tickets = at[0, 0].clone(), torch.zeros(rows * kv_heads, dtype=torch.int32, device="cuda")
    rope = StepRope(table[0], table[1], False, at)

    def run(i: int, function: Callable[..., torch.Tensor] = dsi_kernels.step_attention, **more: object) -> torch.Tensor:
        if function is dsi_kernels.step_attention:
            more["tickets"] = tickets
        return function(qkv, rings[i][0], rings[i][1], start, heads, kv_heads, rope=rope, **more)

    return run, len(rings), 4 * rows * kv_heads * length * width


def times(name: str, rows: int, length: int) -> tuple[dict[tuple[tuple[str, int], ...], float], float]:
    """(microseconds by configuration, of those that compute what they should; bytes read)."""
    run, count, size = step(name, rows, length)
    # a reference of scores in fp32: of long contexts, one row's memory is enough
    wanted = run(0, dsi_kernels.step_attention_reference).float() if rows * length <= 1 << 14 else None
    found = {}
    for config in settings():
        try:
            if wanted is not None and float((run(0, config=config).float() - wanted).norm() / wanted.norm()) > 1e-2:
                sys.stdout.write(f"    refused, wrong: {config}\n")
                continue
            found[tuple(config.items())] = graph_time(lambda i, c=config: run(i, config=c), count, replays=7)
        # a configuration that the device has no shared memory for
        except triton.runtime.errors.OutOfResources:
            continue
    return found, size


def tune(name: str, rows: list[int], lengths: list[int], copy: float) -> dict[str, int]:
    """The configuration for a shape."""
    measured = {case: times(name, *case) for case in itertools.product(rows, lengths)}
    best = {case: min(found.values()) for case, (found, _) in measured.items()}
    keys = set.intersection(*(set(found) for found, _ in measured.values()))
    key = min(keys, key=lambda key: sum(found[key] / best[case] for case, (found, _) in measured.items()))
    for (count, length), (found, size) in measured.items():
        own = min(found, key=found.__getitem__)
        sys.stdout.write(
            f"{name:13} rows {count:2} {length:6} positions: {found[key]:8.2f} us, "
            f"{100 * size / copy / 1e3 / found[key]:5.1f} % of copy; best {found[own]:8.2f} {dict(own)}\n"
        )
    sys.stdout.write(f"    chosen {dict(key)}\n")
    sys.stdout.flush()
    return dict(key)


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder in which step_attention/<device>.json is written")
    parser.add_argument("--only", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    given = parser.parse_args()
    # the first one warms up
    copy = max(copy_bandwidth() for _ in range(3))
    sys.stdout.write(f"copy {copy:.0f} GB/s\n")
    table = {}
    for name in given.only:
        heads, kv_heads, width = SHAPES[name]
        table[f"head_dim={width},group={heads // kv_heads},bytes=2"] = tune(name, given.rows, given.lengths, copy)
    if given.out is not None:
        slug = re.sub(r"[^A-Za-z0-9]+", "_", torch.cuda.get_device_name())
        target = given.out / "step_attention" / f"{slug}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
