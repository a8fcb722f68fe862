from __future__ import annotations

import pytest
import torch

from dsi_kernels import KINDS
from dsi_kernels.linear_norm import linear_norm_reference
from dsi_kernels.skinny import skinny, skinny_config, skinny_norm, skinny_reference
from tests.kernels.tolerance import HALVES, assert_close

SMALL = {"block_n": 16, "block_k": 32, "splits": 1, "stages": 1, "num_warps": 1, "dependent": 2}


def operands(device, dtype=torch.bfloat16, *, rows=3, N=20, K=80, gated=False):
    torch.manual_seed(0)
    width = 2 * N if gated else N
    made = {
        "x": torch.randn(rows, K),
        "weight": torch.randn(width, K) / K**0.5,
        "bias": torch.randn(width),
        "norm_weight": 1 + 0.3 * torch.randn(K),
        "norm_bias": torch.randn(K),
        "residual": torch.randn(rows, N),
    }
    return {name: t.to(device, dtype) for name, t in made.items()}


def without(given, *names):
    return {name: t for name, t in given.items() if name not in names}


def check(given, *, splits=1, **options):
    before = {name: t.clone() for name, t in given.items()}
    found = skinny(**given, **options, config={**SMALL, "splits": splits})
    assert_close(found, skinny_reference(**given, **options), 1e-2)
    assert all(torch.equal(given[name], t) for name, t in before.items())


@pytest.mark.parametrize("splits", [1, 2, 3, 64])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("rows", "N", "K"), [(1, 1, 1), (3, 20, 80), (16, 33, 100), (17, 16, 64), (32, 40, 257)], ids=str
)
def test_plain(rows, N, K, dtype, splits, device):
    given = operands(device, dtype, rows=rows, N=N, K=K)
    check(without(given, "norm_weight", "norm_bias"), splits=splits)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norms(norm, splits, device):
    given = without(operands(device), *(["norm_bias"] if norm == "rms" else []))
    check(given, norm=norm, eps=1e-2, splits=splits)


def test_the_norm_after_it_takes_the_sum_as_rounded(device):
    for splits in (1, 3):
        for rows, norm in ((1, "rms"), (5, "layer"), (32, "rms")):
            given = operands(device, rows=rows)
            shift = given.pop("norm_bias")[:20] if norm == "layer" else None
            gamma = given.pop("norm_weight")[:20]
            given.pop("norm_bias", None)
            after = (norm, gamma, shift, 1e-2)
            operand = (given["x"], given["weight"], given["bias"], given["residual"], *after)
            before = [t.clone() for t in operand[:4]]
            found = skinny_norm(*operand, config={**SMALL, "splits": splits})
            for one, other in zip(found, linear_norm_reference(*operand), strict=True):
                assert_close(one, other, 2e-2)
            assert_close(found[1], skinny(**given, config={**SMALL, "splits": splits}), 0.0)
            assert all(torch.equal(one, other) for one, other in zip(before, operand[:4], strict=True))
            rival = linear_norm_reference(given["x"], given["weight"], None, given["residual"], *after)
            with pytest.raises(AssertionError):
                assert_close(found[0], rival[0], 2e-2)


@pytest.mark.parametrize("change", [{"residual": (3, 6)}, {"norm": "batch"}, {"norm_weight": None}], ids=str)
def test_the_norm_after_it_refuses(change, device):
    given = without(operands(device), "norm_bias")
    given["norm_weight"] = given["norm_weight"][:20]
    given |= {"norm": "rms", "norm_bias": None, "eps": 1e-5}
    given |= {name: torch.ones(v).to(given["x"]) if isinstance(v, tuple) else v for name, v in change.items()}
    with pytest.raises(ValueError, match="skinny_norm: "):
        skinny_norm(**given)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [False, True])
def test_activations(gated, kind, splits, device):
    given = without(operands(device, gated=gated, rows=5), "norm_weight", "norm_bias")
    check(given, kind=kind, gated=gated, splits=splits)
    check(without(given, "bias", "residual"), kind=kind, gated=gated, splits=splits)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("forgotten", ["bias", "residual"])
def test_a_wrong_rival_does_not_pass(forgotten, splits, device):
    given = without(operands(device), "norm_weight", "norm_bias")
    rival = skinny_reference(**{**given, forgotten: torch.zeros_like(given[forgotten])})
    with pytest.raises(AssertionError):
        assert_close(skinny(**given, config={**SMALL, "splits": splits}), rival)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(33, 80)}, r"x \(33, 80\) and weight \(20, 80\) must be \[1 to 32, K\]"),
        ({"x": torch.ones(3, 79)}, r"x \(3, 79\)"),
        ({"x": torch.ones(3, 80).float()}, "x is torch.float32; float16 and bfloat16"),
        ({"norm": "batch"}, "norm 'batch' is unknown"),
        ({"norm": "rms", "norm_weight": None}, "the rms norm has a weight"),
        ({"kind": "tanh"}, "kind 'tanh' is unknown"),
        ({"gated": True, "kind": "silu", "weight": torch.ones(7, 80), "bias": None}, "7 are odd"),
        ({"residual": torch.ones(3, 6)}, r"residual has shape \(3, 6\); \(3, 20\)"),
        ({"bias": torch.ones(6)}, r"bias has shape \(6,\); \(20,\)"),
        ({"weight": torch.ones(20, 80).half()}, "weight torch.float16"),
        ({"weight": torch.ones(80, 20).bfloat16().T}, "weight must be contiguous"),
    ],
)
def test_refuses_and_says_why(change, message, device):
    given = {**operands(device), **change}
    for name in change:
        t = given[name]
        if isinstance(t, torch.Tensor):
            keep = "float" in message or "contiguous" in message
            given[name] = t.to(device) if keep else t.to(device, torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        skinny(**given)


def test_the_library_computes_where_nothing_is_known(device):
    given = operands(device)
    assert skinny_config(given["x"], given["weight"])["library"] == 2
