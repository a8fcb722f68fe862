from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import dsi_kernels
from dsi_kernels import group_norm, group_norm_reference, summed_map, summed_map_reference
from tests.kernels.tolerance import DTYPES, HALVES, ULP, assert_close, share_equal

DEFAULT = json.loads((Path(dsi_kernels.__file__).parent / "tuned/group_norm/default.json").read_text())["*"]
# small tiles, so that small maps have many, and a rest
SMALL = DEFAULT | {"tile": 256, "shown": 512, "block_c": 32, "hold": 1}
WAYS = {
    "held": SMALL | {"hold": 2},
    "one": SMALL | {"launches": 1},
    "two": SMALL,
    "three": SMALL | {"launches": 3},
    "narrow": SMALL | {"block_c": 16, "tile": 64, "tiles": 3},
}
# batch, channels, height, width, groups: whole and broken tiles, groups across blocks, one group, groups of one channel
MAPS = [(2, 80, 5, 7, 8), (1, 64, 8, 8, 32), (3, 7, 3, 3, 1), (1, 60, 9, 11, 60), (4, 96, 1, 1, 3)]


def near(dtype):
    # weight times a normalised number plus bias cancels: an fp32 unit of the terms, not of their sum
    return 1e-5 if dtype is torch.float32 else ULP[dtype] * 2e-2


def image(*shape, dtype=torch.float32, device="cpu", scale=1.0, mean=0.0):
    x = (torch.randn(*shape) * scale + mean).to(device, dtype)
    return x.contiguous(memory_format=torch.channels_last)


def operands(sizes, dtype, device, scale=1.0):
    B, C = sizes[:2]
    w, b, x_bias = torch.randn(3, C).to(device, dtype)
    # a slice of a wider product
    addend = (torch.randn(B, 3 * C) * scale).to(device, dtype)[:, C : 2 * C]
    residual = image(*sizes, dtype=dtype, device=device, scale=scale)
    return w, b, {"x_bias": x_bias * scale, "addend": addend, "residual": residual}


def check(sizes, way, added, dtype, device):
    torch.manual_seed(0)
    *sizes, groups = sizes
    x = image(*sizes, dtype=dtype, device=device)
    w, b, terms = operands(sizes, dtype, device)
    terms = {name: terms[name] for name in added.split()}
    before = {"x": x.clone(), **{name: t.clone() for name, t in terms.items()}}
    y, total = group_norm(x, w, b, groups, 1e-5, **terms, silu=True, keep_sum=True, config=WAYS[way])
    expected, expected_total = group_norm_reference(x, w, b, groups, 1e-5, **terms, silu=True, keep_sum=True)
    assert torch.equal(total, expected_total)
    assert_close(y, expected, near(dtype))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(t, before[name]) for name, t in {"x": x, **terms}.items())
    again, none = group_norm(x, w, b, groups, 1e-5, **terms, silu=True, config=WAYS[way])
    assert none is None
    assert torch.equal(again, y)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", MAPS, ids=str)
