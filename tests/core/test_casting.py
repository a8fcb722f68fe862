"""A cast and its residue are the original, bit for bit, whatever the bits are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsi.containers.casting import PIECE, cast_with_residue, is_lossless

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
WIDTH = {torch.float64: 64, torch.float32: 32, torch.float16: 16, torch.bfloat16: 16}

# what a uniform draw of bit patterns would hardly ever meet
SPECIAL = [
    0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.1754942e-38, 1.17549435e-38, 5.9e-8, 6.1e-5, 65504.0, 65519.9, 65520.0, 1e5,
    3.3895314e38, 3.3961775e38, 3.4028235e38, -3.4028235e38, float("inf"), float("-inf"), float("nan"),
    # halfway between two bfloat16 and between two float16, which rounds to even
    1.00390625, 1.01171875, 1.00048828125, 1.00146484375,
]  # fmt: skip


def patterns(dtype):
    """Tensors of any bit patterns: every NaN payload, subnormal and infinity."""
    width = WIDTH[dtype]
    whole = st.integers(-(2 ** (width - 1)), 2 ** (width - 1) - 1)
    return st.lists(whole, min_size=1, max_size=24).map(
        lambda bits: torch.from_numpy(np.array(bits, dtype=f"int{width}")).view(dtype)
    )


def assert_same_bits(found, wanted):
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    kind = BITS[wanted.dtype]
    assert torch.equal(found.contiguous().view(kind), wanted.contiguous().view(kind))


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bits_come_back(source, target, data):
    original = data.draw(patterns(source))
    kept = original.clone()
    cast, residue = cast_with_residue(original, target)
    assert_same_bits(original, kept)
    assert cast.dtype is target
    torch.testing.assert_close(cast, original.to(target), rtol=0, atol=0, equal_nan=True)
    assert_same_bits(residue.join(cast), original)


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_special_values_come_back(source, target):
    original = torch.tensor(SPECIAL, dtype=torch.float64).to(source)
    cast, residue = cast_with_residue(original, target)
    assert_same_bits(residue.join(cast), original)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    layout=st.sampled_from(["plain", "transposed", "sliced", "expanded"]),
    target=st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_any_shape_and_layout(shape, layout, target):
    original = torch.randn(shape)
    if layout == "transposed" and len(shape) > 1:
        original = original.transpose(0, -1)
    if layout == "sliced" and len(shape) > 0:
        original = torch.randn([2 * shape[0], *shape[1:]])[::2]
    if layout == "expanded":
        original = original.expand(2, *original.shape)
    cast, residue = cast_with_residue(original, target)
    assert_same_bits(residue.join(cast), original)
    # the fused weight may hold the same elements in another layout
    assert_same_bits(residue.join(cast.contiguous()), original.contiguous())


def test_exceptions_far_into_a_large_tensor():
    # it is compared piece by piece, and positions count from the tensor's beginning
    weight = torch.randn(2, PIECE + 5)
    for target in (torch.float16, torch.bfloat16):
        weight[1, -3:] = torch.tensor([torch.nan, 1e-40, 3.4028235e38])
        cast, residue = cast_with_residue(weight, target)
        assert residue.index.max() > PIECE
        assert_same_bits(residue.join(cast), weight)


def test_a_usual_weight_needs_no_exceptions():
    weight = torch.randn(300, 300) * 0.02
    for target in (torch.float16, torch.bfloat16):
        _, residue = cast_with_residue(weight, target)
        assert residue.delta.dtype is torch.int16
        # a difference of a whole half-range rounds the other way for a few in a hundred thousand
        assert residue.index is None or residue.index.numel() <= weight.numel() // 1000


def test_cast_and_residue_take_the_bytes_of_the_original():
    weight = torch.randn(500, 500)
    cast, residue = cast_with_residue(weight, torch.bfloat16)
    exceptions = sum(t.nbytes for t in (residue.index, residue.bits) if t is not None)
    assert cast.nbytes + residue.delta.nbytes == weight.nbytes
    assert exceptions < weight.nbytes / 100


@pytest.mark.parametrize(
    ("source", "target", "lossless"),
    [
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float32, True),
        (torch.float16, torch.float32, True),
        (torch.float32, torch.float64, True),
        (torch.float32, torch.float16, False),
        (torch.float32, torch.bfloat16, False),
        (torch.float16, torch.bfloat16, False),
        (torch.bfloat16, torch.float16, False),
        (torch.float64, torch.float32, False),
    ],
)
def test_which_casts_lose_nothing(source, target, lossless):
    assert is_lossless(source, target) is lossless


def test_a_residue_on_the_host_joins_all_the_same():
    weight = torch.tensor(SPECIAL)
    cast, residue = cast_with_residue(weight, torch.float16)
    assert_same_bits(residue.to_host().join(cast), weight)
    cast, residue = cast_with_residue(weight.half(), torch.float32)
    assert_same_bits(residue.to_host().join(cast), weight.half())


def test_a_parameter_gives_no_gradients_to_its_cast():
    parameter = torch.nn.Parameter(torch.randn(4))
    cast, residue = cast_with_residue(parameter.data, torch.bfloat16)
    assert not cast.requires_grad
    assert not residue.delta.requires_grad
