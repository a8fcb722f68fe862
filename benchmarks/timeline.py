"""Where the time of one captured decode step goes: kernels, their times, and the gaps between them.

    python benchmarks/timeline.py [MODEL] [--batch N]

MODEL is one of benchmarks/gpu.py. Times are the profiler's: of kernels as the device ran them, one replay.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from gpu_models import DEVICE, MODELS
from torch.profiler import ProfilerActivity, profile

import dsi


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="llama-7b", choices=sorted(MODELS))
    parser.add_argument("--batch", type=int, default=1)
    return parser.parse_args()


@torch.no_grad()
def main() -> int:
    given = arguments()
    model = MODELS[given.model].build()
    dsi.init_inference(model)
    ids = torch.randint(4, model.config.vocab_size, (given.batch, 128), device=DEVICE)
    for _ in range(2):
        model.generate(ids, max_new_tokens=24, do_sample=False)
    _, graph = next(iter(model._dsi.graphs._graphs.values()))
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
    kernels = sorted((event for event in recorded.events()), key=lambda event: event.time_range.start)
    third = len(kernels) // 3
    kernels = kernels[third : 2 * third]
    spent: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        spent[event.name].append(event.time_range.end - event.time_range.start)
    whole = kernels[-1].time_range.end - kernels[0].time_range.start
    for name, times in sorted(spent.items(), key=lambda item: -sum(item[1])):
        sys.stdout.write(f"{sum(times):9.1f} us  {len(times):4} x {sum(times) / len(times):7.2f}  {name[:90]}\n")
    busy = sum(map(sum, spent.values()))
    sys.stdout.write(f"{whole:9.1f} us  the step; {busy:.1f} in {third} kernels, {whole - busy:.1f} between them\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
