from __future__ import annotations

import pytest
import torch

import dsi_kernels as dk
from tests.kernels.test_attention import BLOCKS, near
from tests.kernels.tolerance import DTYPES

# an empty row, one of a whole block, one of more, and three tokens of nobody
STARTS = [0, 7, 7, 39, 80]
TOKENS = 83


def tokens(dtype, device):
    """q, k and v as views of one fused projection of 2 query heads and 1 KV head of 24."""
    fused = torch.randn(TOKENS, 4, 24, dtype=dtype, device=device)
    return fused[:, :2], fused[:, 2:3], fused[:, 3:]


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_see_themselves_alone(device, dtype, causal):
    torch.manual_seed(0)
    q, k, v = tokens(dtype, device)
    starts = torch.tensor(STARTS, dtype=torch.int32, device=device)
    out = dk.varlen_attention(q, k, v, starts, 64, 0.3, causal, config=BLOCKS)
    assert out.shape == (TOKENS, 48)
    near(out[:80], dk.varlen_attention_reference(q, k, v, starts, 64, 0.3, causal)[:80])


def test_is_attention_where_rows_are_equally_long(device):
    torch.manual_seed(1)
    q, k, v = (x[:80] for x in tokens(torch.float32, device))
    starts = torch.tensor([0, 40, 80], dtype=torch.int32, device=device)
    rows = (x.view(2, 40, -1, 24).transpose(1, 2) for x in (q, k, v))
    expected = dk.attention_reference(*rows, causal=True).view(80, 48)
    near(dk.varlen_attention(q, k, v, starts, 40, causal=True, config=BLOCKS), expected)


Q, K, C = torch.zeros(9, 2, 8), torch.zeros(9, 1, 8), torch.tensor([0, 9], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Q[:8], K, K, C, 9), r"must be \[T, heads, head_dim\]"),
        ((Q[:, :0], K, K, C, 9), "0 query heads do not divide among 1 KV heads"),
        ((Q, K, K, C.long(), 9), r"cu_seqlens is torch.int64 \(2,\); int32 \[B \+ 1\] is needed"),
        ((Q, K, K, C[:1], 9), r"cu_seqlens is torch.int32 \(1,\)"),
        ((Q, K, K, C, 0), "max_len is 0; 1 or more is needed"),
    ],
)
def test_refuses_and_says_why(arguments, message):
    with pytest.raises(ValueError, match="varlen_attention: .*" + message):
        dk.varlen_attention(*arguments)
