"""How near is near: one unit in the last place of each dtype, and how to count equal bits."""

from __future__ import annotations

import torch

# fp32 sums differ in their order, so its figure is that of a sum; the others are one unit in the last place at 1
ULP = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
DTYPES = list(ULP)
HALVES = [torch.float16, torch.bfloat16]


def assert_close(actual, expected, atol=None):
    """Within one unit in the last place; atol, for values near 0, is a hundredth of one at 1 unless told."""
    ulp = ULP[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=ulp, atol=ulp * 1e-2 if atol is None else atol)


def share_equal(actual, expected):
    """The share of elements that are equal bit for bit."""
    return (actual == expected).float().mean().item()


def errors(actual, exact):
    """(largest, mean) distance from an fp64 result."""
    distance = (actual.double() - exact).abs()
    return distance.max().item(), distance.mean().item()
