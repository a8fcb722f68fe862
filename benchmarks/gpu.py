"""dsi on one CUDA device beside stock transformers, the strongest plain PyTorch recipe, and what the device can do.

    python benchmarks/gpu.py --table decode [--out FILE.json] [--quick] [--only NAME ...] [--budget SECONDS]

Tables: ready, encoders, families, decode, prefill, sampling and context, ten minutes together, and diffusion, which
wants diffusers. Several are written into the folder `--out`, a file each, in which the cases that are not run stay what
they were. Cases run in the order of `--only`, else model by model, so that each model is made once. Models have real
sizes and random weights; every contender is timed in turns with the others, and the medians are compared. The floor of
a token is the time in which its weights and cached positions are read at the bandwidth of a large copy, measured in the
same run. A case is refused where our error against a float32 reference is above 1.2 times stock's own. The JSON is
written after each case: a run that is cut short, by `--budget` or by SIGTERM, keeps what it had and names what it had
no time for.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
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
from gpu_rivals import Rivals
from measure import Case, Report, Result, Sample, Stopped, ordered, run_all

Cases = dict[str, Callable[[], Result]]

RIVALS = "beside torch.compile, which takes up to a minute a case: where a bar names it, wherever it can be, or nowhere"


def diffusion_cases(stage: Stage, **options: object) -> Cases:
    """As `gpu_diffusion.diffusion_cases`; the other tables need no diffusers."""
    from gpu_diffusion import diffusion_cases as cases

    return cases(stage, **options)


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
        "diffusion": diffusion_cases,
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
    parser.add_argument("--only", nargs="+", help="cases whose names begin so, e.g. llama-7b, in this order")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no further case begins")
    parser.add_argument("--rivals", choices=Rivals, type=Rivals, default=Rivals.BARS, help=RIVALS)
    parser.add_argument("--no-rivals", dest="rivals", action="store_const", const=Rivals.NONE, help="--rivals none")
    return parser.parse_args()


def _file(out: Path | None, table: str, count: int) -> Path | None:
    if out is None or (count == 1 and out.suffix == ".json"):
        return out
    return out / f"{table}.json"


def _stop(signum: int, _: object) -> None:
    raise Stopped(signum)


@torch.no_grad()
def main() -> int:
    given = arguments()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py measures on a CUDA device, and torch finds none; benchmarks/cpu.py needs none")
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGTERM, _stop)
    stage = Stage()
    options = {"quick": given.quick, "peak": ceilings(), "rivals": given.rivals}
    cases: list[Case] = []
    for table in (name for name in TABLES if name in given.table):
        known, out = TABLES[table](stage, **options), _file(given.out, table, len(given.table))
        report = Report(ceilings=options["peak"], out=out, keep=True, order=list(known))
        cases += [Case(name=name, call=call, report=report) for name, call in known.items()]
    return run_all(ordered(cases, given.only), budget=given.budget)


if __name__ == "__main__":
    sys.exit(main())
