"""Cases of the table diffusion: a denoising step, a decoded picture, and whole pictures of Stable Diffusion.

What torch.compile is given is what diffusers' documentation advises: weights channels-last, CUDA graphs, no breaks.
Beside it stands stock in a CUDA graph, which is what taking away the host's time alone is worth. The cases run on a CPU
too, with tiny parts, which says that they work and nothing of speed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusion_models import (
    REAL,
    Inputs,
    Sizes,
    copied,
    decode,
    decoding,
    denoise,
    denoising,
    first_latents,
    picture,
    sdxl_of,
    unet_of,
    vae_of,
)
from diffusion_models import pipeline_of as parts_of
from gpu_decode import graph_times
from gpu_models import Stage
from gpu_rivals import Rivals, compiled_forward, tried
from measure import Goal, Refused, Result, Sample, check_rms, interleaved
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import dsi
from dsi.testing.compare import whole_fp32
from dsi_kernels.group_norm import group_norm, group_norm_reference

Peak = Mapping[str, float]
Forward = Callable[..., Tensor]
MIB = 2**20


# --- one part -----------------------------------------------------------------------------------------------------


class Part:
    """A part of a pipeline: stock, and dsi with the same weights.

    Args:
        stock: the part.
        forward: from a part and tensors to what it computes.
        given: those tensors.
        sizes: where and as what.
    """

    def __init__(self, stock: Any, forward: Forward, given: Inputs, sizes: Sizes) -> None:
        self.stock, self.forward, self.given, self.sizes = stock, forward, given, sizes
        started = time.perf_counter()
        ours = copy.deepcopy(stock)
        self.model = dsi.init_inference(ours).module
        self.seconds = time.perf_counter() - started

    def on(self, model: Any) -> Tensor:
        return self.forward(model, *self.given)

    def check(self, name: str, first: Tensor) -> dict[str, Any]:
        """Our error against float32 beside stock's own; refused above 1.2 times that.

        Of the first call, and of one with other values everywhere, which replays what the first may have recorded.
        """
        exact = copy.deepcopy(self.stock).float()
        others = tuple(one.flip(-1) if one.dim() else torch.full_like(one, 217) for one in self.given)
        found = []
        for given, ours in ((self.given, first), (others, self.forward(self.model, *others).clone())):
            with whole_fp32():
                wanted = self.forward(exact, *(one.float() if one.is_floating_point() else one for one in given))
            found.append(check_rms(name, wanted, self.forward(self.stock, *given), ours))
        return found[1] | {"ratio of the first call": found[0]["ratio"]}

    def flops(self) -> float:
        """Of one forward, by torch's own count."""
        with FlopCounterMode(display=False) as counter:
            self.on(self.stock)
        return float(counter.get_total_flops())

    def in_graph(self) -> dict[str, Callable[[], object]]:
        """Stock in a CUDA graph, over tensors that stay where they are."""
        if self.sizes.device != "cuda":
            return {}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.on(self.stock)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.on(self.stock)
        return {"stock in a CUDA graph": graph.replay}

    def compiled(self, facts: dict[str, Any]) -> dict[str, Callable[[], object]]:
        """Compiled, weights channels-last, warm; what that took in seconds goes into the facts."""
        started = time.perf_counter()
        twin = channels_last(copy.deepcopy(self.stock))

        def warm() -> Callable[[], object]:
            fast = compiled_forward(partial_of(self.forward, twin))
            # compiles, records its graph, replays it
            for _ in range(3):
                fast(*self.given)
            synchronize(self.sizes)
            return partial(fast, *self.given)

        call = tried(warm, facts)
        facts["compile_seconds"] = time.perf_counter() - started
        return {} if call is None else {"torch.compile": call}


def partial_of(forward: Forward, model: Any) -> Forward:
    """A plain function, as which torch.compile takes it whole."""

    def call(*given: Tensor) -> Tensor:
        return forward(model, *given)

    return call


def channels_last(part: Any) -> Any:
    return part.to(memory_format=torch.channels_last)


