from __future__ import annotations

import pytest
import torch

import dsi_kernels as dk
from dsi_kernels.prompt_linear import LIBRARY, OWN, prompt_config, takes
from tests.kernels.tolerance import HALVES, assert_close

# blocks that an interpreter goes through in a moment
BLOCKS = {"block_m": 16, "block_n": 32, "block_k": 16, "group_m": 2, "num_warps": 4, "stages": 2, "choice": OWN}
ON_GPU = {"block_m": 64, "block_n": 64, "block_k": 64, "group_m": 2, "num_warps": 4, "stages": 2, "choice": OWN}
# none of them a multiple of the tile in every direction; several groups of row tiles
SIZES = [(37, 40, 72), (100, 64, 96), (1, 8, 8), (5, 72, 40)]


def blocks(device):
    return BLOCKS if device == "cpu" else ON_GPU


def operands(M, N, K, dtype, device, gated=False):
    rows = 2 * N if gated else N
    options = {"dtype": dtype, "device": device}
    weight = torch.randn(rows, K, **options) / K**0.5
    return torch.randn(M, K, **options), weight, torch.randn(rows, **options), torch.randn(M, N, **options)


def near(actual, expected):
    # sums of K terms in another order; what is near 0 is measured beside terms of 1
    assert_close(actual, expected, {torch.float16: 1e-3, torch.bfloat16: 8e-3}[expected.dtype])


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_everything_that_follows(device, size, dtype, gated):
    torch.manual_seed(0)
    x, weight, bias, residual = operands(*size, dtype, device, gated)
    given = {"kind": "gelu", "gated": gated, "residual": residual}
    out = dk.prompt_linear(x, weight, bias, **given, config=blocks(device))
    near(out, dk.prompt_linear_reference(x, weight, bias, **given))


@pytest.mark.parametrize("kind", ["", *dk.KINDS])
def test_every_activation_and_nothing_else(device, kind):
    torch.manual_seed(1)
    x, weight, _, _ = operands(9, 24, 40, torch.float16, device)
    out = dk.prompt_linear(x.view(3, 3, 40), weight, kind=kind, config=blocks(device))
    assert out.shape == (3, 3, 24)
    near(out.view(9, 24), dk.prompt_linear_reference(x, weight, kind=kind))


def test_the_sum_takes_the_residuals_place(device):
    torch.manual_seed(2)
    x, weight, _, residual = operands(37, 40, 72, torch.bfloat16, device)
    wanted = dk.prompt_linear_reference(x, weight, residual=residual)
    found = dk.prompt_linear(x, weight, residual=residual, out=residual, config=blocks(device))
    assert found is residual
    near(found, wanted)


def test_the_default_leaves_the_product_to_the_library():
    x, weight = torch.empty(3, 100, 64, dtype=torch.half), torch.empty(48, 64, dtype=torch.half)
    config = prompt_config(x, weight, "gate")
    assert config["choice"] == LIBRARY
    assert set(config) == set(BLOCKS)
    # and a CPU has no such accelerator
    assert not takes(x, weight)


def test_nothing_in_nothing_out(device):
    x, weight, bias, _ = operands(0, 8, 16, torch.float16, device)
    assert dk.prompt_linear(x, weight, bias, config=blocks(device)).shape == (0, 8)


X, W = torch.zeros(2, 16).half(), torch.zeros(48, 16).half()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dk.prompt_linear(X, W[:, :8]), r"x \(2, 16\) and weight \(48, 8\) must be \[..., K\] and \[N, K\]"),
        (lambda: dk.prompt_linear(X.float(), W.float()), "x is torch.float32; float16 and bfloat16 will do"),
        (lambda: dk.prompt_linear(X, W[:20]), "20 columns of 16 terms; both must be multiples of 8"),
        (lambda: dk.prompt_linear(X, W, kind="tanh"), "kind 'tanh' is unknown"),
        (lambda: dk.prompt_linear(X, W, residual=X), r"residual has shape \(2, 16\); \(2, 48\) is needed"),
        (lambda: dk.prompt_linear(X, W, out=X), r"out \(2, 16\) must be \(2, 48\)"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
