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


@pytest.mark.parametrize("shape", [(2, 23, 4, 2, 16), (1, 40, 2, 2, 32), (3, 5, 3, 1, 16)], ids=str)
@pytest.mark.parametrize("turns", ["turned", "each row its own", "fp32", "as they are"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_heads_are_turned_and_cached(device, dtype, turns, shape):
    torch.manual_seed(3)
    B, S, heads, kv_heads, head_dim = shape
    # two heads, or one, a tile
    x, weight, bias, _ = operands(B * S, (heads + 2 * kv_heads) * head_dim, 40, dtype, device)
    x, rows = x.view(B, S, 40), B if turns == "each row its own" else 1
    cos = torch.randn(rows, S, head_dim, device=device, dtype=torch.float32 if turns == "fp32" else dtype)
    cos, sin = (None, None) if turns == "as they are" else (cos, cos.roll(1, -1))
    caches = [torch.full((2, B, kv_heads, S + 9, head_dim), torch.nan, dtype=dtype, device=device) for _ in range(2)]
    given = (heads, kv_heads, head_dim)
    q = dk.prompt_qkv(x, weight, bias, cos, sin, *caches[0], 4, *given, config=blocks(device))
    wanted = dk.prompt_qkv_reference(x, weight, bias, cos, sin, *caches[1], 4, *given)
    assert q.shape == (B, heads, S, head_dim)
    assert q.transpose(1, 2).is_contiguous()
    near(q, wanted)
    torch.testing.assert_close(caches[0].isnan(), caches[1].isnan())
    near(caches[0].nan_to_num(), caches[1].nan_to_num())


def test_heads_are_rounded_before_they_are_turned(device):
    """As the product of its own would round them: the caches of both ways are equal in nearly every bit."""
    torch.manual_seed(4)
    x, weight, _, _ = operands(32, 96, 40, torch.bfloat16, device)
    x, cos = x.view(1, 32, 40), torch.randn(1, 32, 32, device=device).bfloat16()
    caches = [torch.zeros(2, 1, 1, 32, 32, dtype=torch.bfloat16, device=device) for _ in range(2)]
    dk.prompt_qkv(x, weight, None, cos, cos, *caches[0], 0, 1, 1, 32, config=blocks(device))
    dk.prompt_qkv_reference(x, weight, None, cos, cos, *caches[1], 0, 1, 1, 32)
    assert (caches[0] == caches[1]).float().mean() > 0.99


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
CACHE = torch.zeros(1, 1, 5, 16).half()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dk.prompt_linear(X, W[:, :8]), r"x \(2, 16\) and weight \(48, 8\) must be \[..., K\] and \[N, K\]"),
        (lambda: dk.prompt_linear(X.float(), W.float()), "x is torch.float32; float16 and bfloat16 will do"),
        (lambda: dk.prompt_linear(X, W[:20]), "20 columns of 16 terms; both must be multiples of 8"),
        (lambda: dk.prompt_linear(X, W, kind="tanh"), "kind 'tanh' is unknown"),
        (lambda: dk.prompt_linear(X, W, residual=X), r"residual has shape \(2, 16\); \(2, 48\) is needed"),
        (lambda: dk.prompt_linear(X, W, out=X), r"out \(2, 16\) must be \(2, 48\)"),
        (lambda: dk.prompt_qkv(X[None], W, None, None, None, CACHE, CACHE, 4, 1, 1, 16), "2 tokens from start=4 on do"),
        (lambda: dk.prompt_qkv(X[None], W, None, None, None, CACHE, CACHE, 0, 2, 1, 16), r"prompt_qkv: qkv has shape"),
        (
            lambda: dk.prompt_qkv(X[None], W[:36], None, None, None, CACHE[..., :12], CACHE[..., :12], 0, 1, 1, 12),
            "36 columns|head_dim 12 must be a power of two",
        ),
        (
            lambda: dk.prompt_qkv(
                X[None], W, None, X[None, :, :8], X[None, :, :8], CACHE, CACHE, 0, 1, 1, 16, config=BLOCKS
            ),
            "cos has 8 columns; all 16 of a head turn",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
