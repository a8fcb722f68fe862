"""Cases of the tables prefill, encoders and families: what a forward costs, and every family beside stock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from gpu_decode import Text, decode
from gpu_models import DEVICE, Stage, check_forward, check_steps
from gpu_rivals import Rivals, compiled_forward, tried
from measure import Goal, Result, Sample, interleaved
from torch import Tensor, nn

Peak = Mapping[str, float]


# calls one behind the other, so that the host's time hides behind the device's where it is the less
IN_A_ROW = 10


def _samples(contenders: Mapping[str, Callable[[], object]], *, rounds: int, budget: float = 20.0) -> dict[str, Sample]:
    """Of each call, to its end, as a caller who waits for it meets it."""
    times = interleaved(contenders, rounds=rounds, warmup=3, budget=budget, sync=torch.cuda.synchronize)
    return {contender: Sample.of(values) for contender, values in times.items()}


def _streams(contenders: Mapping[str, Callable[[], object]], *, rounds: int, budget: float) -> dict[str, Sample]:
    """Of one call of many in a row, whose end nobody waits for."""

    def in_a_row(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(IN_A_ROW):
                call()

        return run

    rows = {contender: in_a_row(call) for contender, call in contenders.items()}
    times = interleaved(rows, rounds=rounds, warmup=2, budget=budget, sync=torch.cuda.synchronize)
    return {contender: Sample.of([value / IN_A_ROW for value in values]) for contender, values in times.items()}


def _compiled(model: Any, call: Callable[[Any], object], facts: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """The compiled model as a contender, warm for this call; what that took in seconds goes into the facts."""
    started = time.perf_counter()

    def warm() -> Any:
        compiled = compiled_forward(model)
        # compiles, records its graph, replays it
        for _ in range(3):
            call(compiled)
        torch.cuda.synchronize()
        return compiled

    compiled = tried(warm, facts)
    if compiled is None:
        return {}
    facts["compile_seconds"] = time.perf_counter() - started
    return {"torch.compile": partial(call, compiled)}


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


def prefill(stage: Stage, model: str, tokens: int, *, quick: bool, peak: Peak, rivals: Rivals, bars: bool) -> Result:
    """A prompt's forward with its cache, the logits of the last position."""
    name, pair = f"{model} prefill 1x{tokens}", stage.pair(model)
    ids = pair.ids(1, tokens)

    def call(one: Any) -> Any:
        return one(ids, use_cache=True, logits_to_keep=1)

    check = check_forward(name, pair, call)
    contenders = {"stock": partial(call, pair.stock), "dsi": partial(call, pair.engine)}
    facts: dict[str, Any] = {"tokens": tokens}
    if rivals.meet(float(bars)):
        contenders |= _compiled(pair.stock, call, facts)
    times = _samples(contenders, rounds=5 if quick else 15)
    rate = _flops(pair.stock, 1, tokens, causal=True) / times["dsi"].median / 1e9
    share = rate / peak["TFLOP/s bf16"]
    goals = (Goal(name="share of the product rate", found=share, bar=0.75),) if bars else ()
    return Result(
        name=name,
        unit="ms",
        times=times,
        bars={"torch.compile": 1.0} if "torch.compile" in contenders else {},
        check=check,
        ceiling={"TFLOP/s": rate, "of the measured product rate": share},
        goals=goals,
        facts=facts,
    )


def first_token(stage: Stage, model: str, tokens: int, *, quick: bool, peak: Peak) -> Result:
    """What a user of `generate` waits for first."""
    name, pair = f"{model} first token 1x{tokens}", stage.pair(model)
    ids = pair.ids(1, tokens)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 1, "do_sample": False}
    check = check_steps(name, pair, ids, steps=1)
    contenders = {
        who: partial(one.generate, ids, **settings) for who, one in (("stock", pair.stock), ("dsi", pair.engine))
    }
    times = _samples(contenders, rounds=5 if quick else 15)
    rate = _flops(pair.stock, 1, tokens, causal=True) / times["dsi"].median / 1e9
    return Result(
        name=name, unit="ms", times=times, bars={}, check=check, ceiling={"TFLOP/s": rate}, facts={"tokens": tokens}
    )


