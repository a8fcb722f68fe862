"""Cases of the tables prefill, encoders and families: what a forward costs, and every family beside stock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from gpu_decode import Text, decode
from gpu_models import DEVICE, Pair, Stage, check_forward
from gpu_rivals import compiled_forward
from measure import Goal, Result, Sample, interleaved
from torch import Tensor, nn

import dsi

Peak = Mapping[str, float]


def _samples(contenders: Mapping[str, Callable[[], object]], *, rounds: int, budget: float = 20.0) -> dict[str, Sample]:
    # to the end of each call, as a caller who waits for it meets it
    times = interleaved(contenders, rounds=rounds, warmup=5, budget=budget, sync=torch.cuda.synchronize)
    return {contender: Sample.of(values) for contender, values in times.items()}


def _compile(model: Any, call: Callable[[Any], object]) -> tuple[Any, float]:
    """The compiled model, warm for this call, and what that took in seconds."""
    compiled = compiled_forward(model)
    started = time.perf_counter()
    # compiles, records its graph, replays it
    for _ in range(3):
        call(compiled)
    torch.cuda.synchronize()
    return compiled, time.perf_counter() - started


def _flops(model: Any, rows: int, tokens: int, *, causal: bool) -> float:
    """Of a forward that keeps the last position's logits, if it has any: products of the layers, and attention."""
    config = model.config
    outside = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    if (head := model.get_output_embeddings()) is not None:
        outside.add(id(head.weight))
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in outside)
    attention = 4 * tokens**2 * config.hidden_size * config.num_hidden_layers / (2 if causal else 1)
    return rows * (2 * tokens * weights + attention)


# --- prefill ------------------------------------------------------------------------------------------------------


def prefill(stage: Stage, model: str, tokens: int, *, quick: bool, peak: Peak, rivals: bool, bars: bool) -> Result:
    """A prompt's forward with its cache, the logits of the last position."""
    name, pair = f"{model} prefill 1x{tokens}", stage.pair(model)
    ids = pair.ids(1, tokens)

    def call(one: Any) -> Any:
        return one(ids, use_cache=True, logits_to_keep=1)

    check = check_forward(name, pair, call)
    contenders = {"stock": partial(call, pair.stock), "dsi": partial(call, pair.engine)}
    facts: dict[str, Any] = {"tokens": tokens}
    if rivals:
        compiled, facts["compile_seconds"] = _compile(pair.stock, call)
        contenders["torch.compile"] = partial(call, compiled)
    times = _samples(contenders, rounds=5 if quick else 15)
    rate = _flops(pair.stock, 1, tokens, causal=True) / times["dsi"].median / 1e9
    share = rate / peak["TFLOP/s bf16"]
    goals = (Goal(name="share of the product rate", found=share, bar=0.75),) if bars else ()
    return Result(
        name=name,
        unit="ms",
        times=times,
        bars={"torch.compile": 1.0} if rivals and bars else {},
        check=check,
        ceiling={"TFLOP/s": rate, "of the measured product rate": share},
        goals=goals,
        facts=facts,
    )


# --- encoders -----------------------------------------------------------------------------------------------------


def encoder(
    stage: Stage,
    shape: tuple[int, int],
    *,
    quick: bool,
    peak: Peak,
    rivals: bool,
    compiles: float = 0,
    most: float | None = None,
) -> Result:
    """BERT-base at one shape, all tokens real."""
    rows, tokens = shape
    name, pair = f"bert-base {rows}x{tokens}", _bert(stage)
    ids = pair.ids(rows, tokens)

    def call(one: Any) -> Any:
        return one(ids)

    check = check_forward(name, pair, call)
    contenders = {"stock": partial(call, pair.stock), "dsi": partial(call, pair.engine)}
    facts: dict[str, Any] = {"rows": rows, "tokens": tokens}
    if rivals:
        compiled, facts["compile_seconds"] = _compile(pair.stock, call)
        contenders["torch.compile"] = partial(call, compiled)
    times = _samples(contenders, rounds=20 if quick else 100, budget=8)
    ours = times["dsi"].median
    rate = _flops(pair.stock, rows, tokens, causal=False) / ours / 1e9
    return Result(
        name=name,
        unit="ms",
        times=times,
        bars={"torch.compile": compiles} if rivals and compiles else {},
        check=check,
        ceiling={"TFLOP/s": rate, "of the measured product rate": rate / peak["TFLOP/s bf16"]},
        goals=(Goal(name="ms", found=ours, bar=most, at_most=True),) if most is not None else (),
        facts=facts,
    )


