from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dsi_kernels as dk
from dsi_kernels.attention import OWN, TORCH, attention_config
from tests.kernels.tolerance import DTYPES, HALVES, assert_close, errors

BLOCKS = {"block_s": 32, "block_t": 16, "num_warps": 4, "stages": 2, "choice": OWN}
# queries, keys, heads, kv heads, head size: whole blocks and rests, a continued text, more queries than keys
SIZES = [(40, 40, 2, 1, 20), (64, 64, 1, 1, 16), (1, 50, 2, 2, 16), (33, 70, 3, 1, 24), (70, 33, 1, 1, 64)]


def heads(S, T, H, G, D, dtype, device, rows=2):
    """q, k and v as views of one fused projection."""
    fused = torch.randn(rows, max(S, T), H + 2 * G, D, dtype=dtype, device=device)
    return tuple(x.transpose(1, 2)[:, :, :n] for x, n in zip(fused.split((H, G, G), 2), (S, T, T), strict=True))


def masks(kind, S, T, device):
    if kind == "none":
        return None
    mask = torch.rand(2, 1, 1 if kind == "keys" else S, T, device=device) > 0.4
    # a query that sees nothing, and a row of another's
    mask[0, 0, 0] = kind == "keys"
    return mask


def near(actual, expected):
    # weights that are rounded to the dtype are summed over the keys
    assert_close(actual, expected, {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[expected.dtype])


@pytest.mark.parametrize("kind", ["none", "keys", "pairs"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_each_query_sees(device, size, dtype, causal, kind):
    torch.manual_seed(0)
    q, k, v = heads(*size, dtype, device)
    mask = masks(kind, *size[:2], device)
    out = dk.attention(q, k, v, mask, causal=causal, scale=0.7, config=BLOCKS)
    near(out, dk.attention_reference(q, k, v, mask, causal=causal, scale=0.7))
    assert out.is_contiguous()


def test_a_mask_of_keys_that_is_expanded_or_shared(device):
    torch.manual_seed(1)
    q, k, v = heads(20, 20, 2, 2, 16, torch.float32, device)
    mask = torch.rand(1, 1, 1, 20, device=device) > 0.4
    expected = dk.attention_reference(q, k, v, mask)
    near(dk.attention(q, k, v, mask, config=BLOCKS), expected)
    near(dk.attention(q, k, v, mask.expand(2, 1, 20, 20), config=BLOCKS), expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_as_near_to_the_exact_result_as_torch(device, dtype):
    torch.manual_seed(2)
    q, k, v = heads(64, 64, 2, 2, 32, dtype, device)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double()).transpose(1, 2)
    stock = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    assert errors(dk.attention(q, k, v, config=BLOCKS), exact)[1] <= 1.2 * errors(stock, exact)[1]


def test_great_scores_do_not_overflow(device):
    q, k, v = heads(20, 40, 1, 1, 16, torch.float32, device)
    assert_close(dk.attention(q * 1e3, k * 1e3, v, config=BLOCKS), dk.attention_reference(q * 1e3, k * 1e3, v), 1e-4)


def test_the_default_leaves_it_to_torch():
    config = attention_config(100, 64, causal=False, masked=False, like=torch.empty(1))
    assert config["choice"] == TORCH
    assert set(config) == set(BLOCKS)


Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Q, K, K[:, :, 1:]), r"must be \[B, heads, S, head_dim\]"),
        ((Q, K[..., :7], K[..., :7]), r"must be \[B, heads, S, head_dim\]"),
        ((Q[:, :3], K, K), "3 query heads do not divide among 2 KV heads"),
        ((torch.zeros(1, 1, 1, 300),) * 3, "head_dim 300 is not from 1 to 256"),
        ((Q, K, K, torch.ones(2, 1, 5, 6, dtype=torch.bool)), r"mask has shape \(2, 1, 5, 6\)"),
        ((Q, K, K, torch.ones(2, 4, 5, 7, dtype=torch.bool)), r"mask has shape \(2, 4, 5, 7\)"),
        ((Q, K, K, torch.ones(2, 1, 5, 7)), "mask is torch.float32; bool"),
        ((Q, K.half(), K.half()), "dtypes differ"),
        ((Q.transpose(2, 3).contiguous().transpose(2, 3), K, K), "the last axis of q must be contiguous"),
    ],
)
def test_refuses_and_says_why(arguments, message):
    with pytest.raises(ValueError, match="attention: .*" + message):
        dk.attention(*arguments)