def synchronize(sizes: Sizes) -> None:
    if sizes.device == "cuda":
        torch.cuda.synchronize()


def highest(call: Callable[[], object], weights: int, sizes: Sizes) -> float | None:
    """MiB of the weights, and of what calls held beside them, the first one and its graph included; None on a CPU."""
    if sizes.device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    return (weights + torch.cuda.max_memory_allocated() - before) / MIB


def routes(*parts: Any) -> dict[str, str]:
    """How the latest forward of each part that has one of dsi's was carried out."""
    found = {}
    for part in parts:
        for path, module in part.named_modules():
            route = getattr(module.__dict__.get("_dsi"), "last_forward", None)
            if route is not None:
                found[path or type(part).__name__] = "graph" if route.graph else f"no graph: {route.reason}"
    return found


def _bytes(*parts: Any) -> int:
    return sum(parameter.nbytes for part in parts for parameter in part.parameters())


def _memory(stock: float | None, ours: float | None, facts: dict[str, Any]) -> tuple[Goal, ...]:
    if stock is None or ours is None:
        return ()
    facts["peak MiB"] = {"stock": stock, "dsi": ours}
    return (Goal(name="peak memory over stock's", found=ours / stock, bar=1.0, at_most=True),)


def _samples(contenders: Mapping[str, Callable[[], object]], sizes: Sizes, *, rounds: int) -> dict[str, Sample]:
    times = interleaved(contenders, rounds=rounds, warmup=2, budget=20, sync=partial(synchronize, sizes))
    return {contender: Sample.of(values) for contender, values in times.items()}


def component(
    stage: Stage,
    name: str,
    make: Callable[[Sizes], tuple[Any, Forward, Inputs]],
    sizes: Sizes,
    *,
    quick: bool,
    peak: Peak,
    rivals: Rivals,
    bars: Mapping[str, float],
    most: float | None = None,
) -> Result:
    """One part, waited for.

    Args:
        stage: whose memory is wanted.
        name: of the case.
        make: (the stock part, its forward, what it is given).
        sizes, quick, peak, rivals: as of every case.
        bars: how many times as fast as a contender.
        most: milliseconds it may take.
    """
    stage.clear()
    part = Part(*make(sizes), sizes)
    facts: dict[str, Any] = {"ready_seconds": part.seconds, "dtype": str(sizes.dtype)}
    weights = _bytes(part.stock)
    started = time.perf_counter()
    first: list[Tensor] = []
    ours = highest(lambda: first.append(part.on(part.model).clone()), weights, sizes)
    facts["seconds of the first calls"] = time.perf_counter() - started
    goals = _memory(highest(lambda: part.on(part.stock).clone(), weights, sizes), ours, facts)
    check = part.check(name, first[0] if first else part.on(part.model).clone())
    contenders: dict[str, Callable[[], object]] = {
        "stock": partial(part.on, part.stock),
        **part.in_graph(),
        "dsi": partial(part.on, part.model),
    }
    if rivals.meet(bars.get("torch.compile", 0)):
        contenders |= part.compiled(facts)
    facts["routes"] = routes(part.model)
    flops = part.flops()
    times = _samples(contenders, sizes, rounds=3 if quick else 20)
    if most is not None:
        goals = (Goal(name="ms", found=times["dsi"].median, bar=most, at_most=True), *goals)
    rate = flops / times["dsi"].median / 1e9
    share = rate / next(value for key, value in peak.items() if key.startswith("TFLOP/s"))
    return Result(
        name=name,
        unit="ms",
        times=times,
        bars={contender: bar for contender, bar in bars.items() if contender in times},
        check=check,
        ceiling={"TFLOP/s": rate, "of the measured product rate": share},
        goals=goals,
        facts=facts,
    )


def _sd(sizes: Sizes) -> tuple[Any, Forward, Inputs]:
    return unet_of(sizes), denoise, denoising(sizes, sizes.unet, sizes.latents)


