"""Do layers of maps compute what stock computes, at every size, in every layout, and from step to step?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dsi.testing.compare import check_same, forward, same_bits, whole_fp32
from dsi.testing.inputs import ReadsMaps
from dsi.testing.report import Failed, Outcome, absent, passed
from dsi.testing.subject import Subject

STEPS = 5
"""Of a loop as samplers run it."""

_NO_MAPS = "the model reads no maps"
# rows, height, width: odd and unlike
SIZES = ((2, 5, 7), (1, 7, 6), (3, 3, 9), (2, 9, 9))


def map_sizes(subject: Subject) -> Outcome:
    """Maps whose sides are odd, unlike and tiny, of one row and several."""
    reads = subject.reads
    if not isinstance(reads, ReadsMaps):
        return absent(_NO_MAPS)
    pair, worst = subject.twins(), 0.0
    # at which the last level but one has odd sides; sides smaller than the model divides by leave nothing
    unit = max(1, reads.factor // 2)
    for rows, height, width in ((rows, unit * height, unit * width) for rows, height, width in SIZES):
        before = pair.calls()[1]
        inputs = reads.maps(rows, height, width, seed=height)
        worst = max(
            worst,
            check_same(
                *subject.both(pair, inputs),
                subject.tolerances.fp32,
                what=f"fp32, {rows} maps of {height} x {width}",
                mend="take every size from the call: sides need not be even, alike, or what a layer saw before",
            ),
        )
        if pair.calls()[1] != before:
            raise Failed(
                f"{rows} maps of {height} x {width}",
                measured=f"{pair.calls()[1] - before} stock calls",
                allowed="0 stock calls",
                mend="take every size from the call",
            )
    return passed("odd and unlike sides equal stock's", measured=worst, allowed=subject.tolerances.fp32)


def map_layouts(subject: Subject) -> Outcome:
    """The same values side by side by channels, by pixels, and as a part of more memory; none of them written to."""
    reads = subject.reads
    if not isinstance(reads, ReadsMaps):
        return absent(_NO_MAPS)
    pair, worst = subject.twins(), 0.0
    inputs = subject.inputs(2, 5, seed=3)
    wanted = forward(pair.stock, inputs)
    for layout, laid in _layouts(inputs[reads.name]):
        before = laid.clone()
        with torch.no_grad():
            found = pair.model(**{**inputs, reads.name: laid})
        worst = max(
            worst,
            check_same(
                found,
                wanted,
                subject.tolerances.fp32,
                what=f"a map that is {layout}",
                mend="ask for the layout that is needed (dsi.containers.conv.channels_last), and assume none",
            ),
        )
        if not same_bits(laid, before):
            raise Failed(
                f"a map that is {layout}",
                measured="written to",
                allowed="as it was",
                mend="write over nothing that a caller gave",
            )
    return passed("maps of every layout equal stock's", measured=worst, allowed=subject.tolerances.fp32)


def _layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "contiguous", x.contiguous()
    yield "channels-last", x.contiguous(memory_format=torch.channels_last)
    wide = x.new_zeros(x.shape[0], x.shape[1] + 1, x.shape[2] + 2, x.shape[3] + 3)
    wide[:, 1:, 1:-1, 2:-1] = x
    yield "a part of a larger one", wide[:, 1:, 1:-1, 2:-1]


def denoising_steps(subject: Subject) -> Outcome:
    """The latents behind each step of a sampler's loop, over one context, one written anew in place, and another.

    Where there is CUDA, there too, through whatever graphs the engine makes.
    """
    reads = subject.reads
    if not isinstance(reads, ReadsMaps):
        return absent(_NO_MAPS)
    if not reads.time:
        return absent("the model takes no steps")
    worst = _check_steps(subject, reads, "cpu", subject.tolerances.fp32)
    if torch.cuda.is_available():
        _check_steps(subject, reads, "cuda", _CUDA_FP32)
    return passed(f"latents of {STEPS} steps equal stock's", measured=worst, allowed=subject.tolerances.fp32)


# sums in another order
_CUDA_FP32 = 1e-4


def _check_steps(subject: Subject, reads: ReadsMaps, device: str, allowed: float) -> float:
    """The largest distance of latents, as a share of their largest value."""
    # each injected where it runs
    stock, model = (subject.fresh().to(device) for _ in range(2))
    subject.inject(model)
    with whole_fp32():
        wanted, found = (list(_loop(one, subject, reads, device)) for one in (stock, model))
    mend = "what is kept of a context is kept for that tensor in that version, and made anew for another"
    return max(
        check_same(one, other, allowed, what=f"latents behind {what} on {device}", mend=mend)
        for (what, one), (_, other) in zip(found, wanted, strict=True)
    )


def _loop(model: Any, subject: Subject, reads: ReadsMaps, device: str) -> Iterator[tuple[str, Tensor]]:
    """(which, the latents behind it) of every step."""
    inputs = {name: value.to(device) for name, value in subject.inputs(2, 4, seed=11).items()}
    other = {name: value.to(device) for name, value in subject.inputs(2, 4, seed=12).items()}
    name, _ = reads.context
    changes: dict[int, tuple[str, Callable[[], object]]] = {}
    if name:
        # as a caller does that prepares its texts in one tensor, and one that has another prompt
        changes[2] = "a context written anew", lambda: inputs[name].copy_(other[name])
        changes[4] = "another context", lambda: inputs.update({name: copy.deepcopy(other[name]).mul_(-1.0)})
    for step in range(STEPS):
        what, change = changes.get(step, ("", lambda: None))
        change()
        inputs[reads.time] = torch.full_like(inputs[reads.time], 900 - 150 * step)
        with torch.no_grad():
            noise = model(**inputs)[0]
        inputs[reads.name] = inputs[reads.name] - 0.2 * noise
        yield f"step {step + 1}{what and ', ' + what}", inputs[reads.name].clone()
