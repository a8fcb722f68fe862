"""Where the time of one step goes, or of one forward: kernels, their times, and the gaps between them.

    python benchmarks/timeline.py [MODEL] [--batch N] [--tokens N] [--json FILE]

MODEL is one of `gpu_models.MODELS`; one that writes text is asked for a greedy text, any other for forwards. The
profiler's times are the device's. What repeats in them is a step, and one from the middle is told.

Under programmatic dependent launch a kernel begins while the one before it still runs, and its time counts its waiting:
the times of all kernels add up to more than the step. `own` is therefore what a kernel has beyond the end of all before
it; these add up to the time in which anything ran at all, and what is left of the step are gaps.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import attrs
import torch

NEW = 24


@attrs.frozen(kw_only=True)
class Kernel:
    """One run of a kernel: when it began and ended, in microseconds."""

    name: str
    start: float
    end: float


@attrs.frozen(kw_only=True)
class Share:
    """All runs of one kernel in a step: how many, their times added up, and what of them is their own."""

    name: str
    count: int
    total: float
    own: float


def one_step(kernels: Sequence[Kernel], steps: int) -> tuple[list[Kernel], float]:
    """The kernels of one step out of about `steps`, and microseconds from its first kernel to the next step's.

    A kernel that ran about once a step divides the steps. Of those with the commonest sequence of kernels the one of
    median length is taken: copies to the host come every few steps only.

    Raises:
        ValueError: no kernel ran about once a step.
    """
    counts = Counter(kernel.name for kernel in kernels)
    marks = [name for name, count in counts.items() if abs(count - steps) <= max(2, steps // 8)]
    if not marks:
        raise ValueError(f"no kernel ran about {steps} times: {counts.most_common()}")
    starts = [index for index, kernel in enumerate(kernels) if kernel.name == marks[0]]
    found = [(list(kernels[low:high]), kernels[high].start - kernels[low].start) for low, high in pairwise(starts)]
    usual, _ = Counter(tuple(kernel.name for kernel in step) for step, _ in found).most_common(1)[0]
    alike = sorted((item for item in found if tuple(k.name for k in item[0]) == usual), key=lambda item: item[1])
    return alike[len(alike) // 2]


def shares(step: Sequence[Kernel]) -> list[Share]:
    """Of each kernel, the one with the most time of its own first."""
    runs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    reached = step[0].start
    for kernel in step:
        own = max(0.0, kernel.end - max(kernel.start, reached))
        reached = max(reached, kernel.end)
        runs[kernel.name].append((kernel.end - kernel.start, own))
    found = [
        Share(name=name, count=len(times), total=sum(t for t, _ in times), own=sum(own for _, own in times))
        for name, times in runs.items()
    ]
    return sorted(found, key=lambda share: -share.own)


def report(step: Sequence[Kernel], whole: float) -> str:
    """The table of a step."""
    found = shares(step)
    lines = [f"{'own us':>9} {'total us':>9} {'runs':>5} {'each':>8}"]
    lines += [
        f"{share.own:9.1f} {share.total:9.1f} {share.count:5} {share.total / share.count:8.2f}  {share.name[:84]}"
        for share in found
    ]
    busy, total = sum(share.own for share in found), sum(share.total for share in found)
    lines.append(
        f"{whole:9.1f} us the step: {busy:.1f} busy in {len(step)} kernels, {whole - busy:.1f} in gaps; "
        f"{total - busy:.1f} of the kernels' times lie over each other"
    )
    return "\n".join(lines)


def recorded(call: Callable[[], object]) -> list[Kernel]:
    """The kernels that a call runs on the device, as they begin."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as events:
        call()
        torch.cuda.synchronize()
    kernels = [
        Kernel(name=event.name, start=event.time_range.start, end=event.time_range.end)
        for event in events.events()
        if event.device_type == DeviceType.CUDA
    ]
    return sorted(kernels, key=lambda kernel: kernel.start)


def _call(engine: Any, ids: torch.Tensor) -> Callable[[], object]:
    if engine.module.can_generate():
        return lambda: engine.generate(ids, max_new_tokens=NEW, do_sample=False)
    return lambda: [engine(ids) for _ in range(NEW)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="llama-7b")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128, help="of the prompt, or of the forward")
    parser.add_argument("--json", type=Path, help="write the shares to this file")
    return parser.parse_args()


@torch.no_grad()
def main() -> int:
    given = arguments()
    from gpu_models import DEVICE, MODELS

    import dsi

    if given.model not in MODELS:
        sys.exit(f"{given.model}: no such model; there are {', '.join(MODELS)}")
    model = MODELS[given.model].build()
    engine = dsi.init_inference(model)
    call = _call(engine, torch.randint(4, model.config.vocab_size, (given.batch, given.tokens), device=DEVICE))
    for _ in range(2):
        call()
    step, whole = one_step(recorded(call), NEW)
    print(report(step, whole))
    if given.json is not None:
        given.json.write_text(
            json.dumps({"step_us": whole, "kernels": [attrs.asdict(s) for s in shares(step)]}, indent=2)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
