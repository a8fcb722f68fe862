"""Finds the launch settings of a decode step's products on this CUDA device, and writes them as dsi_kernels reads them.

    python benchmarks/tune.py [--out FOLDER] [--rows 1 2 4 8 16 32] [--only MODEL] [--quick]

How they are measured: `dsi.tuning`, which `dsi tune MODEL` uses for one model and one user. The attention of a step:
`tune_attention.py`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from dsi.tuning import MATVEC_ROWS, RING_BYTES, SKINNY_ROWS, Found, Product, graph_time, tune, write

__all__ = ["RING_BYTES", "copy_bandwidth", "graph_time"]

# products of a decode step of models of these shapes, gated ones with both halves: [N, K], gated, norm before it
SHAPES: Mapping[str, tuple[tuple[int, int, bool, str], ...]] = {
    "llama-2-7b": ((12288, 4096, False, "rms"), (4096, 4096, False, ""), (22016, 4096, True, "rms"),
                   (4096, 11008, False, ""), (32000, 4096, False, "rms")),
    "llama-3-8b": ((6144, 4096, False, "rms"), (28672, 4096, True, "rms"), (4096, 14336, False, ""),
                   (128256, 4096, False, "rms")),
    "llama-3.2-1b": ((3072, 2048, False, "rms"), (2048, 2048, False, ""), (16384, 2048, True, "rms"),
                     (2048, 8192, False, ""), (128256, 2048, False, "rms")),
    "opt-6.7b": ((16384, 4096, False, "layer"), (4096, 16384, False, ""), (50272, 4096, False, "layer")),
    "gpt2-xl": ((4800, 1600, False, "layer"), (1600, 1600, False, ""), (6400, 1600, False, "layer"),
                (1600, 6400, False, ""), (50257, 1600, False, "layer")),
}  # fmt: skip
# the models whose settings the bars are about
QUICK = ("llama-2-7b", "llama-3-8b", "llama-3.2-1b")
ROWS = (*MATVEC_ROWS, *SKINNY_ROWS)


def copy_bandwidth() -> float:
    """GB/s of a large device-to-device copy, bytes read and written.

    Outside of a graph: captured, the copy is a memory node of the graph, 2.76 TB/s where the kernel has 4.2 (H200), and
    every share of it would come out half as large again as it is.
    """
    data = torch.empty(2**28, device="cuda")
    target, times = torch.empty_like(data), []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(data)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return 2 * data.nbytes / statistics.median(times) / 1e3


def report(one: Found, product: Product) -> None:
    """A line: microseconds, GB/s of weights, and cuBLAS's microseconds for the product alone."""
    speed = product.rows * product.columns * 2 / one.time / 1e3
    sys.stdout.write(
        f"{one.op:7} {one.shape:34} {one.time:8.2f} us {speed:6.0f} GB/s   cuBLAS {one.library:8.2f}   {one.settings}\n"
    )
    sys.stdout.flush()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder in which <op>/<device>.json is written, beside other shapes")
    parser.add_argument("--rows", type=int, nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} alone, at 1, 8 and 32 rows")
    parser.add_argument("--only", choices=sorted(SHAPES), nargs="+", help="these models only")
    return parser.parse_args()


@torch.no_grad()
def main() -> int:
    given = arguments()
    # the first one warms up
    sys.stdout.write(f"copy {max(copy_bandwidth() for _ in range(3)):.0f} GB/s\n")
    names = given.only or list(QUICK if given.quick else SHAPES)
    shapes = dict.fromkeys(itertools.chain.from_iterable(SHAPES[name] for name in names))
    found = []
    for N, K, gated, norm in shapes:
        product = Product(rows=N, columns=K, gated=gated, norm=norm)
        for rows in (1, 8, 32) if given.quick else given.rows:
            one = tune(product, rows, torch.bfloat16)
            if one is None:
                sys.stdout.write(f"    no candidate runs: {product}, rows {rows}\n")
                continue
            report(one, product)
            found.append(one)
    if given.out is not None:
        write(found, given.out, torch.cuda.get_device_name())
    return 0


if __name__ == "__main__":
    sys.exit(main())
