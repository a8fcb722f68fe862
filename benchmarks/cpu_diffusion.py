"""Cases of benchmarks/cpu.py for Stable Diffusion's denoiser: one step of two rows at 32 x 32 latents."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial

import attrs
import torch
from diffusion_models import REAL, TINY, denoise, denoising, unet_of
from measure import Result, Sample, check_fp32, check_rms, interleaved
from torch.utils.flop_counter import FlopCounterMode

import dsi

SIDE = 32
SIZES = {"tiny-unet": TINY, "sd1.5-unet": REAL}
BAR = 1.2


def unet(name: str, dtype_name: str, dtype: torch.dtype, *, quick: bool, peak: Mapping[str, float]) -> Result:
    """A step of the tiny or of Stable Diffusion 1.5's whole denoiser beside stock.

    Args:
        name: of `SIZES`.
        dtype_name, dtype: of weights and latents.
        quick: few rounds.
        peak: what this machine can do.
    """
    case = f"{name} {dtype_name} 2x{SIDE}x{SIDE}"
    sizes = attrs.evolve(SIZES[name], device="cpu", dtype=dtype)
    stock = unet_of(sizes)
    given = denoising(sizes, sizes.unet, SIDE)
    if dtype is not torch.float32:
        # before ours is made: three of them would be 10 GB
        exact = denoise(copy.deepcopy(stock).float(), *(x.float() if x.is_floating_point() else x for x in given))
    ours = dsi.init_inference(copy.deepcopy(stock)).module
    known, found = denoise(stock, *given), denoise(ours, *given)
    check = check_fp32(case, known, found) if dtype is torch.float32 else check_rms(case, exact, known, found)
    with FlopCounterMode(display=False) as counter:
        denoise(stock, *given)
    contenders = {"stock": partial(denoise, stock, *given), "dsi": partial(denoise, ours, *given)}
    times = interleaved(contenders, rounds=3 if quick else 15, warmup=1, budget=20 if quick else 60)
    samples = {contender: Sample.of(values) for contender, values in times.items()}
    rate = counter.get_total_flops() / samples["dsi"].median / 1e6
    # without bfloat16 instructions the way to be fast is float32, and its peak is the higher one
    best = max(peak["GFLOP/s fp32"], peak[f"GFLOP/s {dtype_name}"])
    return Result(
        name=case,
        unit="ms",
        times=samples,
        bars={"stock": BAR},
        check=check,
        ceiling={"GFLOP/s": rate, "of the measured peak": rate / best},
    )


def diffusion_cases(dtypes: Mapping[str, torch.dtype], **options: object) -> dict[str, Callable[[], Result]]:
    """Every size in every dtype, by name."""
    return {
        f"{name} {dtype_name}": partial(unet, name, dtype_name, dtype, **options)
        for name in SIZES
        for dtype_name, dtype in dtypes.items()
    }
