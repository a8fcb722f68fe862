from __future__ import annotations

import pytest
import torch

from dsi_kernels import layer_norm, layer_norm_reference
from tests.kernels.tolerance import DTYPES, HALVES, ULP, assert_close, share_equal


def near(dtype):
    # weight times x plus bias cancels: an fp32 unit of the terms, not of their sum
    return 1e-6 if dtype is torch.float32 else ULP[dtype] * 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# at 1e-3, eps is as large as the variance
@pytest.mark.parametrize("scale", [1.0, 1e-3], ids="scale{}".format)
@pytest.mark.parametrize("shape", [(64,), (3, 100), (2, 5, 129), (1, 1, 4096)], ids=str)
def test_matches_reference(shape, scale, dtype, device):
    x = (torch.randn(shape) * scale).to(device, dtype)
    w, b = torch.randn(2, shape[-1]).to(device, dtype)
    before = x.clone()
    y = layer_norm(x, w, b, 1e-6)
    assert y.dtype == dtype
    assert_close(y, layer_norm_reference(x, w, b, 1e-6), near(dtype))
    assert torch.equal(x, before)


@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_weight_and_bias_may_be_absent(has_weight, has_bias, device):
    x = torch.randn(3, 100, device=device)
    w = torch.randn(100, device=device) if has_weight else None
    b = torch.randn(100, device=device) if has_bias else None
    expected = torch.nn.functional.layer_norm(x, (100,), w, b, 1e-5)
    assert_close(layer_norm(x, w, b, 1e-5), expected, 1e-6)
    assert_close(layer_norm_reference(x, w, b, 1e-5), expected, 1e-6)


def test_the_variance_of_a_row_far_from_zero(device):
    """Two passes. E[x^2] - E[x]^2 in fp32 loses it."""
    x = torch.randn(4, 256, device=device) * 1e-2 + 1000
    exact = torch.nn.functional.layer_norm(x.double(), (256,), None, None, 1e-12)
    one_pass = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(
        (x.pow(2).mean(-1, keepdim=True) - x.mean(-1, keepdim=True).pow(2)).clamp_min(1e-12)
    )
    # the mean itself is rounded to 6e-5, a hundredth of the deviation
    assert (layer_norm(x, None, None, 1e-12).double() - exact).abs().max() < 2e-2
    assert (one_pass.double() - exact).abs().max() > 2e-2


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounds_once_as_torch_does(dtype, device):
    """Rounding before the weight, as an RMSNorm of LLaMA's does, is within a unit or two: count equal bits instead."""
    x, (w, b) = torch.randn(32, 1024).to(device, dtype), torch.randn(2, 1024).to(device, dtype)
    stock = torch.nn.functional.layer_norm(x, (1024,), w, b, 1e-5)
    h = torch.nn.functional.layer_norm(x.float(), (1024,), None, None, 1e-5)
    assert share_equal(layer_norm(x, w, b, 1e-5), stock) > 0.99
    assert share_equal(layer_norm_reference(x, w, b, 1e-5), stock) > 0.99
    assert share_equal(h.to(dtype) * w + b, stock) < 0.9


@pytest.mark.parametrize(
    "rival",
    [
        lambda h, d, w, b: h / (d + 1e-2) * w + b,
        lambda h, d, w, b: h / d * w + b,
        lambda h, d, w, b: h / (d.pow(2) * 100 / 99 + 1e-2).sqrt() * w + b,
        lambda h, d, w, b: h / (d.pow(2) + 1e-2).sqrt() * b + w,
    ],
    ids=["eps outside the root", "no eps", "sample variance", "weight and bias swapped"],
)
def test_a_wrong_rival_does_not_pass(rival, device):
    x, (w, b) = torch.randn(3, 100, device=device), torch.randn(2, 100, device=device)
    h = x - x.mean(-1, keepdim=True)
    deviation = h.pow(2).mean(-1, keepdim=True).sqrt()
    with pytest.raises(AssertionError):
        assert_close(layer_norm(x, w, b, 1e-2), rival(h, deviation, w, b), 1e-6)


def test_no_rows(device):
    assert layer_norm(torch.ones(2, 0, 64, device=device), None, None).shape == (2, 0, 64)


@pytest.mark.parametrize(
    ("x", "w", "b", "message"),
    [
        (torch.ones(2, 64), torch.ones(32), None, r"layer_norm: x \(2, 64\) and weight \(32,\) must be"),
        (torch.ones(2, 64), torch.ones(64), torch.ones(1), r"weight \(64,\) and bias \(1,\) must be"),
        (torch.ones(2, 64), None, torch.ones(64).half(), "dtypes differ: x torch.float32, bias torch.float16"),
        (torch.ones(2, 64), None, torch.ones(64, device="meta"), "bias meta"),
        (torch.ones(64, 2).t(), None, None, "x must be contiguous"),
        (torch.ones(1, 20000), None, None, "20000 x torch.float32 exceeds"),
    ],
)
def test_refuses_and_says_why(x, w, b, message, device):
    x, w, b = (t if t is None or t.is_meta else t.to(device) for t in (x, w, b))
    with pytest.raises(ValueError, match=message):
        layer_norm(x, w, b)
