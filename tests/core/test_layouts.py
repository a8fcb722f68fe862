"""Row orders of fused projections."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsi.containers.layouts import Runs, inverse, row_permutation

SMALL = st.integers(1, 4)


@given(heads=SMALL, head_dim=SMALL)
def test_head_interleaved_is_the_view_that_models_take(heads, head_dim):
    stored = torch.arange(heads * 3 * head_dim)
    # what GPT-NeoX does with a row of its projection
    q, k, v = stored.view(heads, 3 * head_dim).chunk(3, dim=-1)
    wanted = torch.cat([part.reshape(-1) for part in (q, k, v)])
    order = row_permutation("head_interleaved", heads=heads, kv_heads=heads, head_dim=head_dim)
    assert torch.equal(stored[order], wanted)


@given(kv_heads=SMALL, group=SMALL, head_dim=SMALL)
def test_kv_grouped_is_the_view_that_models_take(kv_heads, group, head_dim):
    stored = torch.arange(kv_heads * (group + 2) * head_dim)
    # what Falcon does with a row of its projection
    rows = stored.view(kv_heads, group + 2, head_dim)
    wanted = torch.cat([part.reshape(-1) for part in (rows[:, :-2], rows[:, -2], rows[:, -1])])
    order = row_permutation("kv_grouped", heads=kv_heads * group, kv_heads=kv_heads, head_dim=head_dim)
    assert torch.equal(stored[order], wanted)


@given(order=st.integers(1, 40).flatmap(lambda n: st.permutations(range(n))))
def test_the_inverse_undoes_any_permutation(order):
    order = torch.tensor(order)
    stored = torch.randn(len(order))
    assert torch.equal(stored[order][inverse(order)], stored)
    assert torch.equal(stored[inverse(order)][order], stored)
    assert torch.equal(inverse(inverse(order)), order)


@given(kv_heads=SMALL, group=SMALL, head_dim=SMALL)
def test_every_row_is_there_once(kv_heads, group, head_dim):
    order = row_permutation("kv_grouped", heads=kv_heads * group, kv_heads=kv_heads, head_dim=head_dim)
    assert order.sort().values.tolist() == list(range((kv_heads * group + 2 * kv_heads) * head_dim))


@pytest.mark.parametrize("layout", ["thirds", "halves"])
def test_rows_that_are_in_order_need_no_permutation(layout):
    assert row_permutation(layout, heads=4, kv_heads=4, head_dim=8) is None


def test_heads_that_do_not_fit():
    with pytest.raises(ValueError, match="'head_interleaved' needs as many kv heads as heads, got 2 and 4"):
        row_permutation("head_interleaved", heads=4, kv_heads=2, head_dim=8)
    with pytest.raises(ValueError, match="'kv_grouped' needs heads divisible by kv heads, got 4 and 3"):
        row_permutation("kv_grouped", heads=4, kv_heads=3, head_dim=8)
    with pytest.raises(ValueError, match="unknown layout 'quarters'; known: thirds, halves"):
        row_permutation("quarters", heads=4, kv_heads=4, head_dim=8)


@given(order=st.integers(1, 40).flatmap(lambda n: st.permutations(range(n))), length=st.integers(1, 5))
def test_runs_hold_any_permutation(order, length):
    permutation = (torch.tensor(order)[:, None] * length + torch.arange(length)).view(-1)
    runs = Runs.of(permutation)
    assert torch.equal(runs.permutation(), permutation)
    assert runs.starts.numel() <= len(order)


@pytest.mark.parametrize("layout", ["head_interleaved", "kv_grouped"])
def test_whole_heads_are_runs(layout):
    runs = Runs.of(row_permutation(layout, heads=4, kv_heads=4, head_dim=8))
    assert runs.length == 8
    assert runs.starts.numel() == 12