# --- encoders -----------------------------------------------------------------------------------------------------


def encoder(
    stage: Stage,
    shape: tuple[int, int],
    *,
    quick: bool,
    peak: Peak,
    rivals: Rivals,
    compiles: float = 0,
    most: float | None = None,
    padded: bool = False,
) -> Result:
    """BERT-base at one shape: calls in a row, and as a fact a call that is waited for.

    Args:
        stage, quick, peak, rivals: as of every case.
        shape: rows and tokens.
        compiles: how many times as fast as the compiled model; 0 sets no bar.
        most: milliseconds it may take.
        padded: half of the tokens are padding, beside our own time without any.
    """
    rows, tokens = shape
    name, pair = f"bert-base {rows}x{tokens}{', half padding' if padded else ''}", stage.pair("bert-base")
    ids = pair.ids(rows, tokens)
    mask = half_padding(rows, tokens) if padded else None

    def call(one: Any, given: Tensor | None) -> Any:
        return one(ids) if given is None else one(ids, attention_mask=given)

    check = check_forward(name, pair, partial(call, given=mask), kept=None if mask is None else mask.bool())
    contenders = {"stock": partial(call, pair.stock, mask), "dsi": partial(call, pair.engine, mask)}
    if padded:
        contenders["dsi, no padding"] = partial(call, pair.engine, None)
    facts: dict[str, Any] = {"rows": rows, "tokens": tokens, "real": rows * tokens if mask is None else int(mask.sum())}
    # the bar of one row is a time, that of padding our own: both were set after the compiled model's
    if rivals.meet(1):
        contenders |= _compiled(pair.stock, partial(call, given=mask), facts)
    rounds = 10 if quick else 30
    times = _streams(contenders, rounds=rounds, budget=6)
    waited = _samples({"dsi": contenders["dsi"]}, rounds=rounds, budget=3)["dsi"]
    route = pair.engine.module._dsi.last_forward
    facts |= {"graph": route.graph, "packed": route.packed, "no_graph_because": route.reason}
    ours = times["dsi"].median
    rate = _flops(pair.stock, rows, tokens, causal=False) / ours / 1e9
    wanted = {"torch.compile": compiles, "dsi, no padding": 1.7}
    bars = {contender: bar for contender, bar in wanted.items() if bar and contender in contenders}
    return Result(
        name=name,
        unit="ms",
        times=times,
        bars=bars,
        check=check,
        ceiling={"TFLOP/s, padding counted": rate, "ms if waited for": waited.median},
        goals=(Goal(name="ms", found=ours, bar=most, at_most=True),) if most is not None else (),
        facts=facts,
    )


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


def prefill_cases(stage: Stage, *, rivals: Rivals, **options: Any) -> dict[str, Callable[[], Result]]:
    def case(tokens: int, *, bars: bool) -> Callable[[], Result]:
        return partial(prefill, stage, "llama-7b", tokens, rivals=rivals, bars=bars, **options)

    lengths = (2048, 512, 128)
    whole = {f"llama-7b prefill 1x{tokens}": case(tokens, bars=tokens == max(lengths)) for tokens in lengths}
    return whole | {
        f"llama-7b first token 1x{tokens}": partial(first_token, stage, "llama-7b", tokens, **options)
        for tokens in lengths
    }


def encoder_cases(stage: Stage, **options: Any) -> dict[str, Callable[[], Result]]:
    return {
        "bert-base 1x128": partial(encoder, stage, (1, 128), most=0.40, **options),
        "bert-base 8x128": partial(encoder, stage, (8, 128), compiles=1.4, **options),
        "bert-base 32x384": partial(encoder, stage, (32, 384), compiles=1.15, **options),
        "bert-base 32x384, half padding": partial(encoder, stage, (32, 384), padded=True, **options),
    }


def family_cases(stage: Stage, *, rivals: Rivals, **options: Any) -> dict[str, Callable[[], Result]]:
    cases: dict[str, Callable[[], Result]] = {}
    for model in DECODERS:
        text = Text(model=model, new=64, stock=1)
        cases[f"{model} forward 1x128"] = partial(family, stage, model, **options)
        cases[text.name] = partial(decode, stage, text, rivals=Rivals.NONE, **options)
    return cases
