"""The products of a decode step: which kernel takes which, and that it computes what torch does."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

import dsi.containers.triton_products as products
from dsi.containers.launches import graph_kernels
from dsi.containers.linear import FusedLinear, Source
from dsi.containers.ops import AtenOps, NormOp
from dsi.containers.triton_ops import TritonOps
from dsi.containers.triton_step import TritonStepOps
from dsi_kernels import _pdl
from tests.kernels.tolerance import assert_close

OURS = {"block_n": 16, "block_k": 32, "splits": 2, "stages": 1, "num_warps": 1, "dependent": 2, "library": 1}


@pytest.fixture
def ours(monkeypatch):
    """skinny wins everywhere."""
    # the package's function may have the module's name
    module = importlib.import_module("dsi_kernels.skinny")
    monkeypatch.setattr(module, "skinny_config", lambda x, weight: OURS)


def linear(device, rows, columns, dtype=torch.bfloat16):
    weight, bias = torch.randn(rows, columns, device=device, dtype=dtype) / columns**0.5, torch.randn(rows).to(device)
    source = Source(path="one", rows=rows, transposed=False, bias=True)
    return FusedLinear(weight, bias.to(dtype), (source,), None, "aten")


def parameter(t):
    return nn.Parameter(t, requires_grad=False)


def norm(device, columns, kind):
    torch.manual_seed(1)
    weight = (1 + 0.3 * torch.randn(columns)).to(device, torch.bfloat16)
    shift = torch.randn(columns).to(weight)
    return NormOp(kind, parameter(weight), parameter(shift) if kind == "layer" else None, 1e-2)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 32, 33])
def test_every_operation_is_torchs(rows, kind, device, ours):
    torch.manual_seed(0)
    x, over = torch.randn(rows, 48, device=device, dtype=torch.bfloat16), norm(device, 48, kind)
    wide, narrow = linear(device, 64, 48), linear(device, 48, 48)
    own, plain = TritonStepOps(), AtenOps()
    with graph_kernels():
        for table in (own, plain):
            found = [
                table.norm_project(over, wide, x),
                table.norm_product(over, x, wide.weight, None),
                table.norm_expand(over, wide, x, "silu", True),
                table.norm_expand(over, wide, x, "relu", False),
                table.project(wide, x),
                table.project_add(narrow, x, x),
                table.activate(wide, x, "gelu"),
                table.gate(wide, x, "silu"),
                total := table.project_add(narrow, x, x, over),
                table.norm_project(over, wide, total),
                table.norm_product(over, total, wide.weight, None),
                table.norm_expand(over, wide, total, "silu", True),
                table.norm_expand(over, wide, total, "relu", False),
                table.norm_project(norm(device, 48, "rms" if kind == "layer" else "layer"), wide, total),
            ]
            if table is own:
                kept = found
    for one, other in zip(kept, found, strict=True):
        # the layers round between norm, product and what follows
        assert_close(one, other, 5e-2)


def taken(x, weight, over=None):
    kernel = products.product_of(x, weight, over)
    return None if kernel is None else kernel.__name__


def test_who_computes(device, ours):
    weight = torch.zeros(64, 48, device=device, dtype=torch.bfloat16)
    row = weight[:1]
    assert taken(row, weight) is None, "outside of a graph the launch costs more than it saves"
    with graph_kernels():
        assert [taken(weight[:n], weight) for n in (1, 2, 3, 32, 33)] == ["matvec"] * 2 + ["skinny"] * 2 + [None]
        assert taken(weight[:3].float(), weight.float()) is None
        assert taken(weight[:1].float(), weight.float()) == "matvec"
        assert taken(row[None], weight) is None
        assert taken(row.float(), weight) is None
        assert taken(weight[:3, :24], weight[:, :24]) is None
        assert taken(row, weight, NormOp("rms", None, None, 1e-5)) is None
        assert products.linear_product(nn.Linear(48, 64), row) is None


def test_a_sum_is_normed_where_its_parts_are_added_up(device, ours):
    x, over = torch.zeros(3, 48, device=device, dtype=torch.bfloat16), norm(device, 48, "rms")
    narrow = linear(device, 48, 48)
    assert products.sum_product(narrow, x, x, over) is None
    with graph_kernels():
        assert products.sum_product(narrow, x, x, over).__name__ == "skinny_norm"
        assert products.sum_product(narrow, x[:2], x[:2], over) is None
        assert products.sum_product(narrow, x, x, NormOp("rms", over.weight, None, 1e-5, 1.0)) is None
        assert products.sum_product(narrow, x, x.T.contiguous().T, over) is None


@pytest.mark.parametrize("table", [TritonStepOps(), TritonOps()], ids=["a step's", "all"])
def test_what_a_norm_came_to_is_not_computed_again_nor_taken_for_another(table, device, ours):
    x, over, wide = torch.randn(3, 48).to(device, torch.bfloat16), norm(device, 48, "rms"), linear(device, 64, 48)
    with graph_kernels():
        total = table.project_add(linear(device, 48, 48), x, x, over)
        right = table.norm_project(over, wide, total)
        # the sum may be gone by then, its norm is not
        total.zero_()
        assert torch.equal(table.norm_project(over, wide, total), right)
        assert torch.equal(table.norm_project(norm(device, 48, "rms"), wide, total), wide.bias.expand(3, -1))


def test_the_library_computes_where_nothing_was_measured(device):
    weight = torch.zeros(64, 48, device=device, dtype=torch.bfloat16)
    with graph_kernels():
        assert taken(weight[:8], weight) is None


def test_a_graph_says_whether_kernels_overlap(monkeypatch):
    for on in (False, True):
        monkeypatch.setattr("dsi.containers.launches.DEPENDENT", on)
        with graph_kernels():
            assert _pdl.SWITCH.get() is on
        assert not _pdl.SWITCH.get()
