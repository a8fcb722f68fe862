from __future__ import annotations

import pytest
import torch

from dsi_kernels import add_layer_norm, add_layer_norm_reference
from tests.kernels.tolerance import DTYPES, HALVES, ULP, assert_close, share_equal


def near(dtype):
    # weight times x plus bias cancels: an fp32 unit of the terms, not of their sum
    return 1e-6 if dtype is torch.float32 else ULP[dtype] * 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# at 1e-3, eps is as large as the variance
@pytest.mark.parametrize("scale", [1.0, 1e-3], ids="scale{}".format)
@pytest.mark.parametrize("has_x_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (2, 5, 129), (1, 1, 2048)], ids=str)
def test_matches_reference(shape, has_x_bias, scale, dtype, device):
    x, r = (torch.randn(2, *shape) * scale).to(device, dtype)
    w, b = torch.randn(2, shape[-1]).to(device, dtype)
    x_bias = (torch.randn(shape[-1]) * scale).to(device, dtype) if has_x_bias else None
    before = x.clone(), r.clone()
    y, r2 = add_layer_norm(x, r, w, b, 1e-6, x_bias)
    ref_y, ref_r = add_layer_norm_reference(x, r, w, b, 1e-6, x_bias)
    assert torch.equal(r2, ref_r)
    assert_close(y, ref_y, near(dtype))
    assert torch.equal(x, before[0])
    assert torch.equal(r, before[1])


def test_a_sum_that_nobody_wants_changes_nothing(device):
    x, r = torch.randn(2, 3, 129).to(device, torch.float16)
    w, b = torch.randn(2, 129).to(device, torch.float16)
    wanted, _ = add_layer_norm(x, r, w, b)
    found, total = add_layer_norm(x, r, w, b, keep_sum=False)
    assert total is None
    assert torch.equal(found, wanted)


def test_is_a_post_norm_layers_end(device):
    """BERT's: LayerNorm(linear(x) + residual), with the linear's bias left to the kernel."""
    torch.manual_seed(1)
    linear, norm = torch.nn.Linear(48, 96).to(device), torch.nn.LayerNorm(96).to(device)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x, r = torch.randn(2, 3, 48, device=device), torch.randn(2, 3, 96, device=device)
    with torch.no_grad():
        expected = norm(linear(x) + r)
        y, r2 = add_layer_norm(x @ linear.weight.T, r, norm.weight, norm.bias, norm.eps, linear.bias)
        assert_close(y, expected, 1e-5)
        assert_close(r2, linear(x) + r, 1e-5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_sum_is_rounded_once_and_normalised_as_rounded(dtype, device):
    x, r = torch.randn(2, 32, 512).to(device, dtype)
    w, b, x_bias = torch.randn(3, 512).to(device, dtype)
    y, r2 = add_layer_norm(x, r, w, b, 1e-5, x_bias)
    total = x.float() + x_bias.float() + r.float()
    assert torch.equal(r2, total.to(dtype))
    assert share_equal((x + x_bias) + r, r2) < 0.9
    stock = torch.nn.functional.layer_norm(r2, (512,), w, b, 1e-5)
    unrounded = torch.nn.functional.layer_norm(total, (512,), w.float(), b.float(), 1e-5).to(dtype)
    assert share_equal(y, stock) > 0.99
    assert share_equal(unrounded, stock) < 0.9


def test_weight_and_bias_may_be_absent(device):
    x, r = torch.randn(2, 3, 100, device=device)
    y, _ = add_layer_norm(x, r, None, None)
    assert_close(y, torch.nn.functional.layer_norm(x + r, (100,)), 1e-6)


@pytest.mark.parametrize("lost", ["residual", "x_bias", "bias", "weight"])
def test_a_rival_that_loses_an_operand_does_not_pass(lost, device):
    x, r = torch.randn(2, 3, 100, device=device)
    w, b, x_bias = torch.randn(3, 100, device=device)
    y, _ = add_layer_norm(x, r, w, b, 1e-5, x_bias)
    neutral = {"residual": torch.zeros_like(r), "x_bias": None, "bias": None, "weight": None}
    operands = {"x": x, "residual": r, "weight": w, "bias": b, "x_bias": x_bias}
    assert_close(y, add_layer_norm_reference(**operands)[0], 1e-6)
    with pytest.raises(AssertionError):
        assert_close(y, add_layer_norm_reference(**{**operands, lost: neutral[lost]})[0], 1e-6)


def test_no_rows(device):
    empty = torch.ones(0, 64, device=device)
    y, r = add_layer_norm(empty, empty, None, None)
    assert y.shape == r.shape == (0, 64)


@pytest.mark.parametrize(
    ("x", "r", "w", "x_bias", "message"),
    [
        (torch.ones(2, 64), torch.ones(2, 64), torch.ones(32), None, r"add_layer_norm: .* and weight \(32,\) must be"),
        (torch.ones(2, 64), torch.ones(2, 32), None, None, r"residual \(2, 32\)"),
        (torch.ones(2, 64), torch.ones(2, 64), None, torch.ones(2, 64), r"x_bias \(2, 64\)"),
        (torch.ones(2, 64), torch.ones(2, 64), None, torch.ones(64).half(), "x_bias torch.float16"),
        (torch.ones(2, 64), torch.ones(64, 2).t(), None, None, "residual must be contiguous"),
        (torch.ones(2, 64), torch.ones(2, 64, device="meta"), None, None, "residual meta"),
        (torch.ones(1, 20000), torch.ones(1, 20000), None, None, "20000 x torch.float32 exceeds"),
    ],
)
def test_refuses_and_says_why(x, r, w, x_bias, message, device):
    x, r, w, x_bias = (t if t is None or t.is_meta else t.to(device) for t in (x, r, w, x_bias))
    with pytest.raises(ValueError, match=message):
        add_layer_norm(x, r, w, None, 1e-5, x_bias)
