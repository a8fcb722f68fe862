from __future__ import annotations

import pytest
import torch

from dsi_kernels import KINDS, bias_activation, bias_activation_reference
from tests.kernels.tolerance import DTYPES, HALVES, assert_close, share_equal


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# 1100 takes a second block
@pytest.mark.parametrize("shape", [(1, 64), (2, 3, 129), (2, 1100)], ids=str)
def test_matches_reference(shape, dtype, kind, device):
    x, b = torch.randn(shape).to(device, dtype), torch.randn(shape[-1]).to(device, dtype)
    before = x.clone()
    y = bias_activation(x, b, kind)
    assert y.dtype == dtype
    # fp32: 1 + erf cancels in the negative tail, to a unit of 1
    assert_close(y, bias_activation_reference(x, b, kind), 1e-6 if dtype is torch.float32 else None)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounds_the_sum_before_the_activation(dtype, device):
    """As a linear and its activation do. Without that rounding the result is within a unit or two: count equal bits."""
    x, b = torch.randn(32, 512).to(device, dtype), torch.randn(512).to(device, dtype)
    y = bias_activation(x, b, "gelu")
    unrounded = torch.nn.functional.gelu(x.float() + b.float()).to(dtype)
    assert share_equal(y, torch.nn.functional.gelu(x + b)) > 0.99
    assert share_equal(unrounded, torch.nn.functional.gelu(x + b)) < 0.95


@pytest.mark.parametrize(
    "rival",
    [
        lambda x, b: torch.nn.functional.silu(x) + b,
        lambda x, b: torch.nn.functional.silu(x),
        lambda x, b: torch.nn.functional.silu(x + b.roll(1)),
    ],
    ids=["bias after", "bias lost", "bias shifted"],
)
def test_a_wrong_rival_does_not_pass(rival, device):
    x, b = torch.randn(3, 100, device=device), torch.randn(100, device=device)
    with pytest.raises(AssertionError):
        assert_close(bias_activation(x, b, "silu"), rival(x, b))


def test_no_rows(device):
    assert bias_activation(torch.ones(0, 64, device=device), None, "relu").shape == (0, 64)


@pytest.mark.parametrize(
    ("x", "b", "kind", "message"),
    [
        (torch.ones(2, 64), None, "swish", "bias_activation: kind 'swish' is unknown; one of gelu, gelu_tanh, "),
        (torch.ones(2, 64), torch.ones(32), "relu", r"x \(2, 64\) and bias \(32,\) must be"),
        (torch.ones(2, 64), torch.ones(64).half(), "relu", "bias torch.float16"),
        (torch.ones(2, 64), torch.ones(64, device="meta"), "relu", "bias meta"),
        (torch.ones(64, 2).t(), None, "relu", "x must be contiguous"),
        (torch.ones(2, 64).int(), None, "relu", "x is torch.int32"),
        (torch.ones(2, 0), None, "relu", r"x has shape \(2, 0\)"),
    ],
)
def test_refuses_and_says_why(x, b, kind, message, device):
    x, b = (t if t is None or t.is_meta else t.to(device) for t in (x, b))
    with pytest.raises(ValueError, match=message):
        bias_activation(x, b, kind)