def padded_encoder(stage: Stage, shape: tuple[int, int], *, quick: bool, peak: Peak, rivals: bool) -> Result:
    """BERT-base at one shape, half of the tokens padding, beside its own time without any."""
    rows, tokens = shape
    name, pair = f"bert-base {rows}x{tokens}, half padding", _bert(stage)
    ids, mask = pair.ids(rows, tokens), half_padding(rows, tokens)

    def call(one: Any) -> Any:
        return one(ids, attention_mask=mask)

    check = check_forward(name, pair, call, kept=mask.bool())
    contenders = {
        "stock": partial(call, pair.stock),
        "dsi": partial(call, pair.engine),
        "dsi, no padding": partial(pair.engine, ids),
        "dsi, mask of ones": partial(pair.engine, ids, attention_mask=torch.ones_like(mask)),
    }
    facts: dict[str, Any] = {"rows": rows, "tokens": tokens, "real": int(mask.sum())}
    if rivals:
        compiled, facts["compile_seconds"] = _compile(pair.stock, call)
        contenders["torch.compile"] = partial(call, compiled)
    times = _samples(contenders, rounds=20 if quick else 60, budget=8)
    return Result(
        name=name,
        unit="ms",
        times=times,
        bars={"dsi, no padding": 1.7},
        check=check,
        facts=facts,
    )


def _bert(stage: Stage) -> Pair:
    try:
        return stage.pair("bert-base", enable_cuda_graph=True)
    except dsi.ConfigError:
        return stage.pair("bert-base")


def half_padding(rows: int, tokens: int) -> Tensor:
    """int64 [rows, tokens]: rows of every length, evenly, on average half as long as the batch."""
    lengths = torch.linspace(tokens / rows, tokens * (rows - 1) / rows, rows, device=DEVICE).round().clamp(min=1)
    return (torch.arange(tokens, device=DEVICE)[None] < lengths[:, None]).long()


# --- families -----------------------------------------------------------------------------------------------------

DECODERS = ("gpt2-124m", "opt-1.3b", "llama-1b", "qwen3-0.6b", "gemma2-2b", "pythia-1.4b")


def family(stage: Stage, model: str, *, quick: bool, peak: Peak) -> Result:
    """One forward of 128 tokens beside stock."""
    name, pair = f"{model} forward 1x128", stage.pair(model)
    ids = pair.ids(1, 128)
    check = check_forward(name, pair, lambda one: one(ids))
    contenders = {"stock": partial(pair.stock, ids), "dsi": partial(pair.engine, ids)}
    times = _samples(contenders, rounds=10 if quick else 40, budget=4)
    return Result(name=name, unit="ms", times=times, bars={"stock": 1.0}, check=check)


# --- tables -------------------------------------------------------------------------------------------------------


def prefill_cases(stage: Stage, *, rivals: bool, **options: Any) -> dict[str, Callable[[], Result]]:
    def case(tokens: int, *, bars: bool) -> Callable[[], Result]:
        return partial(prefill, stage, "llama-7b", tokens, rivals=rivals and bars, bars=bars, **options)

    return {
        "llama-7b prefill 1x2048": case(2048, bars=True),
        "llama-7b prefill 1x512": case(512, bars=False),
        "llama-7b prefill 1x128": case(128, bars=False),
    }


def encoder_cases(stage: Stage, **options: Any) -> dict[str, Callable[[], Result]]:
    return {
        "bert-base 1x128": partial(encoder, stage, (1, 128), most=0.40, **options),
        "bert-base 8x128": partial(encoder, stage, (8, 128), compiles=1.4, **options),
        "bert-base 32x384": partial(encoder, stage, (32, 384), compiles=1.15, **options),
        "bert-base 32x384, half padding": partial(padded_encoder, stage, (32, 384), **options),
    }


def family_cases(stage: Stage, *, rivals: bool, **options: Any) -> dict[str, Callable[[], Result]]:
    cases: dict[str, Callable[[], Result]] = {}
    for model in DECODERS:
        text = Text(model=model, new=64, stock=1)
        cases[f"{model} forward 1x128"] = partial(family, stage, model, **options)
        cases[text.name] = partial(decode, stage, text, rivals=False, **options)
    return cases
