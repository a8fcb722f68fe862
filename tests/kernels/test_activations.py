from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN

from dsi_kernels import KINDS, activate_reference, bias_activation
from tests.kernels.tolerance import DTYPES, HALVES, assert_close, errors, share_equal

# what transformers calls each kind
STOCK = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu"}


def spread(dtype):
    """Arguments small, middling and large, of both signs, and every integer up to the tails."""
    return torch.cat([torch.randn(200), torch.randn(100) * 1e-3, torch.arange(-30.0, 31.0), torch.zeros(1)]).to(dtype)


def test_every_kind_has_a_stock_counterpart():
    assert sorted(STOCK) == list(KINDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_matches_the_reference(kind, dtype, device):
    x = spread(dtype).to(device)
    # exp of a large number is inf on the way, as on a GPU; numpy, which interprets, warns
    with np.errstate(over="ignore"):
        y = bias_activation(x, None, kind)
    # fp32: 1 + erf cancels in the negative tail, to a unit of 1
    assert_close(y, activate_reference(x, kind), 1e-6 if dtype is torch.float32 else None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_transformers_function(kind):
    x = spread(torch.float32)
    assert_close(activate_reference(x, kind), ACT2FN[STOCK[kind]](x), 1e-6)


@pytest.mark.parametrize("kind", ["gelu", "relu", "silu"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounds_once_as_torch_does(kind, dtype, device):
    x = torch.randn(4096).to(device, dtype)
    assert share_equal(bias_activation(x, None, kind), ACT2FN[STOCK[kind]](x)) > 0.99


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_quick_gelu_is_nearer_than_transformers(dtype, device):
    """transformers rounds 1.702 x, the sigmoid and the product; one rounding lies nearer to the exact value."""
    x = torch.randn(4096).to(device, dtype)
    exact = x.double() * torch.sigmoid(1.702 * x.double())
    ours, stock = errors(bias_activation(x, None, "quick_gelu"), exact), errors(ACT2FN["quick_gelu"](x), exact)
    assert ours[0] <= stock[0]
    assert ours[1] < 0.8 * stock[1]


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_does_not_pass(kind, device):
    x = torch.randn(200, device=device)
    y = bias_activation(x, None, kind)
    for other in set(KINDS) - {kind}:
        with pytest.raises(AssertionError):
            assert_close(y, activate_reference(x, other), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_extremes(kind, device):
    """Large arguments neither overflow on the way nor come out as NaN; NaN does."""
    x = torch.tensor([3e4, 1e30, -3e4, -1e30, float("inf"), float("nan"), -0.0, 0.0], device=device)
    # exp of a large number is inf on the way, as on a GPU; numpy, which interprets, warns
    with np.errstate(over="ignore"):
        y = bias_activation(x, None, kind).cpu()
    assert torch.equal(y[:5], torch.tensor([3e4, 1e30, 0.0, 0.0, float("inf")]))
    assert y[5].isnan()
    assert torch.equal(y[6:], torch.zeros(2))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_gelu_of_16_bit_has_the_exact_values_bits(dtype, spread, device):
    torch.manual_seed(0)
    x = (torch.randn(1 << 15) * spread).clamp(-4.5, 4.5).to(dtype)
    exact = x.double() * torch.special.ndtr(x.double())
    found = bias_activation(x.to(device), None, "gelu").cpu()
    assert share_equal(found, exact.to(dtype)) > 0.998


def test_gelu_of_16_bit_in_the_tails(device):
    """Within a few of fp16's least numbers everywhere, beyond the polynomial's range too."""
    x = torch.cat([-torch.linspace(3, 9, 4001), torch.linspace(3, 9, 4001), torch.tensor([-6e4, 6e4])]).half()
    exact = x.double() * torch.special.ndtr(x.double())
    found = bias_activation(x.to(device), None, "gelu").cpu().double()
    assert bool(((found - exact).abs() <= exact.abs() * 2**-11 + 6 * 2**-24).all())
