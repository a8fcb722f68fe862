"""The operation of a decode step's attention in a graph: torch's and the kernel's, through the container's table."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

import dsi_kernels
from dsi.containers.launches import graph_kernels
from dsi.containers.ops import AtenOps, Biased, Heads, NormOp, Rope
from dsi.containers.triton_ops import TritonLayerOps, TritonOps
from dsi_kernels import step_attention

HEADS = Heads(4, 2, 16)


class Layer(NamedTuple):
    """A cache layer as a graph sees it."""

    keys: torch.Tensor
    values: torch.Tensor
    start: torch.Tensor
    filled: torch.Tensor
    tickets: torch.Tensor
    ring: bool = False
    # planned for more than there is room for
    reach: int = 256

    def append(self, keys, values):
        self.keys.index_copy_(2, self.start.view(1), keys)
        self.values.index_copy_(2, self.start.view(1), values)
        return self.keys, self.values

    def reserve(self, batch, shape, length, like):
        return self.start, self.keys, self.values


def layer(repeat, device):
    keys, values = torch.randn(2, 3, 2, 40, 16, device=device).repeat_interleave(repeat, 2).unbind()
    start = torch.tensor(29, device=device)
    return Layer(keys, values, start, start + 1, torch.zeros(6 * repeat, dtype=torch.int32, device=device))


def norms(kind, device, eps=(0.1, 0.1)):
    q, k = (nn.Parameter(torch.randn(16, device=device), requires_grad=False) for _ in range(2))
    return NormOp(kind, q, None, eps[0]), NormOp(kind, k, None, eps[1])


def rope(device, *, pairs, at=None):
    angle = torch.randn(1, 50, 4, device=device)
    angle = angle.repeat_interleave(2, -1) if pairs else angle.repeat(1, 1, 2)
    return Rope.of(angle.cos(), angle.sin(), pairs)._replace(at=torch.tensor([[7], [0], [49]], device=device))


CASES = {
    "plain": {},
    "rope": {"pairs": False},
    "pairs": {"pairs": True},
    "norms": {"norms": "rms"},
    "repeated": {"repeat": 2, "pairs": False},
    "masked": {"masked": True},
    "capped": {"softcap": 2.0, "masked": True},
    "biased": {"biased": {}},
    "biased, masked": {"biased": {"rounded": torch.bfloat16, "scale": 0.3}, "masked": True},
}


def with_biases(mask, device, rounded=None, scale=1.0):
    slopes = torch.tensor([0.5, 0.25, 0.3, 0.7], device=device)
    slopes = slopes if rounded is None else slopes.to(rounded).float()
    return Biased(mask, slopes, None if mask is None else mask[:, 0, 0].long().cumsum(1), rounded, scale)


def both(table, device, *, pairs=None, repeat=1, masked=False, softcap=None, biased=None, **options):
    """(torch's, the kernel's) outputs and caches."""
    torch.manual_seed(0)
    if options.get("norms") is not None:
        options["norms"] = norms(options["norms"], device) if isinstance(options["norms"], str) else options["norms"]
    qkv, kv = torch.randn(3, 8 * 16, device=device), layer(repeat, device)
    terms = None if pairs is None else rope(device, pairs=pairs)
    mask = torch.rand(3, 1, 1, 40, device=device) > 0.3 if masked else None
    if biased is not None:
        mask = with_biases(mask, device, **biased)
    results = []
    for ops, given in ((AtenOps(), terms and terms.taken()), (table, terms)):
        own = kv._replace(keys=kv.keys.clone(), values=kv.values.clone())
        with graph_kernels(), torch.no_grad():
            out = ops.step_attention(qkv, HEADS, given, own, mask, 0.3, softcap, repeat=repeat, **options)
        results.append((out, own.keys, own.values))
    return results


@pytest.mark.parametrize("table", [TritonOps(), TritonLayerOps()], ids=lambda table: table.name)
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_does_what_torch_does(case, table, device, monkeypatch):
    calls = []
    monkeypatch.setattr(
        dsi_kernels, "step_attention", lambda *a, **k: calls.append(k["reach"]) or step_attention(*a, **k)
    )
    wanted, found = both(table, device, **CASES[case])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)
    assert calls == [256]


def test_unlike_norms_are_torch_s(device, monkeypatch):
    monkeypatch.setattr(dsi_kernels, "step_attention", lambda *a, **k: pytest.fail("one eps stands for both"))
    wanted, found = both(TritonLayerOps(), device, pairs=False, norms=norms("rms", device, (0.1, 0.2)))
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=2e-6)
