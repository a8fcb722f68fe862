"""The correction of the interpreter's bfloat16 is right, and still needed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from dsi_kernels import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="hardware rounds by itself")


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16))


def awkward():
    x = torch.randn(250) * 10.0 ** torch.randint(-30, 30, (250,))
    ties = torch.tensor([1.00390625, 1.01171875, -1.00390625, float("inf"), -0.0, 3.4e38])
    return torch.cat([x, ties])


def test_a_cast_rounds_as_torch_does():
    x = awkward()
    y = torch.zeros(256, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, y, N=256)
    assert torch.equal(y, x.bfloat16())


def test_nan_stays_nan():
    x = torch.full((16,), float("nan"))
    y = torch.zeros(16, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, y, N=16)
    assert y.isnan().all()


def test_the_interpreter_alone_truncates(monkeypatch):
    """Fails once Triton rounds: then hardware_bf16.py goes."""
    from tests.kernels import hardware_bf16

    monkeypatch.setattr(hardware_bf16.InterpreterBuilder, "cast_impl", hardware_bf16.truncating_cast)
    x = awkward()
    y = torch.zeros(256, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, y, N=256)
    assert (y == x.bfloat16()).float().mean() < 0.7
    assert np.isfinite(x[:250].numpy()).all()