def _sdxl(sizes: Sizes) -> tuple[Any, Forward, Inputs]:
    return sdxl_of(sizes), denoise, denoising(sizes, sizes.sdxl, sizes.sdxl_latents)


def _vae(side: int, sizes: Sizes) -> tuple[Any, Forward, Inputs]:
    return vae_of(sizes), decode, decoding(sizes, side)


# --- whole pictures -----------------------------------------------------------------------------------------------


def pictures(stage: Stage, name: str, sizes: Sizes, *, quick: bool, peak: Peak, rivals: Rivals) -> Result:
    """A pipeline from a text to a picture; our first picture is counted from the pipeline as it was loaded."""
    stage.clear()
    stock = parts_of(sizes)
    ours = copied(stock, copy.deepcopy)
    latents, steps = first_latents(sizes), sizes.steps
    weights = _bytes(stock.unet, stock.vae, stock.text_encoder)
    started = time.perf_counter()
    engine = dsi.init_inference(ours, dtype=sizes.dtype)
    facts: dict[str, Any] = {"steps": steps, "ready_seconds": time.perf_counter() - started}
    high = highest(lambda: picture(engine, latents, 2), weights, sizes)
    picture(engine, latents, steps)
    synchronize(sizes)
    first = facts["seconds to the first picture"] = time.perf_counter() - started
    goals = _memory(highest(lambda: picture(stock, latents, 2), weights, sizes), high, facts)
    goals = (Goal(name="seconds to the first picture", found=first, bar=20, at_most=True), *goals)
    check = _check_pictures(name, stock, engine, latents, steps)
    contenders = {"stock": partial(picture, stock, latents, steps), "dsi": partial(picture, engine, latents, steps)}
    if rivals.meet(1.2):
        contenders |= _compiled_pipeline(stock, latents, sizes, facts)
    times = _samples(contenders, sizes, rounds=2 if quick else 5)
    facts["routes"] = routes(ours.unet, ours.vae, ours.text_encoder)
    facts["ms a step"] = _a_step({"stock": stock, "dsi": engine}, latents, sizes, rounds=1 if quick else 3)
    bars = {contender: bar for contender, bar in {"stock": 4.0, "torch.compile": 1.2}.items() if contender in times}
    return Result(name=name, unit="ms", times=times, bars=bars, check=check, goals=goals, facts=facts)


def _check_pictures(name: str, stock: Any, engine: Any, latents: Tensor, steps: int) -> dict[str, Any]:
    """The latents behind every step, and the picture, beside a float32 pipeline with the same weights."""
    exact = copied(stock, lambda part: copy.deepcopy(part).float())
    kept: dict[str, list[Tensor]] = {"exact": [], "stock": [], "dsi": []}
    with whole_fp32():
        pictured = {"exact": picture(exact, latents.float(), steps, kept["exact"])}
    pictured |= {who: picture(pipe, latents, steps, kept[who]) for who, pipe in (("stock", stock), ("dsi", engine))}
    ratios = [
        check_rms(f"{name}, latents of step {step + 1}", *found)["ratio"]
        for step, found in enumerate(zip(*kept.values(), strict=True))
    ]
    if len(ratios) != steps:
        raise Refused(f"{name}: {len(ratios)} steps were seen of {steps}")
    found = check_rms(f"{name}, the picture", *pictured.values())
    return found | {"worst ratio of a step's latents": max(ratios)}


def _compiled_pipeline(
    stock: Any, latents: Tensor, sizes: Sizes, facts: dict[str, Any]
) -> dict[str, Callable[[], object]]:
    """The pipeline with its denoiser and its decoder compiled, as diffusers' documentation has it."""
    started = time.perf_counter()

    def warm() -> Any:
        pipe = copied(stock, lambda part: channels_last(copy.deepcopy(part)))
        pipe.unet = compiled_forward(pipe.unet)
        options: dict[str, Any] = {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}
        pipe.vae.decode = torch.compile(pipe.vae.decode, **options)
        for _ in range(3):
            picture(pipe, latents, 3)
        synchronize(sizes)
        return pipe

    pipe = tried(warm, facts)
    facts["compile_seconds"] = time.perf_counter() - started
    return {} if pipe is None else {"torch.compile": partial(picture, pipe, latents, sizes.steps)}


