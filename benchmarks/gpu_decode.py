"""Cases of the tables decode, sampling and context: what a token costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import attrs
import torch
from gpu_models import DEVICE, Pair, Stage, check_route, check_steps
from gpu_rivals import CompiledLoop, Rivals, tried
from measure import Goal, Refused, Result, Sample, Writer, check_rms, token_times
from torch import Tensor

import dsi_kernels

Peak = Mapping[str, float]
# a token of stock `generate` takes 20 to 50 ms: so many of them are timed
STOCK_NEW = 17


@attrs.frozen(kw_only=True)
class Text:
    """A text to be written greedily, and what that must cost at most.

    Args:
        model: of `gpu_models.MODELS`.
        batch, prompt, new: rows, tokens of the prompt, tokens written.
        share: of the floor that must be reached.
        compiles: how many times as fast as the compiled loop; None leaves that loop out, 0 sets no bar (`Rivals.ALL`).
        stock: how many times as fast as stock `generate`; None leaves stock out, 0 sets no bar.
        step: milliseconds that a step may take.
        single: how many times the step of one row a step may take.
        tune: coordinate descent for the compiled loop.
    """

    model: str
    batch: int = 1
    prompt: int = 128
    new: int = 128
    share: float | None = None
    compiles: float | None = None
    stock: float | None = 0
    step: float | None = None
    single: float | None = None
    tune: bool = False

    @property
    def name(self) -> str:
        return f"{self.model} {self.batch}x{self.prompt}+{self.new}"


SHORT = {"model": "llama-7b", "prompt": 32, "new": 64}
TEXTS = (
    # 128 + 128 new is the text of the bars; the compiled loop is tuned for it
    Text(model="llama-7b", share=0.88, compiles=1.2, stock=7, tune=True),
    Text(**SHORT, batch=1, compiles=0),
    Text(**SHORT, batch=2, stock=None),
    Text(**SHORT, batch=4, stock=None),
    Text(**SHORT, batch=8, single=1.12, compiles=0),
    Text(**SHORT, batch=16, stock=None),
    Text(**SHORT, batch=32, single=1.40, compiles=0),
    # a context of at most 160
    Text(model="llama-1b", prompt=32, share=None, step=0.760, compiles=0),
    Text(model="llama-8b", share=0.87),
    Text(model="opt-6.7b", share=0.85),
    Text(model="gpt2-xl", share=0.65),
)
# of the smallest model, where keys and values are soon as much as the weights
CONTEXTS = tuple(
    Text(model="llama-1b", prompt=prompt, new=64, compiles=0 if prompt == 8192 else None)
    for prompt in (128, 2048, 8192, 32768)
)


def decode(stage: Stage, text: Text, *, quick: bool, peak: Peak, rivals: Rivals) -> Result:
    """Greedy decoding: milliseconds a token, and the share of the time that reading weights and cache takes."""
    pair = stage.pair(text.model)
    ids, new = pair.ids(text.batch, text.prompt), 32 if quick else text.new
    check = check_steps(text.name, pair, ids)
    check_route(text.name, pair)
    rounds = 3 if quick else 5
    writers = {"dsi": Writer(write=_writer(pair.engine, ids), long=new, rounds=rounds)}
    if text.stock is not None:
        writers["stock"] = Writer(write=_writer(pair.stock, ids), long=STOCK_NEW, rounds=2)
    if text.single is not None:
        writers["dsi, one row"] = Writer(write=_writer(pair.engine, ids[:1]), long=new, rounds=rounds)
    facts: dict[str, Any] = {"rows": text.batch, "prompt": text.prompt, "new": new, "stock_new": STOCK_NEW}
    loop = None
    if rivals.meet(text.compiles):
        tune = text.tune and not quick
        loop = tried(lambda: CompiledLoop(pair.stock, ids, text.prompt + new, tune=tune), facts)
    if loop is not None:
        writers["torch.compile"] = Writer(write=loop, long=new, rounds=rounds)
        facts["compile_seconds"] = loop.seconds
        # not a bar: rounding differs, and one other token changes all that follow
        facts["tokens_as_compiled"] = (loop(16) == writers["dsi"].write(16)).double().mean().item()
    times = token_times(writers, sync=torch.cuda.synchronize)
    context = text.prompt + new / 2
    bytes_read = pair.weight_bytes() + text.batch * context * pair.position_bytes()
    floor = bytes_read / peak["GB/s copy"] / 1e6
    shares = {name: floor / sample.median for name, sample in times.items() if "one row" not in name}
    facts |= {"context": context, "bytes_read": bytes_read, "floor_ms": floor, "shares": shares}
    return Result(
        name=text.name,
        unit="ms/token",
        times=times,
        bars=_bars(text, times),
        check=check,
        ceiling={f"of the floor by {name}": share for name, share in shares.items()},
        goals=tuple(_goals(text, times, shares["dsi"])),
        facts=facts,
    )


def _writer(model: Any, ids: Tensor, **settings: Any) -> Callable[[int], Tensor]:
    mask = torch.ones_like(ids)
    settings = {"do_sample": False, **settings}
    return lambda count: model.generate(ids, attention_mask=mask, max_new_tokens=count, **settings)


def _bars(text: Text, times: Mapping[str, Sample]) -> dict[str, float]:
    wanted = {"stock": text.stock, "torch.compile": text.compiles}
    return {name: bar for name, bar in wanted.items() if bar and name in times}


def _goals(text: Text, times: Mapping[str, Sample], share: float) -> Iterator[Goal]:
    ours = times["dsi"].median
    if text.share is not None:
        yield Goal(name="share of the floor", found=share, bar=text.share)
    if text.step is not None:
        yield Goal(name="ms a step", found=ours, bar=text.step, at_most=True)
    if text.single is not None:
        found = ours / times["dsi, one row"].median
        yield Goal(name="times the step of one row", found=found, bar=text.single, at_most=True)


# --- sampling -----------------------------------------------------------------------------------------------------

DRAWS = {
    "temperature": {"temperature": 0.8, "top_k": 0},
    "top-k": {"temperature": 0.8, "top_k": 50},
    "top-p": {"temperature": 0.8, "top_k": 0, "top_p": 0.9},
    "top-k top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
}


def sampling(stage: Stage, model: str, *, bar: float | None, quick: bool, peak: Peak) -> Result:
    """What drawing a token costs beyond the greedy choice."""
    name = f"{model} 1x128+128 sampled"
    pair = stage.pair(model)
    ids, new = pair.ids(1, 128), 32 if quick else 128
    check = check_steps(name, pair, ids) | _check_draws(name, pair, ids)
    rounds = 3 if quick else 5
    greedy = _writer(pair.engine, ids)
    writers = {"dsi greedy": Writer(write=greedy, long=new, rounds=rounds)}
    for kind, settings in DRAWS.items():
        drawn = _writer(pair.engine, ids, do_sample=True, **settings)
        writers[f"dsi {kind}"] = Writer(write=drawn, long=new, rounds=rounds)
    drawn = _writer(pair.stock, ids, do_sample=True, **DRAWS["top-k top-p"])
    writers["stock"] = Writer(write=drawn, long=STOCK_NEW, rounds=2)
    times = token_times(writers, sync=torch.cuda.synchronize)
    base = times["dsi greedy"].median
    found = {kind: times[f"dsi {kind}"].median / base for kind in DRAWS}
    goals = tuple(
        Goal(name=f"{kind}, times greedy", found=ratio, bar=bar, at_most=True) for kind, ratio in found.items() if bar
    )
    # the last and slowest of them stands for us
    times = {("dsi" if kind == "dsi top-k top-p" else kind): sample for kind, sample in times.items()}
    facts = {"times_greedy": found, "settings": {kind: dict(settings) for kind, settings in DRAWS.items()}}
    return Result(name=name, unit="ms/token", times=times, bars={}, check=check, goals=goals, facts=facts)


def _check_draws(name: str, pair: Pair, ids: Tensor) -> dict[str, Any]:
    greedy = _writer(pair.engine, ids)(16)
    only = _writer(pair.engine, ids, do_sample=True, top_k=1)(16)
    if not torch.equal(greedy, only):
        raise Refused(f"{name}: drawn from the likeliest token alone, the text is not the greedy one")
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(_writer(pair.engine, ids, do_sample=True, **DRAWS["top-k top-p"])(16))
    if not torch.equal(*drawn):
        raise Refused(f"{name}: one seed draws two texts")
    return {"top_k_1_is_greedy": True, "seed_repeats": True}


# --- attention alone ----------------------------------------------------------------------------------------------


LENGTHS = (8192, 32768)


def attention(heads: int, kv_heads: int, width: int, length: int, *, quick: bool, peak: Peak) -> Result:
    """The attention of a decode step of one row by itself, in a graph over caches that the L2 does not hold."""
    name = f"attention {heads}/{kv_heads}x{width} at {length}"
    options = {"device": DEVICE, "dtype": torch.bfloat16}
    torch.manual_seed(0)
    # as many of its layers as make 640 MB, a multiple of the L2 cache
    count = max(2, -(-(640 << 20) // (4 * kv_heads * length * width)))
    caches = [torch.randn(2, 1, kv_heads, length, width, **options) for _ in range(count)]
    qkv = torch.randn(1, (heads + 2 * kv_heads) * width, **options)
    start, tickets = torch.tensor(length - 1, device=DEVICE), torch.zeros(kv_heads, dtype=torch.int32, device=DEVICE)

    def step(index: int) -> Tensor:
        # the new position's key and value are written, then seen
        return dsi_kernels.step_attention(qkv, *caches[index], start, heads, kv_heads, tickets=tickets)

    found = step(0).view(1, heads, 1, width)
    q, keys, values = qkv[:, : heads * width].view(1, heads, 1, width), *caches[0]
    stock = torch.nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=heads != kv_heads)
    exact = torch.nn.functional.scaled_dot_product_attention(
        q.float(), *(x.float().repeat_interleave(heads // kv_heads, 1) for x in (keys, values))
    )
    check = check_rms(name, exact, stock, found)
    times = graph_times(step, count, quick=quick)
    milliseconds = Sample.of(times)
    rate = caches[0].nbytes / milliseconds.median / 1e6
    share = rate / peak["GB/s copy"]
    return Result(
        name=name,
        unit="ms",
        times={"dsi": milliseconds},
        bars={},
        check=check,
        ceiling={"GB/s": rate, "of the measured copy bandwidth": share},
        goals=(Goal(name="share of copy", found=share, bar=0.80),),
        facts={"caches": count, "bytes_read": caches[0].nbytes},
    )


def graph_times(step: Callable[[int], object], count: int, *, quick: bool) -> list[float]:
    """Milliseconds of one of `count` steps, from replays of a graph that holds them all."""
    step(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            step(index)
    return [milliseconds / count for milliseconds in _between_events(graph.replay, quick=quick)]


def stream_times(step: Callable[[int], object], count: int, *, quick: bool) -> list[float]:
    """Milliseconds of one of `count` steps that are launched one behind the other."""

    def run() -> None:
        for index in range(count):
            step(index)

    return [milliseconds / count for milliseconds in _between_events(run, quick=quick)]


def _between_events(run: Callable[[], object], *, quick: bool) -> list[float]:
    times = []
    for turn in range((5 if quick else 15) + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if turn >= 3:
            times.append(start.elapsed_time(end))
    return times


# --- tables -------------------------------------------------------------------------------------------------------


def decode_cases(stage: Stage, *, rivals: Rivals, **options: Any) -> dict[str, Callable[[], Result]]:
    return {text.name: partial(decode, stage, text, rivals=rivals, **options) for text in TEXTS}


def sampling_cases(stage: Stage, *, rivals: Rivals, **options: Any) -> dict[str, Callable[[], Result]]:
    return {
        "llama-7b sampled": partial(sampling, stage, "llama-7b", bar=1.03, **options),
        "llama-1b sampled": partial(sampling, stage, "llama-1b", bar=None, **options),
    }


def context_cases(stage: Stage, *, rivals: Rivals, **options: Any) -> dict[str, Callable[[], Result]]:
    shapes = [(heads, kv, width, length) for heads, kv, width in ((32, 32, 128), (32, 8, 128)) for length in LENGTHS]
    alone = {
        f"attention {heads}/{kv}x{width} at {length}": partial(attention, heads, kv, width, length, **options)
        for heads, kv, width, length in shapes
    }
    return alone | {text.name: partial(decode, stage, text, rivals=rivals, **options) for text in CONTEXTS}
