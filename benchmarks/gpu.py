"""dsi on one CUDA device beside stock transformers, the strongest plain PyTorch recipe, and what the device can do.

    python benchmarks/gpu.py --table decode [--out FILE.json] [--quick] [--only NAME ...] [--budget SECONDS]

Tables: decode, which with its rivals takes five minutes, and ready, encoders, families, prefill, sampling and context,
which take five together; several are written into the folder `--out`, a file each. Models have real sizes and random
weights; every contender is timed in turns with the others, and the medians are compared. The floor of a token is the
time in which its weights and cached positions are read at the bandwidth of a large copy, measured in the same run. A
case is refused where our error against a float32 reference is above 1.2 times stock's own. The JSON is written after
each case: a run that is cut short keeps what it had.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from gpu_decode import context_cases, decode_cases, graph_times, sampling_cases, stream_times
from gpu_forward import encoder_cases, family_cases, prefill_cases
from gpu_models import DEVICE, Stage
from gpu_ready import ready_cases
from measure import Result, Sample, run

Cases = dict[str, Callable[[], Result]]

# in the order in which models are shared best
TABLES: Mapping[str, Callable[..., Cases]] = MappingProxyType(
    {
        "ready": ready_cases,
        "encoders": encoder_cases,
        "families": family_cases,
        "decode": decode_cases,
        # all three of LLaMA 7B and 1B, in this order
        "prefill": prefill_cases,
        "sampling": sampling_cases,
        "context": context_cases,
    }
)


def ceilings() -> dict[str, float]:
    """What this device can do: a matrix product of 8192x8192x8192 on random data, and memory."""
    x, y = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    # 1 GiB, beyond the cache
    data = torch.empty(2**28, device=DEVICE)
    target = torch.empty_like(data)
    product = Sample.of(graph_times(lambda _: x @ y, 4, quick=True)).median

    def copy(_: int) -> object:
        return target.copy_(data)

    # a copy node of a graph may be carried out by other means than a copy of a stream: the ceiling is the better one
    copies = {
        "in a graph": Sample.of(graph_times(copy, 4, quick=True)).median,
        "in a stream": Sample.of(stream_times(copy, 8, quick=True)).median,
    }
    rates = {f"GB/s copy {how}": 2 * data.nbytes / milliseconds / 1e6 for how, milliseconds in copies.items()}
    return {"TFLOP/s bf16": 2 * 8192**3 / product / 1e9, "GB/s copy": max(rates.values()), **rates}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", nargs="+", choices=sorted(TABLES), default=["families"], help="what to measure")
    parser.add_argument("--out", type=Path, help="a JSON file, or a folder for a file each")
    parser.add_argument("--quick", action="store_true", help="few rounds, short texts: a smoke test, not a measurement")
    parser.add_argument("--only", nargs="+", help="cases whose names begin so, e.g. llama-7b")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no further case begins")
    parser.add_argument("--no-rivals", action="store_true", help="without torch.compile, which takes a minute a case")
    return parser.parse_args()


def _chosen(cases: Cases, only: list[str] | None) -> Cases:
    return {name: case for name, case in cases.items() if only is None or name.startswith(tuple(only))}


def _file(out: Path | None, table: str, count: int) -> Path | None:
    if out is None or (count == 1 and out.suffix == ".json"):
        return out
    return out / f"{table}.json"


@torch.no_grad()
def main() -> int:
    given = arguments()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py measures on a CUDA device, and torch finds none; benchmarks/cpu.py needs none")
    transformers.logging.set_verbosity_error()
    stage, status, began = Stage(), 0, time.perf_counter()
    options = {"quick": given.quick, "peak": ceilings(), "rivals": not given.no_rivals}
    for table in (name for name in TABLES if name in given.table):
        cases = _chosen(TABLES[table](stage, **options), given.only)
        left = given.budget - (time.perf_counter() - began)
        out = _file(given.out, table, len(given.table))
        status |= run(cases, ceilings=options["peak"], out=out, budget=left)
    return status


if __name__ == "__main__":
    sys.exit(main())
