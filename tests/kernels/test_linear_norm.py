from __future__ import annotations

import pytest
import torch

import dsi_kernels as dk
from tests.kernels.test_linear_fused import BLOCKS, SIZES, near, operands
from tests.kernels.tolerance import DTYPES, share_equal


def norms(N, norm, dtype, device):
    weight, bias = torch.randn(2, N, dtype=dtype, device=device)
    return norm, weight, bias if norm == "layer" else None


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES[:2], SIZES[3]], ids=str)
def test_the_sum_and_its_norm(device, size, dtype, norm, splits):
    torch.manual_seed(0)
    x, weight, bias, residual = operands(*size, dtype, device)
    norm, gamma, beta = norms(size[1], norm, dtype, device)
    # at this scale eps is as large as the mean square
    given = (x * 1e-2, weight, bias * 1e-2, residual * 1e-2, norm, gamma, beta, 1e-4)
    y, total = dk.linear_norm(*given, config=BLOCKS | {"splits": splits})
    _, expected = dk.linear_norm_reference(*given)
    near(total, expected)
    # a sum that is rounded the other way moves its norm by as much: the norm is held to that of the same sum
    stock = (
        dk.layer_norm_reference(total, gamma, beta, 1e-4)
        if norm == "layer"
        else dk.rms_norm_reference(total, gamma, 1e-4)
    )
    near(y, stock)
    assert share_equal(y, stock) > (0.0 if dtype is torch.float32 else 0.98)


def test_without_bias_and_norm_parameters(device):
    torch.manual_seed(1)
    x, weight, _, residual = operands(6, 20, 24, torch.float32, device)
    given = (x.view(2, 3, 24), weight, None, residual.view(2, 3, 20), "layer", None, None, 1e-5)
    for one, other in zip(
        dk.linear_norm(*given, config=BLOCKS | {"splits": 2}), dk.linear_norm_reference(*given), strict=True
    ):
        near(one, other)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_sum_that_nobody_wants_changes_nothing(device, norm):
    torch.manual_seed(2)
    given = (*operands(6, 20, 24, torch.float16, device), *norms(20, norm, torch.float16, device), 1e-5)
    wanted, _ = dk.linear_norm(*given, config=BLOCKS | {"splits": 2})
    found, total = dk.linear_norm(*given, keep_sum=False, config=BLOCKS | {"splits": 2})
    assert total is None
    assert torch.equal(found, wanted)


X, W, R, G = torch.zeros(2, 16), torch.zeros(6, 16), torch.zeros(2, 6), torch.zeros(6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, W, None, R, "batch", G, None, 1e-5), "norm 'batch' is unknown; one of layer, rms will do"),
        ((X, W, None, R, "rms", None, None, 1e-5), "the rms norm has a weight, and no bias"),
        ((X, W, None, R, "rms", G, G, 1e-5), "the rms norm has a weight, and no bias"),
        ((X, W, None, R, "layer", G[:5], None, 1e-5), r"norm_weight has shape \(5,\); \(6,\) is needed"),
        ((X, W, None, R[:1], "layer", G, G, 1e-5), r"residual has shape \(1, 6\); \(2, 6\) is needed"),
        ((X, W, None, R, "layer", G.half(), None, 1e-5), "dtypes differ"),
    ],
)
def test_refuses_and_says_why(arguments, message):
    with pytest.raises(ValueError, match="linear_norm: .*" + message):
        dk.linear_norm(*arguments)
