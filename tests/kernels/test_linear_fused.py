from __future__ import annotations

import pytest
import torch

import dsi_kernels as dk
from dsi_kernels.linear_fused import FUSED, LIBRARY, linear_config
from tests.kernels.tolerance import DTYPES, HALVES, assert_close, errors

BLOCKS = {"block_m": 32, "block_n": 32, "block_k": 32, "group_m": 2, "num_warps": 4, "stages": 2, "choice": FUSED}
# none of them a multiple of the tile in every direction; several groups of row tiles; one of one element
SIZES = [(37, 50, 70), (100, 64, 96), (1, 1, 1), (5, 33, 40)]


def operands(M, N, K, dtype, device, gated=False):
    rows = 2 * N if gated else N
    options = {"dtype": dtype, "device": device}
    weight = torch.randn(rows, K, **options) / K**0.5
    return torch.randn(M, K, **options), weight, torch.randn(rows, **options), torch.randn(M, N, **options)


def near(actual, expected):
    # sums of K terms in another order; what is near 0 is measured beside terms of 1
    assert_close(actual, expected, {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[expected.dtype])


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_everything_that_follows(device, size, dtype, gated, splits):
    torch.manual_seed(0)
    x, weight, bias, residual = operands(*size, dtype, device, gated)
    given = {"kind": "gelu", "gated": gated, "residual": residual}
    out = dk.linear_fused(x, weight, bias, **given, config=BLOCKS | {"splits": splits})
    near(out, dk.linear_fused_reference(x, weight, bias, **given))


@pytest.mark.parametrize("kind", ["", *dk.KINDS])
def test_every_activation_and_nothing_else(device, kind):
    torch.manual_seed(1)
    x, weight, _, _ = operands(9, 20, 33, torch.float32, device)
    out = dk.linear_fused(x.view(3, 3, 33), weight, kind=kind, config=BLOCKS | {"splits": 1})
    assert out.shape == (3, 3, 20)
    near(out.view(9, 20), dk.linear_fused_reference(x, weight, kind=kind))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_one_rounding_is_nearer_than_torchs_three(device, dtype):
    torch.manual_seed(2)
    x, weight, bias, residual = operands(64, 64, 96, dtype, device)
    wide = [t.double() for t in (x, weight, bias, residual)]
    exact = torch.nn.functional.gelu(torch.nn.functional.linear(*wide[:3])) + wide[3]
    stock = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias)) + residual
    out = dk.linear_fused(x, weight, bias, kind="gelu", residual=residual, config=BLOCKS | {"splits": 2})
    assert errors(out, exact)[1] < 0.9 * errors(stock, exact)[1]


def test_the_default_leaves_the_product_to_the_library():
    config = linear_config(torch.empty(3, 100, 64), torch.empty(50, 64), "gelu")
    assert config["choice"] == LIBRARY
    assert set(config) == {*BLOCKS, "splits"}


def test_nothing_in_nothing_out(device):
    x, weight, bias, _ = operands(0, 8, 16, torch.float32, device)
    assert dk.linear_fused(x, weight, bias).shape == (0, 8)


X, W = torch.zeros(2, 16), torch.zeros(6, 16)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X, torch.zeros(6, 8)), {}, r"x \(2, 16\) and weight \(6, 8\) must be \[..., K\] and \[N, K\]"),
        ((X, W[:5]), {"kind": "silu", "gated": True}, "5 are odd"),
        ((X, W, torch.zeros(5)), {}, r"bias has shape \(5,\); \(6,\) is needed"),
        ((X, W), {"residual": torch.zeros(2, 5)}, r"residual has shape \(2, 5\); \(2, 6\) is needed"),
        ((X, W), {"kind": "tanh"}, "kind 'tanh' is unknown"),
        ((X, W), {"gated": True}, "kind '' is unknown"),
        ((X, W.half()), {}, "dtypes differ"),
        ((torch.zeros(16, 2).t(), W), {}, "x must be contiguous"),
    ],
)
def test_refuses_and_says_why(arguments, options, message):
    with pytest.raises(ValueError, match="linear_fused: .*" + message):
        dk.linear_fused(*arguments, **options)
