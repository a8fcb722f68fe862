from __future__ import annotations

import sys

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from dsi_kernels import rope_kv_write, rope_kv_write_reference
from tests.kernels.tolerance import DTYPES, HALVES, assert_close, errors, share_equal

UNTOUCHED = 7.0


class Case:
    """Operands of a call, and the same for the reference."""

    def __init__(
        self, device, dtype=torch.float32, *, B=2, S=2, heads=2, kv_heads=1, head_dim=24, rotary=24, capacity=9,
        cos_rows=None, cos_dtype=None, tokens_first=False,
    ):  # fmt: skip
        self.layout = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        self.qkv = torch.randn(B, S, (heads + 2 * kv_heads) * head_dim).to(device, dtype)
        angles = torch.randn(cos_rows or B, S, rotary)
        self.cos, self.sin = (f(angles).to(device, cos_dtype or dtype) for f in (torch.cos, torch.sin))
        shape = (B, capacity, kv_heads, head_dim) if tokens_first else (B, kv_heads, capacity, head_dim)
        caches = [torch.full(shape, UNTOUCHED, dtype=dtype, device=device) for _ in range(4)]
        self.k, self.v, self.ref_k, self.ref_v = (c.transpose(1, 2) if tokens_first else c for c in caches)
        if not rotary:
            self.cos = self.sin = None

    def run(self, start):
        return rope_kv_write(self.qkv, self.cos, self.sin, self.k, self.v, start, **self.layout)

    def reference(self, start):
        return rope_kv_write_reference(self.qkv, self.cos, self.sin, self.ref_k, self.ref_v, start, **self.layout)

    def check(self, start):
        """The queries, and the whole of both caches, the untouched part too."""
        before = self.qkv.clone()
        assert_close(self.run(start), self.reference(start))
        assert_close(self.k, self.ref_k)
        assert torch.equal(self.v, self.ref_v)
        assert torch.equal(self.qkv, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"S": 1, "heads": 3, "kv_heads": 2, "head_dim": 48, "rotary": 48},
        {"head_dim": 80, "rotary": 32},
        {"head_dim": 16, "rotary": 2, "heads": 1, "S": 1},
        {"rotary": 0},
        {"head_dim": 7, "rotary": 6},
        {"head_dim": 1, "rotary": 0},
        {"cos_rows": 1},
        {"cos_dtype": torch.float32},
        {"tokens_first": True, "kv_heads": 2},
    ],
    ids=str,
)
def test_matches_reference(sizes, dtype, device):
    Case(device, dtype, **sizes).check(2)


@pytest.mark.parametrize("tile", [1, 64, 2048])
def test_several_heads_a_program(tile, device, monkeypatch):
    """As with many tokens: one, two or all of seven heads to a program."""
    monkeypatch.setattr(sys.modules["dsi_kernels.rope_kv_write"], "MANY_TOKENS", 1)
    monkeypatch.setattr(sys.modules["dsi_kernels.rope_kv_write"], "TILE", tile)
    Case(device, torch.float16, heads=3, kv_heads=2).check(2)


@pytest.mark.parametrize("where", [0, 7])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_a_start_on_the_device(where, integer, device):
    Case(device).check(torch.tensor(where, dtype=integer, device=device))


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_a_start_for_each_row(integer, device):
    Case(device, B=3).check(torch.tensor([5, 0, 7], dtype=integer, device=device))


def test_a_start_for_each_row_may_be_expanded(device):
    Case(device).check(torch.tensor([4], device=device).expand(2))


@pytest.mark.parametrize("where", [8, 9, 2**32, -1])
def test_what_does_not_fit_is_not_written(where, device):
    """A position on the device cannot be refused; it must not write outside the cache, nor to another row's."""
    case = Case(device, B=2)
    roomy = torch.full((2, 2, 1, 30, 24), UNTOUCHED, device=device)
    case.k, case.v = roomy[:, :, :, 10:19]
    q = case.run(torch.tensor([where, 1], device=device))
    assert_close(q, case.reference(1))
    assert_close(case.k[1], case.ref_k[1])
    rest = roomy.clone()
    rest[:, 1, :, 11:13] = UNTOUCHED
    for s in range(2):
        if 0 <= where + s < 9:
            rest[:, 0, :, 10 + where + s] = UNTOUCHED
            assert torch.equal(case.v[0, :, where + s], case.ref_v[0, :, 1 + s])
    assert (rest == UNTOUCHED).all()


def test_strides_of_the_operands(device):
    """Caches that are slices of larger ones, cos and sin that are slices of a table."""
    case = Case(device, kv_heads=2)
    k = torch.full((2, 4, 20, 40), UNTOUCHED, device=device)
    v = torch.full((3, 3, 15, 50), UNTOUCHED, device=device)
    case.k, case.v = k[:, 1:3, 5:14, :24], v[1:, :2, 2:11, 26:]
    table = torch.zeros(2, 2, 6, 50, device=device)
    table[:, :, ::3, 4:28] = torch.stack([case.cos, case.sin])
    case.cos, case.sin = table[:, :, ::3, 4:28]
    case.check(3)
    case.k.fill_(UNTOUCHED)
    case.v.fill_(UNTOUCHED)
    assert (k == UNTOUCHED).all()
    assert (v == UNTOUCHED).all()


def stock_rope(case):
    B, S, _ = case.qkv.shape
    q, k, _ = case.qkv.view(B, S, -1, 64).split((2, 1, 1), dim=2)
    return apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), case.cos, case.sin)


