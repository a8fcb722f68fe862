"""The fastest launch settings of a decode step's attention on this device: a table, and the tuned JSON.

    python benchmarks/tune_attention.py [--out FOLDER] [--only SHAPE ...] [--rows 1 8 32] [--reach 256 1024 8192 32768]
        [--budget SECONDS]

How they are measured: `dsi.attention_tuning`, which `dsi tune MODEL` uses for one model and one user. Shares are of the
copy bandwidth of the same run.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from tune import copy_bandwidth

from dsi.attention_tuning import FILLED, ROWS, Heads, tune_attentions
from dsi.tuning import Found, write

SHAPES = {
    "llama-2-7b": Heads(heads=32, kv_heads=32, head_dim=128),
    "llama-3-8b": Heads(heads=32, kv_heads=8, head_dim=128),
    "llama-3.2-1b": Heads(heads=32, kv_heads=8, head_dim=64),
    "gpt2-xl": Heads(heads=25, kv_heads=25, head_dim=64),
    "falcon-7b": Heads(heads=71, kv_heads=1, head_dim=64),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder in which step_attention/<device>.json is written")
    parser.add_argument("--only", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--reach", type=int, nargs="+", choices=tuple(FILLED), default=list(FILLED))
    parser.add_argument("--budget", type=float, help="seconds after which no other case is begun")
    return parser.parse_args()


@torch.no_grad()
def main() -> int:
    given = arguments()
    # the first one warms up
    copy = max(copy_bandwidth() for _ in range(3))
    sys.stdout.write(f"copy {copy:.0f} GB/s\n")
    started, found = time.monotonic(), []
    every = tuple(SHAPES[name] for name in given.only)
    for one in tune_attentions(
        every, tuple(given.rows), torch.bfloat16, reaches=tuple(given.reach), budget=given.budget
    ):
        report(one, every, copy)
        found.append(one)
    sys.stdout.write(f"{time.monotonic() - started:.0f} s\n")
    if given.out is not None:
        write(found, given.out, torch.cuda.get_device_name())
    return 0


def report(one: Found, every: tuple[Heads, ...], copy: float) -> None:
    """A line: microseconds, and what a copy of as many bytes would take."""
    shape = dict(part.split("=") for part in one.shape.split(","))
    size, group, rows, reach = (int(shape[name]) for name in ("head_dim", "group", "rows", "reach"))
    kv_heads = next(heads.kv_heads for heads in every if (heads.head_dim, heads.group) == (size, group))
    floor = 4 * rows * kv_heads * FILLED[reach] * size / copy / 1e3
    sys.stdout.write(f"{one.shape:50} {one.time:8.2f} us, copy {floor:8.2f} us   {one.settings}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
