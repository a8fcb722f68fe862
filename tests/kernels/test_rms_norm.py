from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dsi_kernels import rms_norm, rms_norm_reference
from tests.kernels.tolerance import DTYPES, HALVES, assert_close, share_equal


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# at 1e-3, eps is as large as the mean square
@pytest.mark.parametrize("scale", [1.0, 1e-3], ids="scale{}".format)
@pytest.mark.parametrize("shape", [(1,), (64,), (3, 100), (2, 5, 129), (1, 1, 4096)], ids=str)
def test_matches_reference(shape, scale, dtype, device):
    x = (torch.randn(shape) * scale).to(device, dtype)
    w = torch.randn(shape[-1]).to(device, dtype)
    before = x.clone()
    y = rms_norm(x, w, 1e-6)
    assert y.dtype == dtype
    assert_close(y, rms_norm_reference(x, w, 1e-6))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_casts_before_the_weight_multiply(dtype, device):
    """Two roundings, as LlamaRMSNorm has. One rounding is within a unit, so count equal bits instead."""
    x, w = torch.randn(32, 1024).to(device, dtype), torch.randn(1024).to(device, dtype)
    stock = LlamaRMSNorm(1024, eps=1e-6).to(device, dtype)
    stock.weight.data.copy_(w)
    with torch.no_grad():
        expected = stock(x)
    one_rounding = (torch.nn.functional.rms_norm(x.float(), (1024,), None, 1e-6) * w.float()).to(dtype)
    assert share_equal(rms_norm(x, w, 1e-6), expected) > 0.99
    assert share_equal(rms_norm_reference(x, w, 1e-6), expected) > 0.99
    assert share_equal(one_rounding, expected) < 0.9


@pytest.mark.parametrize(
    "rival",
    [
        lambda x, w: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-2) * w,
        lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * w,
        lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2) * (1 + w),
        lambda x, w: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, correction=0) + 1e-2) * w,
    ],
    ids=["eps outside the root", "no eps", "one plus weight", "mean removed"],
)
def test_a_wrong_rival_does_not_pass(rival, device):
    x, w = torch.randn(3, 100, device=device), torch.randn(100, device=device)
    assert_close(rms_norm(x, w, 1e-2), rms_norm_reference(x, w, 1e-2))
    with pytest.raises(AssertionError):
        assert_close(rms_norm(x, w, 1e-2), rival(x, w))


def test_no_rows(device):
    assert rms_norm(torch.ones(0, 64, device=device), torch.ones(64, device=device)).shape == (0, 64)


@pytest.mark.parametrize(
    ("x", "w", "message"),
    [
        (torch.ones(2, 64), torch.ones(32), r"rms_norm: x \(2, 64\) and weight \(32,\) must be"),
        (torch.ones(2, 64), torch.ones(64).half(), "weight torch.float16"),
        (torch.ones(2, 64).double(), torch.ones(64).double(), "x is torch.float64"),
        (torch.ones(2, 64), torch.ones(64, device="meta"), "devices differ: x .*, weight meta"),
        (torch.ones(64, 2).t(), torch.ones(64), "x must be contiguous"),
        (torch.ones(2, 64), lambda on: torch.ones(128, device=on)[::2], "weight must be contiguous"),
        (torch.ones(1, 20000), torch.ones(20000), "20000 x torch.float32 exceeds 65536"),
        (torch.ones(3, 0), torch.ones(0), r"x has shape \(3, 0\)"),
        (torch.ones(()), torch.ones(1), r"x has shape \(\)"),
    ],
)
def test_refuses_and_says_why(x, w, message, device):
    # strides are made on the device: a move keeps those of dense tensors alone
    x, w = (t(device) if callable(t) else t if t.is_meta else t.to(device) for t in (x, w))
    with pytest.raises(ValueError, match=message):
        rms_norm(x, w)