def test_matches_reference(sizes, way, device):
    check(sizes, way, "x_bias addend residual", torch.float16, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("added", ["", "x_bias", "addend", "residual"])
@pytest.mark.parametrize("way", ["held", "one", "three"])
def test_matches_reference_with_part_of_the_terms(way, added, dtype, device):
    check((2, 24, 5, 5, 6), way, added, dtype, device)


@pytest.mark.parametrize("way", WAYS)
def test_eps_counts_where_the_variance_is_as_small(way, device):
    x = image(2, 32, 6, 6, scale=1e-3, device=device)
    for eps in (1e-6, 1e-5):
        y, _ = group_norm(x, None, None, 4, eps, config=WAYS[way])
        assert_close(y, F.group_norm(x, 4, None, None, eps), 1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mean", [100.0, 1000.0], ids="mean{}".format)
def test_a_mean_far_from_0_costs_no_more_than_it_costs_x(mean, way, device):
    torch.manual_seed(1)
    x = image(1, 32, 24, 24, mean=mean, device=device)
    exact = F.group_norm(x.double(), 2, None, None, 1e-5).float()
    y, _ = group_norm(x, None, None, 2, 1e-5, config=WAYS[way])
    # the mean, in fp32, is off by half a unit or so; a sum of squares would be off by 0.05 of the variance at 1000
    assert (y - exact).abs().max() < mean * 2**-22
    square = x.pow(2).mean() - x.mean().pow(2)
    assert mean < 1000 or abs(square / x.double().var() - 1) > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_one_far_element_spoils_no_other_group(way, device):
    x = image(1, 32, 12, 12, device=device)
    x[0, 0, 0, 0] = 1e6
    y, _ = group_norm(x, None, None, 4, 1e-5, config=WAYS[way])
    assert_close(y, F.group_norm(x.double(), 4, None, None, 1e-5).float(), 1e-5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_the_sum_is_rounded_once_and_normalised_as_rounded(way, dtype, device):
    torch.manual_seed(2)
    sizes = (2, 64, 8, 8)
    x = image(*sizes, dtype=dtype, device=device)
    w, b, terms = operands(sizes, dtype, device)
    y, total = group_norm(x, w, b, 8, 1e-5, **terms, keep_sum=True, config=WAYS[way])
    sides = (-1, 1, 1)
    added = (terms["x_bias"].float() + terms["addend"].float()).view(2, *sides)
    wide = x.float() + added + terms["residual"].float()
    assert torch.equal(total, wide.to(dtype))
    stepwise = x + terms["x_bias"].view(sides) + terms["addend"].view(2, *sides) + terms["residual"]
    assert share_equal(total, stepwise) < 0.9
    stock = F.group_norm(total.float(), 8, w.float(), b.float(), 1e-5).to(dtype)
    unrounded = F.group_norm(wide, 8, w.float(), b.float(), 1e-5).to(dtype)
    assert share_equal(y, stock) > 0.99
    assert share_equal(unrounded, stock) < 0.9


def test_nothing_added_is_x_itself(device):
    x = image(1, 32, 4, 4, device=device)
    assert group_norm(x, None, None, 4, keep_sum=True)[1] is x


def test_is_a_residual_blocks_middle(device):
    """Convolution, plus the time's share, GroupNorm, SiLU; the convolution leaves its bias to the kernel."""
    torch.manual_seed(3)
    conv, norm = torch.nn.Conv2d(8, 32, 3, padding=1).to(device), torch.nn.GroupNorm(8, 32, 1e-6).to(device)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x, time = image(2, 8, 6, 5, device=device), torch.randn(2, 32, device=device)
    with torch.no_grad():
        expected = F.silu(norm(conv(x) + time[:, :, None, None]))
        bare = F.conv2d(x, conv.weight, None, padding=1).contiguous(memory_format=torch.channels_last)
        y, _ = group_norm(bare, norm.weight, norm.bias, 8, norm.eps, conv.bias, time, silu=True)
        assert_close(y, expected, 1e-5)


@pytest.mark.parametrize("lost", ["weight", "bias", "x_bias", "addend", "residual", "silu"])
def test_a_rival_that_loses_something_does_not_pass(lost, device):
    torch.manual_seed(4)
    x = image(2, 32, 4, 4, device=device)
    w, b, terms = operands(x.shape, x.dtype, device)
    given = {"x": x, "weight": w, "bias": b, "groups": 4, **terms, "silu": True}
    y, _ = group_norm(**given)
    assert_close(y, group_norm_reference(**given)[0], 1e-5)
    with pytest.raises(AssertionError):
        assert_close(y, group_norm_reference(**{**given, lost: False if lost == "silu" else None})[0], 1e-5)


def test_rows_of_tokens_are_a_map_of_one_axis(device):
    """[B, pixels, C], as a spatial transformer has it."""
    tokens = torch.randn(2, 30, 64, device=device)
    y, _ = group_norm(tokens.transpose(1, 2), None, None, 8)
    assert_close(y, F.group_norm(tokens.transpose(1, 2), 8), 1e-5)
    assert y.transpose(1, 2).is_contiguous()


def test_no_batch(device):
    y, total = group_norm(image(0, 32, 4, 4, device=device), None, None, 4, keep_sum=True)
    assert y.shape == total.shape == (0, 32, 4, 4)


def test_the_same_bits_again(device):
    x = image(2, 64, 9, 9, dtype=torch.float16, device=device)
    for config in WAYS.values():
        first, second = (group_norm(x, None, None, 8, silu=True, config=config)[0] for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("way", ["two", "three", "narrow"])
@pytest.mark.parametrize("sizes", MAPS[:3], ids=str)
def test_moments_of_whoever_made_the_map_are_as_good(sizes, way, device):
    *sizes, groups = sizes
    x = image(*sizes, dtype=torch.float16, device=device)
    w, b, terms = operands(sizes, torch.float16, device)
    total, moments = summed_map(x, groups, **terms, config=WAYS[way])
    assert torch.equal(total, summed_map_reference(x, groups, **terms))
    y, none = group_norm(total, w, b, groups, 1e-5, silu=True, moments=moments, config=WAYS[way])
    assert none is None
    assert torch.equal(y, group_norm(total, w, b, groups, 1e-5, silu=True, config=WAYS[way])[0])
    # they are what is used
    spoiled = moments._replace(parts=moments.parts + 1)
    assert not torch.equal(group_norm(total, w, b, groups, 1e-5, silu=True, moments=spoiled, config=WAYS[way])[0], y)


def test_moments_of_another_map_are_refused(device):
    x = image(2, 32, 4, 4, device=device)
    same, moments = summed_map(x, 4)
    assert same is x
    with pytest.raises(ValueError, match="of 4 groups are those of another map, or norm"):
        group_norm(x, None, None, 8, moments=moments)
    with pytest.raises(ValueError, match="are those of another map"):
        group_norm(x[:1], None, None, 4, moments=moments)
    with pytest.raises(ValueError, match="moments are those of x"):
        group_norm(x, None, None, 4, residual=x, moments=moments)
    with pytest.raises(ValueError, match=r"summed_map: x .* its C in 5 groups"):
        summed_map(x, 5)


ONES = torch.ones(2, 32, 4, 4).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"groups": 5}, r"x \(2, 32, 4, 4\) must be \[B, C, pixels ...\], its C in 5 groups"),
        ({"groups": 0}, "in 0 groups"),
        ({"x": torch.ones(2, 32)}, r"x \(2, 32\) must be"),
        ({"x": torch.ones(2, 32, 0, 4)}, r"x \(2, 32, 0, 4\) must be"),
        ({"x": torch.ones(2, 32, 4, 4)}, "x must be channels-last, has .* stride"),
        ({"residual": torch.ones(2, 32, 4, 4)}, "residual must be channels-last"),
        ({"residual": ONES[:1]}, r"residual \(1, 32, 4, 4\); \(2, 32, 4, 4\) is needed"),
        ({"weight": torch.ones(16)}, r"weight \(16,\); \(32,\) is needed"),
        ({"addend": torch.ones(32)}, r"addend \(32,\); \(2, 32\) is needed"),
        ({"addend": torch.ones(2, 32).half()}, "addend torch.float16"),
        ({"addend": torch.ones(32, 2).t()}, "the last axis of addend must be contiguous"),
        ({"bias": torch.ones(32, device="meta")}, "bias meta"),
    ],
)
def test_refuses_and_says_why(changed, message, device):
    given = {"x": ONES, "weight": None, "bias": None, "groups": 4, **changed}
    given = {k: v.to(device) if isinstance(v, torch.Tensor) and not v.is_meta else v for k, v in given.items()}
    with pytest.raises(ValueError, match=message):
        group_norm(**given)
