from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dsi_kernels import wide_attention as op
from dsi_kernels import wide_attention_reference
from tests.kernels.tolerance import DTYPES, ULP


def operands(shape, keys, dtype, device):
    B, heads, S, head_dim = shape
    q = torch.randn(B, S, heads, head_dim).to(device, dtype).transpose(1, 2)
    k, v = torch.randn(B, keys, 2, heads, head_dim).to(device, dtype).permute(2, 0, 3, 1, 4)
    return q, k, v


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "keys"), [((1, 1, 33, 512), 33), ((2, 3, 5, 40), 77), ((1, 2, 1, 9), 1)], ids=str)
def test_matches_reference(shape, keys, dtype, device):
    torch.manual_seed(0)
    q, k, v = operands(shape, keys, dtype, device)
    y = op(q, k, v)
    expected = wide_attention_reference(q, k, v)
    assert y.shape == (shape[0], shape[2], shape[1], shape[3])
    # weights rounded to the dtype, half a unit each
    torch.testing.assert_close(y, expected, rtol=2 * ULP[dtype], atol=ULP[dtype])
    # a scale that matters
    torch.testing.assert_close(
        op(q, k, v, 0.9), wide_attention_reference(q, k, v, 0.9), rtol=2 * ULP[dtype], atol=2 * ULP[dtype]
    )


def test_queries_are_taken_in_chunks(device, monkeypatch):
    import sys

    q, k, v = operands((2, 1, 21, 24), 13, torch.float32, device)
    whole = op(q, k, v)
    monkeypatch.setattr(sys.modules["dsi_kernels.wide_attention"], "SCORES_BYTES", 4 * 13 * 2 * 8)
    torch.testing.assert_close(op(q, k, v), whole, rtol=1e-5, atol=1e-6)


def test_large_scores_do_not_overflow(device):
    q, k, v = operands((1, 1, 7, 512), 9, torch.float16, device)
    q, k = q * 60, k * 60
    y = op(q, k, v)
    assert y.isfinite().all()
    # of what was given: such scores tell the rounding of 60 q apart
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert (y.transpose(1, 2).float() - exact).abs().max() < 0.05


def test_many_equal_scores_lose_nothing(device):
    """Weights of 1 / 4096 would be subnormal in fp16."""
    q, k, v = operands((1, 1, 2, 16), 4096, torch.float16, device)
    y = op(q * 0, k, v)
    assert (y.float() - v.float().mean(2, keepdim=True).transpose(1, 2)).abs().max() < 2e-4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": torch.ones(1, 1, 4, 8)}, r"wide_attention: q \(1, 1, 4, 16\), k \(1, 1, 4, 8\)"),
        ({"k": torch.ones(1, 1, 0, 16), "v": torch.ones(1, 1, 0, 16)}, "0 keys are not from 1 to 32768"),
        ({"q": torch.ones(1, 1, 4, 16).half()}, "q torch.float16"),
        ({"v": torch.ones(1, 1, 16, 4).transpose(2, 3)}, "the last axis of v must be contiguous"),
    ],
)
def test_refuses_and_says_why(changed, message, device):
    given = {name: torch.ones(1, 1, 4, 16) for name in "qkv"} | changed
    with pytest.raises(ValueError, match=message):
        op(*(t.to(device) for t in given.values()))
