"""Does the optimized model compute what the stock model computes, in every dtype and batch?"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from dsi.policy import Keep
from dsi.testing.compare import check_same, forward, tensors
from dsi.testing.inputs import Padding
from dsi.testing.report import Failed, Outcome, failed, passed
from dsi.testing.subject import Subject

SEEDS = range(4)
"""Of models and inputs over which a rounding error is judged: the largest is one draw from a long tail."""

MEND = (
    "compare slot by slot: the order of the norms, biases, the activation, the scale, the order of q, k and v rows, "
    "kv groups, the residual; `dsi bisect` finds the first place that differs"
)


def numerics_fp32(subject: Subject) -> Outcome:
    """Without padding, one row and three, one token and several."""
    pair, worst = subject.twins(), 0.0
    for batch, length in ((1, 1), (1, 9), (3, 8)):
        worst = max(
            worst,
            check_same(
                *subject.both(pair, subject.inputs(batch, length, seed=batch + length)),
                subject.tolerances.fp32,
                what=f"fp32, {batch} rows of {length} tokens",
                mend=MEND,
            ),
        )
    return passed("fp32 equals stock", measured=worst, allowed=subject.tolerances.fp32)


def numerics_bf16(subject: Subject) -> Outcome:
    """bf16: the error against fp32 over the same rounded weights is stock's own, nearly."""
    return _rounding(subject, torch.bfloat16)


def numerics_fp16(subject: Subject) -> Outcome:
    """fp16: as bf16."""
    return _rounding(subject, torch.float16)


def _rounding(subject: Subject, dtype: torch.dtype) -> Outcome:
    stock, ours, sizes = [], [], []
    name = str(dtype).removeprefix("torch.")
    paddings: tuple[Padding, ...] = ("none", "left")
    for seed, padding in itertools.product(SEEDS, paddings):
        pair = subject.twins(seed=seed, dtype=dtype)
        inputs = subject.inputs(4, 9, padding, seed=seed)
        wanted = forward(subject.widened(seed=seed, dtype=dtype), inputs)
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        found, known = subject.both(pair, inputs)
        stock.append(_powers(known, wanted))
        ours.append(_powers(found, wanted))
        sizes.append(_powers(wanted, None))
    error, yardstick, size = (_rms(powers, subject) for powers in (ours, stock, sizes))
    ratio = error / yardstick if yardstick else float("inf" if error else 0)
    what = f"{name}: error against fp32, {error / size:.2g}, as a multiple of stock's own"
    if not ratio <= subject.tolerances.rounding:
        return failed(
            what,
            measured=ratio,
            allowed=subject.tolerances.rounding,
            mend=f"round where stock rounds: norms and softmax in fp32, one cast back to {name}, sums not in {name}",
        )
    return passed(what, measured=ratio, allowed=subject.tolerances.rounding)


def _powers(output: Any, reference: Any) -> Tensor:
    """The mean square of the differences, or of the values, at each position of each tensor."""
    found = [tensor.double() for _, tensor in tensors(output)]
    others = [torch.zeros_like(one) for one in found]
    if reference is not None:
        others = [tensor.double() for _, tensor in tensors(reference)]
    if [one.shape for one in found] != [one.shape for one in others]:
        raise Failed("outputs of other shapes", measured="shapes", allowed="stock's shapes", mend=MEND)
    pairs = zip(found, others, strict=True)
    return torch.cat([(one - other).square().mean(-1).flatten() for one, other in pairs if one.numel()])


def _rms(powers: list[Tensor], subject: Subject) -> float:
    """The root of the mean of all positions; around a kept module, of the smaller half of them.

    A kept module may choose, as the router of a mixture of experts does, and where the choice is close a rounding error
    of either model turns it: such a position says nothing of either.
    """
    every = torch.cat(powers)
    if any(isinstance(slot, Keep) for block in subject.policy.blocks for slot in block.slots.values()):
        every = every.sort().values[: every.numel() // 2]
    return float(every.mean().sqrt())


def _one_of(value: Tensor, row: int, rows: int) -> Tensor:
    """A row of what has one for each; the rest belongs to all of them."""
    return value[row : row + 1] if value.shape[:1] == (rows,) else value


def batch_of_one(subject: Subject) -> Outcome:
    """A row gives the same alone and among others."""
    model, worst = subject.twins().model, 0.0
    inputs = subject.inputs(5, 7, seed=5)
    together = list(tensors(forward(model, inputs)))
    for row in range(5):
        alone = forward(model, {name: _one_of(value, row, 5) for name, value in inputs.items()})
        pairs = [
            (all_rows[row : row + 1], one)
            for (_, all_rows), (_, one) in zip(together, tensors(alone), strict=True)
            # what a model says of the batch as a whole is no row's
            if all_rows[row : row + 1].shape == one.shape
        ]
        found, wanted = ([pair[side] for pair in pairs] for side in (0, 1))
        worst = max(
            worst,
            check_same(
                found,
                wanted,
                subject.tolerances.fp32,
                what=f"row {row} of five, alone and among the others",
                mend="nothing in a container may mix rows or depend on how many there are",
            ),
        )
    return passed("a row gives the same alone", measured=worst, allowed=subject.tolerances.fp32)
