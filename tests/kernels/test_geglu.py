from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dsi_kernels import geglu, geglu_reference
from tests.kernels.tolerance import DTYPES, assert_close, share_equal


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (2, 5, 130), (3, 2600)], ids=str)
def test_matches_reference(shape, dtype, device):
    x = (torch.randn(*shape) * 3).to(device, dtype)
    before = x.clone()
    # 1 + erf cancels for negative gates: what is left is a unit of 1, times the value
    assert_close(geglu(x), geglu_reference(x), 1e-5 if dtype is torch.float32 else 1e-4)
    assert torch.equal(x, before)


def test_the_value_comes_first(device):
    value, gate = torch.randn(2, 3, 40, device=device)
    y = geglu(torch.cat((value, gate), -1))
    assert_close(y, value * F.gelu(gate), 1e-6)
    with pytest.raises(AssertionError):
        assert_close(y, gate * F.gelu(value), 1e-6)


def test_the_gelu_is_rounded_before_the_product(device):
    value, gate = torch.randn(2, 16, 256).to(device, torch.float16)
    y = geglu(torch.cat((value, gate), -1))
    assert share_equal(y, value * F.gelu(gate)) > 0.99
    assert share_equal(y, (value.float() * F.gelu(gate.float())).half()) < 0.9


def test_no_rows(device):
    assert geglu(torch.ones(0, 64, device=device)).shape == (0, 32)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 7), r"geglu: x \(2, 7\) must be \[..., 2 I\]"),
        (torch.ones(8, 2).t(), "x must be contiguous"),
        (torch.ones(2, 8, dtype=torch.float64), "x is torch.float64"),
        (torch.ones(()), "a last axis of one element or more is needed"),
    ],
)
def test_refuses_and_says_why(x, message, device):
    with pytest.raises(ValueError, match=message):
        geglu(x.to(device))
