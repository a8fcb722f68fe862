from __future__ import annotations

import pytest
import torch

import dsi_kernels as dk
from tests.kernels.test_linear_fused import near
from tests.kernels.tolerance import DTYPES

BLOCKS = {"block_n": 32, "block_s": 16, "block_t": 16, "choice": 2, "num_warps": 4, "stages": 2}


def operands(B, S, heads, kv_heads, head_dim, N, dtype, device):
    """q, k and v as views of one fused projection, and what follows them; hostile at the scale where eps counts."""
    rows = torch.randn(B, S, heads + 2 * kv_heads, head_dim, device=device).to(dtype)
    q, k, v = (part.transpose(1, 2) for part in rows.split((heads, kv_heads, kv_heads), 2))
    weight = (torch.randn(N, heads * head_dim, device=device) / (heads * head_dim) ** 0.5).to(dtype)
    bias, gamma, beta = torch.randn(3, N, device=device).to(dtype)
    return q, k, v, weight * 1e-2, bias * 1e-2, torch.randn(B, S, N, device=device).to(dtype) * 1e-2, gamma, beta


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 37, 4, 2, 16, 40), (1, 16, 3, 3, 24, 64)], ids=str)
def test_the_projected_attention_its_sum_and_its_norm(device, size, dtype, norm):
    torch.manual_seed(0)
    *given, gamma, beta = operands(*size, dtype, device)
    given += [norm, gamma, beta if norm == "layer" else None, 1e-4]
    y, total = dk.attention_norm(*given, config=BLOCKS)
    _, expected = dk.attention_norm_reference(*given)
    near(total, expected)
    # a sum that is rounded the other way moves its norm by as much: the norm is held to that of the same sum
    stock = (
        dk.layer_norm_reference(total, gamma, beta, 1e-4)
        if norm == "layer"
        else dk.rms_norm_reference(total, gamma, 1e-4)
    )
    near(y, stock)


@pytest.mark.parametrize("limited", ["mask", "causal"])
def test_queries_see_what_they_may(device, limited):
    torch.manual_seed(1)
    *given, gamma, beta = operands(2, 21, 2, 1, 16, 32, torch.float32, device)
    mask = None if limited == "causal" else torch.rand(2, 1, 1, 21, device=device) > 0.4
    given += ["layer", gamma, beta, 1e-5, mask]
    options = {"causal": limited == "causal", "scale": 0.3}
    y, _ = dk.attention_norm(*given, **options, config=BLOCKS)
    near(y, dk.attention_norm_reference(*given, **options)[0])


def test_a_sum_that_nobody_wants_changes_nothing(device):
    torch.manual_seed(2)
    given = operands(1, 9, 2, 2, 16, 24, torch.float16, device)
    given = (*given[:6], "layer", *given[6:], 1e-5)
    wanted, _ = dk.attention_norm(*given, config=BLOCKS)
    found, total = dk.attention_norm(*given, keep_sum=False, config=BLOCKS)
    assert total is None
    assert torch.equal(found, wanted)


Q, W, R, G = torch.zeros(1, 2, 4, 8), torch.zeros(6, 16), torch.zeros(1, 4, 6), torch.zeros(6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.zeros(6, 15)}, r"x \(1, 4, 16\) and weight \(6, 15\)"),
        ({"residual": R[:, :3]}, r"residual has shape \(1, 3, 6\); \(1, 4, 6\) is needed"),
        ({"bias": G[:5]}, r"bias has shape \(5,\)"),
        ({"k": Q[:, :, :, :4]}, "must be"),
        ({"norm_weight": G[:5]}, r"norm_weight has shape \(5,\)"),
        ({"norm": "batch"}, "norm 'batch' is unknown"),
    ],
)
def test_refuses_and_says_why(changed, message):
    given = {"q": Q, "k": Q, "v": Q, "weight": W, "bias": G, "residual": R, "norm": "layer", "norm_weight": G}
    with pytest.raises(ValueError, match="attention_norm: .*" + message):
        dk.attention_norm(**{**given, "norm_bias": G, "eps": 1e-5, **changed})
