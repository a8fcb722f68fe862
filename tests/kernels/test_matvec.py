from __future__ import annotations

import pytest
import torch

from dsi_kernels import KINDS, matvec, matvec_reference, rms_norm_reference
from tests.kernels.tolerance import DTYPES, assert_close, share_equal

SMALL = {"block_n": 2, "block_k": 32, "num_warps": 1}
# a row is one tile
WHOLE = {**SMALL, "block_k": 512}


def operands(device, dtype=torch.float32, *, rows=1, N=7, K=50, scale=1.0, gated=False):
    torch.manual_seed(0)
    width = 2 * N if gated else N
    made = {
        "x": torch.randn(rows, K) * scale,
        "weight": torch.randn(width, K) / K**0.5,
        "bias": torch.randn(width),
        "norm_weight": 1 + 0.3 * torch.randn(K),
        "norm_bias": torch.randn(K),
        "residual": torch.randn(rows, N),
    }
    return {name: t.to(device, dtype) for name, t in made.items()}


def without(given, *names):
    return {name: t for name, t in given.items() if name not in names}


def check(given, config=SMALL, **options):
    before = {name: t.clone() for name, t in given.items()}
    found = matvec(**given, **options, config=config)
    assert_close(found, matvec_reference(**given, **options), 3e-6 if found.dtype == torch.float32 else 1e-2)
    assert all(torch.equal(given[name], t) for name, t in before.items())


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (7, 50), (8, 64), (33, 257)], ids=str)
def test_plain(N, K, dtype, rows, device):
    given = operands(device, dtype, rows=rows, N=N, K=K)
    check(without(given, "bias", "norm_weight", "norm_bias", "residual"))
    check(without(given, "norm_weight", "norm_bias"))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# at 1e-3, eps is as large as the mean square
@pytest.mark.parametrize("scale", [1.0, 1e-3], ids="scale{}".format)
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norms(norm, scale, dtype, rows, device):
    given = operands(device, dtype, rows=rows, scale=scale)
    check(without(given, *(["norm_bias"] if norm == "rms" else [])), norm=norm, eps=1e-6)
    if norm == "layer":
        check(without(given, "norm_weight", "norm_bias"), norm=norm, eps=1e-6)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("norm", ["", "rms", "layer"])
def test_a_row_that_is_one_tile(norm, rows, device):
    given = operands(device, rows=rows, N=33, gated=True)
    check(without(given, *([] if norm == "layer" else ["norm_bias"])), WHOLE, norm=norm, kind="silu", gated=True)


@pytest.mark.parametrize("block", [1024, 8192])
@pytest.mark.parametrize(("at", "value"), [(slice(None), 300.0), (0, 5000.0), (3, 5000.0)], ids=["all", "first", "one"])
def test_a_row_far_from_zero_keeps_its_digits(at, value, block, device):
    given = without(operands(device, K=8192), "bias", "residual")
    given["x"][:, at] += value
    exact = {name: t.double() for name, t in given.items()}
    y = torch.nn.functional.layer_norm(exact["x"], (8192,), exact["norm_weight"], exact["norm_bias"], 1e-6)
    found = matvec(**given, norm="layer", config={**SMALL, "block_k": block})
    wanted = y @ exact["weight"].T
    # the mean is rounded to a unit of 300
    assert (found - wanted).norm() / wanted.norm() < 5e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [False, True])
def test_activations(gated, kind, device):
    given = without(operands(device, gated=gated), "residual", "norm_weight", "norm_bias")
    check(given, kind=kind, gated=gated)
    check(without(given, "bias"), kind=kind, gated=gated)


@pytest.mark.parametrize("rows", [1, 2])
def test_everything_at_once(rows, device):
    check(without(operands(device, rows=rows, gated=True), "norm_bias"), norm="rms", kind="silu", gated=True)


def test_the_row_is_not_rounded_before_the_product(device):
    """One rounding at the end; a rival that rounds the normalised row is within a unit, so count bits."""
    given = without(operands(device, torch.bfloat16, N=64, K=512), "norm_bias", "bias", "residual")
    found = matvec(**given, norm="rms", config=SMALL)
    right = matvec_reference(**given, norm="rms")
    rounded = rms_norm_reference(given["x"], given["norm_weight"], 1e-6)
    rival = matvec_reference(rounded, given["weight"])
    assert share_equal(found, right) > 0.95
    assert share_equal(rival, right) < 0.95


@pytest.mark.parametrize("forgotten", ["bias", "residual", "norm_weight"])
def test_a_wrong_rival_does_not_pass(forgotten, device):
    given = without(operands(device), "norm_bias")
    neutral = torch.ones_like if forgotten == "norm_weight" else torch.zeros_like
    rival = matvec_reference(**{**given, forgotten: neutral(given[forgotten])}, norm="rms")
    with pytest.raises(AssertionError):
        assert_close(matvec(**given, norm="rms", config=SMALL), rival)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 50)}, r"x \(3, 50\) and weight \(7, 50\) must be \[1 to 2, K\]"),
        ({"x": torch.ones(1, 49)}, r"x \(1, 49\)"),
        ({"norm": "batch"}, "norm 'batch' is unknown"),
        ({"norm": "rms", "norm_weight": None}, "the rms norm has a weight"),
        ({"kind": "tanh"}, "kind 'tanh' is unknown"),
        ({"gated": True, "weight": torch.ones(14, 50), "bias": None}, "kind '' is unknown"),
        ({"gated": True, "kind": "silu", "residual": None}, "7 are odd"),
        ({"residual": torch.ones(1, 6)}, r"residual has shape \(1, 6\); \(1, 7\)"),
        ({"bias": torch.ones(6)}, r"bias has shape \(6,\); \(7,\)"),
        ({"norm_weight": torch.ones(49)}, r"norm_weight has shape \(49,\)"),
        ({"weight": torch.ones(7, 50).half()}, "weight torch.float16"),
        ({"weight": lambda on: torch.ones(50, 7, device=on).T}, "weight must be contiguous"),
    ],
)
def test_refuses_and_says_why(change, message, device):
    given = {**operands(device), **change}
    given = {name: t(device) if callable(t) else t.to(device) if hasattr(t, "to") else t for name, t in given.items()}
    with pytest.raises(ValueError, match=message):
        matvec(**given)
