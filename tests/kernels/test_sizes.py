"""Any size, not only those that somebody thought of."""

from __future__ import annotations

import pytest
import torch

import dsi_kernels as dk
from tests.kernels.tolerance import assert_close

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
widths = st.integers(1, 700)
seeds = st.integers(0, 2**31)


@few
@given(rows=st.integers(0, 3), width=widths, seed=seeds)
def test_norms(device, rows, width, seed):
    torch.manual_seed(seed)
    x, r = torch.randn(2, rows, width, device=device)
    w, b = torch.randn(2, width, device=device)
    # a row of one or two columns has next to no variance
    assert_close(dk.rms_norm(x, w, 1e-3), dk.rms_norm_reference(x, w, 1e-3), 1e-6)
    assert_close(dk.add_layer_norm(x, r, w, b, 1e-3)[0], dk.add_layer_norm_reference(x, r, w, b, 1e-3)[0], 1e-5)


@few
@given(rows=st.integers(0, 3), width=widths, kind=st.sampled_from(dk.KINDS), seed=seeds)
def test_activations(device, rows, width, kind, seed):
    torch.manual_seed(seed)
    x = torch.randn(rows, 2 * width, device=device)
    assert_close(dk.gated_activation(x, kind), dk.gated_activation_reference(x, kind), 1e-6)
    assert_close(dk.bias_activation(x, None, kind), dk.bias_activation_reference(x, None, kind), 1e-6)


@few
@given(
    S=st.integers(1, 2), heads=st.integers(1, 3), kv_heads=st.integers(1, 2), half=st.integers(1, 40),
    rest=st.integers(0, 40), start=st.integers(0, 5), seed=seeds,
)  # fmt: skip
def test_rope_kv_write(device, S, heads, kv_heads, half, rest, start, seed):
    torch.manual_seed(seed)
    head_dim = 2 * half + rest
    qkv = torch.randn(1, S, (heads + 2 * kv_heads) * head_dim, device=device)
    cos, sin = torch.randn(2, 1, S, 2 * half, device=device)
    caches = torch.zeros(4, 1, kv_heads, 7, head_dim, device=device)
    q = dk.rope_kv_write(qkv, cos, sin, caches[0], caches[1], start, heads, kv_heads, head_dim)
    expected = dk.rope_kv_write_reference(qkv, cos, sin, caches[2], caches[3], start, heads, kv_heads, head_dim)
    assert_close(q, expected, 1e-6)
    assert_close(caches[:2], caches[2:], 1e-6)


@few
@given(
    group=st.integers(1, 5), head_dim=st.integers(1, 256), length=st.integers(0, 90), splits=st.integers(1, 6),
    seed=seeds,
)  # fmt: skip
def test_decode_attention(device, group, head_dim, length, splits, seed):
    torch.manual_seed(seed)
    q = torch.randn(1, group, 1, head_dim, device=device)
    k, v = torch.randn(2, 1, 1, 90, head_dim, device=device)
    mask = torch.rand(1, 1, 1, 90, device=device) > 0.3
    out = dk.decode_attention(q, k, v, length, mask, splits=splits)
    assert_close(out, dk.decode_attention_reference(q, k, v, length, mask), 2e-6)