def llama_case(device, dtype):
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
    case = Case(device, dtype, B=2, S=4, head_dim=64, rotary=64, capacity=4)
    positions = torch.arange(4, device=device)[None] + torch.tensor([[0], [30]], device=device)
    case.cos, case.sin = LlamaRotaryEmbedding(config).to(device)(case.qkv, positions)
    return case


def test_is_transformers_rope(device):
    case = llama_case(device, torch.float32)
    q, k = stock_rope(case)
    assert_close(case.run(0), q, 1e-6)
    assert_close(case.k, k, 1e-6)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounds_once_and_is_nearer_than_transformers(dtype, device):
    """transformers rounds both products and the sum. One rounding is within a unit or two of that: count equal bits."""
    case = llama_case(device, dtype)
    stock, _ = stock_rope(case)
    ours = case.run(0)
    case.qkv, case.cos, case.sin = case.qkv.double(), case.cos.double(), case.sin.double()
    exact, _ = stock_rope(case)
    assert errors(ours, exact)[0] <= errors(stock, exact)[0]
    assert errors(ours, exact)[1] < 0.8 * errors(stock, exact)[1]
    assert share_equal(ours, exact.to(dtype)) > 0.998
    assert share_equal(stock, exact.to(dtype)) < 0.9


def rotate_pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def rotate_half(x, sign=1):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-sign * second, sign * first), dim=-1)


@pytest.mark.parametrize(
    "rotate", [rotate_pairs, lambda x: rotate_half(x, -1), lambda x: 0 * x], ids=["pairs", "backwards", "cos alone"]
)
def test_a_wrong_rotation_does_not_pass(rotate, device):
    case = llama_case(device, torch.float32)
    q = case.qkv.view(2, 4, 4, 64)[:, :, :2].transpose(1, 2)
    cos, sin = case.cos[:, None], case.sin[:, None]
    y = case.run(0)
    assert_close(y, q * cos + rotate_half(q) * sin, 1e-6)
    with pytest.raises(AssertionError):
        assert_close(y, q * cos + rotate(q) * sin, 1e-6)


def test_a_rotated_value_or_a_straight_key_does_not_pass(device):
    case = llama_case(device, torch.float32)
    case.run(0)
    _, k, v = case.qkv.view(2, 4, 4, 64).split((2, 1, 1), dim=2)
    assert torch.equal(case.v, v.transpose(1, 2))
    with pytest.raises(AssertionError):
        assert_close(case.k, k.transpose(1, 2))


@pytest.mark.parametrize(("B", "S"), [(0, 2), (2, 0)])
def test_no_tokens(B, S, device):
    case = Case(device, B=B, S=S)
    assert case.run(0).shape == (B, 2, S, 24)
    assert (case.k == UNTOUCHED).all()


def changed(**changes):
    def change(case):
        for name, value in changes.items():
            setattr(case, name, value(getattr(case, name)))

    return change


@pytest.mark.parametrize(
    ("change", "start", "message"),
    [
        (changed(qkv=lambda t: t[:, :, 1:]), 0, r"qkv has shape \(2, 2, 95\); \[B, S, 96\] is \(heads \+ 2 kv_heads\)"),
        (changed(qkv=lambda t: t[0]), 0, "qkv has shape"),
        (changed(layout=lambda d: {**d, "kv_heads": 0}), 0, "kv_heads=0"),
        (changed(k=lambda t: t[:, :0]), 0, r"k_cache \(2, 0, 9, 24\) and v_cache .* must both be \[B=2, kv_heads=1"),
        (changed(v=lambda t: t[:, :, 1:]), 0, r"v_cache \(2, 1, 8, 24\)"),
        (changed(k=lambda t: t[0]), 0, r"k_cache \(1, 9, 24\)"),
        (changed(v=lambda t: t.half()), 0, "v_cache torch.float16"),
        (changed(qkv=lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)), 0, "qkv must be contiguous"),
        (changed(k=lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)), 0, "last axis of k_cache must be contig"),
        (changed(sin=lambda t: None), 0, "cos and sin come together; sin is None"),
        (changed(cos=lambda t: t[:, 1:]), 0, r"cos \(2, 1, 24\) and sin \(2, 2, 24\) must both be \[2 or 1, 2"),
        (changed(cos=lambda t: t[..., :5], sin=lambda t: t[..., :5]), 0, "rotary_dim 5 of cos and sin must be even"),
        (changed(cos=lambda t: t.repeat(1, 1, 2), sin=lambda t: t.repeat(1, 1, 2)), 0, "rotary_dim 48 .* head_dim 24"),
        (changed(cos=lambda t: t.half(), sin=lambda t: t.half()), 0, "cos is torch.float16"),
        (changed(sin=lambda t: t.double()), 0, "sin torch.float64"),
        (changed(cos=lambda t: t.mT.contiguous().mT), 0, "last axis of cos must be contiguous"),
        (changed(k=lambda t: t.to("meta")), 0, "k_cache meta"),
        (changed(), 8, "2 tokens from start=8 on do not fit a cache of capacity 9"),
        (changed(), -1, "start=-1"),
        (changed(), torch.tensor(1.0), "start is torch.float32"),
        (changed(), torch.tensor([0, 1, 2]), r"start has shape \(3,\); \(\) or \(2,\)"),
        (changed(), torch.tensor(0, device="meta"), "start is on meta"),
    ],
)
def test_refuses_and_says_why(change, start, message, device):
    case = Case(device)
    change(case)
    if isinstance(start, torch.Tensor) and not start.is_meta:
        start = start.to(device)
    with pytest.raises(ValueError, match=message):
        case.run(start)