def _a_step(pipes: Mapping[str, Any], latents: Tensor, sizes: Sizes, *, rounds: int) -> dict[str, float]:
    """Milliseconds: what more steps take beyond fewer, at best."""
    found = {}
    few = max(1, sizes.steps // 5)
    for who, pipe in pipes.items():
        calls = {str(count): partial(picture, pipe, latents, count) for count in (few, sizes.steps)}
        times = interleaved(calls, rounds=rounds, warmup=0, sync=partial(synchronize, sizes))
        found[who] = (min(times[str(sizes.steps)]) - min(times[str(few)])) / (sizes.steps - few)
    return found


# --- group norm ---------------------------------------------------------------------------------------------------


def norm(stage: Stage, name: str, *, quick: bool, peak: Peak) -> Result:
    """GroupNorm and SiLU of the VAE's largest map of 512 channels' width, 128 MiB: three times its bytes are moved."""
    stage.clear()
    shape, groups = (1, 256, 512, 512), 32
    x = torch.randn(shape, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last)
    weight, bias = (torch.randn(shape[1], device="cuda", dtype=x.dtype) for _ in range(2))

    def ours(_: int = 0) -> Tensor:
        return group_norm(x, weight, bias, groups, silu=True)[0]

    # in the layout of stock pipelines, which torch's own kernel is faster at
    plain = x.contiguous()

    def stock(_: int = 0) -> Tensor:
        return torch.nn.functional.silu(torch.nn.functional.group_norm(plain, groups, weight, bias))

    exact = group_norm_reference(x.float(), weight.float(), bias.float(), groups, silu=True)
    check = check_rms(name, exact[0] if isinstance(exact, tuple) else exact, stock(), ours())
    times = {who: Sample.of(graph_times(call, 4, quick=quick)) for who, call in (("stock", stock), ("dsi", ours))}
    rate = 3 * x.nbytes / times["dsi"].median / 1e6
    goal = Goal(name="share of copy", found=rate / peak["GB/s copy"], bar=0.75)
    return Result(
        name=name, unit="ms", times=times, bars={"stock": 1.0}, check=check, ceiling={"GB/s": rate}, goals=(goal,)
    )


# --- table --------------------------------------------------------------------------------------------------------


def diffusion_cases(
    stage: Stage, *, sizes: Sizes = REAL, rivals: Rivals, **options: Any
) -> dict[str, Callable[[], Result]]:
    """The cases by name: parts first, then the pipeline; the group norm's kernel where there is CUDA."""

    def part(name: str, make: Any, most: float | None = None, **bars: float) -> Callable[[], Result]:
        wanted = {contender.replace("_", "."): bar for contender, bar in bars.items()}
        return partial(component, stage, name, make, sizes, rivals=rivals, bars=wanted, most=most, **options)

    small, large = sizes.images
    cases: dict[str, Callable[[], Result]] = {}

    def add(name: str, *args: Any, **bars: float) -> None:
        cases[name] = part(name, *args, **bars)

    add(f"sd1.5-unet 2x{sizes.latents}x{sizes.latents}", _sd, 5.5, torch_compile=1.25)
    add(f"sd-vae decode {8 * small}", partial(_vae, small), 6.4, torch_compile=1.2)
    add(f"sd-vae decode {8 * large}", partial(_vae, large), stock=3.0, torch_compile=1.15)
    add(f"sdxl-unet 2x{sizes.sdxl_latents}x{sizes.sdxl_latents}", _sdxl, torch_compile=1.10)
    name = f"sd1.5-picture {8 * sizes.latents}, {sizes.steps} steps"
    cases[name] = partial(pictures, stage, name, sizes, rivals=rivals, **options)
    if sizes.device == "cuda":
        cases["group-norm 1x256x512x512"] = partial(norm, stage, "group-norm 1x256x512x512", **options)
    return cases
