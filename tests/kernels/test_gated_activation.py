from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from dsi_kernels import KINDS, gated_activation, gated_activation_reference
from tests.kernels.tolerance import DTYPES, HALVES, assert_close, share_equal


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# 2200 takes a second block
@pytest.mark.parametrize("shape", [(1, 2), (2, 3, 258), (2, 2200)], ids=str)
def test_matches_reference(shape, dtype, kind, device):
    x = torch.randn(shape).to(device, dtype)
    before = x.clone()
    y = gated_activation(x, kind)
    assert y.dtype == dtype
    assert y.shape == (*shape[:-1], shape[-1] // 2)
    # fp32: 1 + erf cancels in the negative tail, to a unit of 1
    assert_close(y, gated_activation_reference(x, kind), 1e-6 if dtype is torch.float32 else None)
    assert torch.equal(x, before)


def test_is_a_llama_mlp(device):
    config = LlamaConfig(hidden_size=32, intermediate_size=48, hidden_act="silu")
    mlp = LlamaMLP(config).to(device)
    x = torch.randn(2, 3, 32, device=device)
    with torch.no_grad():
        gate_up = x @ torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).T
        assert_close(mlp.down_proj(gated_activation(gate_up, "silu")), mlp(x), 1e-6)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounds_the_activation_before_the_product(dtype, device):
    """Two roundings, as act_fn(gate) * up has. One rounding is within a unit, so count equal bits instead."""
    x = torch.randn(32, 1024).to(device, dtype)
    gate, up = x.chunk(2, dim=-1)
    stock = torch.nn.functional.silu(gate) * up
    one_rounding = (torch.nn.functional.silu(gate.float()) * up.float()).to(dtype)
    assert share_equal(gated_activation(x, "silu"), stock) > 0.99
    assert share_equal(one_rounding, stock) < 0.9


@pytest.mark.parametrize(
    "rival",
    [
        lambda gate, up: torch.nn.functional.silu(up) * gate,
        lambda gate, up: torch.nn.functional.silu(gate * up),
        lambda gate, up: torch.nn.functional.silu(gate) + up,
    ],
    ids=["halves swapped", "product first", "sum"],
)
def test_a_wrong_rival_does_not_pass(rival, device):
    x = torch.randn(3, 100, device=device)
    with pytest.raises(AssertionError):
        assert_close(gated_activation(x, "silu"), rival(*x.chunk(2, dim=-1)))


def test_interleaved_halves_do_not_pass(device):
    x = torch.randn(3, 100, device=device)
    with pytest.raises(AssertionError):
        assert_close(gated_activation(x, "silu"), torch.nn.functional.silu(x[:, ::2]) * x[:, 1::2])


def test_no_rows(device):
    assert gated_activation(torch.ones(3, 0, 64, device=device), "silu").shape == (3, 0, 32)


@pytest.mark.parametrize(
    ("x", "kind", "message"),
    [
        (torch.ones(2, 64), "swiglu", "gated_activation: kind 'swiglu' is unknown"),
        (torch.ones(2, 65), "silu", r"gate_up \(2, 65\) must be \[..., 2 I\]"),
        (torch.ones(64, 2).t(), "silu", "gate_up must be contiguous"),
        (torch.ones(2, 64).double(), "silu", "gate_up is torch.float64"),
        (torch.ones(2, 0), "silu", r"gate_up has shape \(2, 0\)"),
    ],
)
def test_refuses_and_says_why(x, kind, message, device):
    with pytest.raises(ValueError, match=message):
        gated_activation(x.to(device), kind)
