"""The end of a post-norm layer's attention in a graph: torch's and the kernel's, through the container's table."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

import dsi_kernels
from dsi.containers.launches import graph_kernels
from dsi.containers.linear import FusedLinear
from dsi.containers.ops import AtenOps, NormOp
from dsi.containers.triton_ops import TritonLayerOps, TritonOps

# the module, which the package's function of the same name hides
MODULE = importlib.import_module("dsi_kernels.attention_norm")
CONFIG = {"block_n": 32, "block_s": 16, "block_t": 16, "choice": 2, "num_warps": 4, "stages": 2}


@pytest.fixture
def calls(monkeypatch):
    """The kernel's calls; it is chosen wherever it can be."""
    made = []

    def counted(*given, **options):
        made.append(options)
        return MODULE.attention_norm(*given, **options)

    monkeypatch.setattr(dsi_kernels, "attention_norm", counted)
    monkeypatch.setattr(MODULE, "attention_norm_config", lambda q, columns: CONFIG)
    return made


def layer(device):
    """(q, k, v), the output projection, the residual and the norm after it."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 13, 8, 16, device=device).transpose(1, 2).split((4, 2, 2), 1)
    weight, bias = torch.randn(48, 64, device=device) / 8, torch.randn(48, device=device)
    out = FusedLinear(weight, bias, (), None, "aten")
    gamma, beta = (nn.Parameter(torch.randn(48, device=device), requires_grad=False) for _ in range(2))
    return qkv, out, torch.randn(2, 13, 48, device=device), NormOp("layer", gamma, beta, 0.1)


@pytest.mark.parametrize("limited", ["", "mask", "causal"])
def test_a_projected_attention_is_torch_s(device, calls, limited):
    qkv, *rest = layer(device)
    mask = torch.rand(2, 1, 1, 13, device=device) > 0.3 if limited == "mask" else None
    options = (mask, limited == "causal", 0.2, None)
    with torch.no_grad(), graph_kernels():
        wanted = AtenOps().attend_normed(qkv, *options, *rest)
        found = TritonOps().attend_normed(qkv, *options, *rest)
    assert len(calls) == 1
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_what_the_kernel_does_not_know_is_torch_s(device, calls):
    qkv, out, residual, norm = layer(device)
    additive = torch.zeros(2, 1, 13, 13, device=device)
    cases = [
        (TritonOps(), qkv, None, None, out),
        (TritonOps(), qkv, additive, None, out),
        (TritonOps(), qkv, None, 3.0, out),
        (TritonLayerOps(), qkv, None, None, out),
    ]
    for index, (table, given, mask, softcap, linear) in enumerate(cases):
        with torch.no_grad(), graph_kernels() if index else torch.no_grad():
            table.attend_normed(given, mask, False, 0.2, softcap, linear, residual, norm)
    assert not calls
