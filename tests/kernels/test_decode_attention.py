from __future__ import annotations

import sys

import pytest
import torch

from dsi_kernels import decode_attention, decode_attention_reference
from tests.kernels.tolerance import DTYPES, HALVES, ULP, assert_close, errors

MODULE = sys.modules["dsi_kernels.decode_attention"]


def operands(device, dtype=torch.float32, *, B=2, heads=2, kv_heads=2, capacity=80, head_dim=24, filled=None):
    """(q, k_cache, v_cache); from filled on, the caches hold NaN, as memory may."""
    q = torch.randn(B, heads, 1, head_dim)
    k, v = torch.randn(2, B, kv_heads, capacity, head_dim)
    if filled is not None:
        k[:, :, filled:] = v[:, :, filled:] = float("nan")
    return tuple(t.to(device, dtype) for t in (q, k, v))


def near(dtype):
    # a weighted mean of values of size 1 cancels: a unit of the values, not of their mean. In a half, the weights of a
    # group are rounded to it as well
    return 1e-6 if dtype is torch.float32 else ULP[dtype] / 2


def sdpa(q, k, v, length, mask=None, scale=None):
    """An oracle that shares no line with ours."""
    mask = None if mask is None else mask[..., :length]
    return torch.nn.functional.scaled_dot_product_attention(
        q, k[:, :, :length], v[:, :, :length], attn_mask=mask, scale=scale, enable_gqa=True
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "splits"),
    [
        ({}, 1),
        ({"B": 1}, 3),
        ({"heads": 6, "B": 1}, 1),
        ({"head_dim": 48, "heads": 3, "kv_heads": 1, "B": 1}, 3),
        ({"head_dim": 80, "heads": 1, "kv_heads": 1}, 1),
        ({"head_dim": 96, "heads": 1, "kv_heads": 1, "B": 1}, 3),
        ({"head_dim": 1, "heads": 1, "kv_heads": 1}, 1),
        ({"head_dim": 256, "heads": 2, "kv_heads": 1, "B": 1}, 1),
    ],
    ids=str,
)
def test_matches_reference(sizes, splits, dtype, device):
    q, k, v = operands(device, dtype, filled=71, **sizes)
    out = decode_attention(q, k, v, 71, splits=splits)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(out, decode_attention_reference(q, k, v, 71), near(dtype))
    if dtype is torch.float32:
        assert_close(out, sdpa(q, k, v, 71), 1e-6)


@pytest.mark.parametrize("group", [1, 2], ids="group{}".format)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_is_as_near_as_sdpa_in_the_dtype(dtype, group, device):
    q, k, v = operands(device, dtype, B=4, heads=4, kv_heads=4 // group, capacity=64, head_dim=64)
    exact = sdpa(q.double(), k.double(), v.double(), 64)
    ours, stock = errors(decode_attention(q, k, v, 64), exact), errors(sdpa(q, k, v, 64), exact)
    assert ours[1] <= 1.2 * stock[1]
    assert ours[0] <= 1.5 * stock[0]


@pytest.mark.parametrize("heads", [1, 2], ids="heads{}".format)
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_a_length_on_the_device(integer, splits, heads, device):
    q, k, v = operands(device, heads=heads, kv_heads=1, filled=33)
    expected = decode_attention(q, k, v, 33, splits=splits)
    out = decode_attention(q, k, v, torch.tensor(33, dtype=integer, device=device), splits=splits)
    assert_close(out, expected, 1e-6)


@pytest.mark.parametrize("heads", [1, 2], ids="heads{}".format)
@pytest.mark.parametrize("splits", [1, 4])
def test_a_length_for_each_row(splits, heads, device):
    """Some rows leave splits without a token; one has none at all."""
    q, k, v = operands(device, B=4, heads=heads, kv_heads=1, capacity=150)
    lengths = torch.tensor([150, 1, 0, 40], device=device)
    out = decode_attention(q, k, v, lengths, splits=splits)
    for row, length in enumerate(lengths.tolist()):
        one = slice(row, row + 1)
        k[row, :, length:] = v[row, :, length:] = float("nan")
        expected = sdpa(q[one], k[one], v[one], length) if length else torch.zeros_like(q[one])
        assert_close(out[one], expected, 1e-6)
    assert_close(decode_attention(q, k, v, lengths, splits=splits), out)
    assert_close(decode_attention_reference(q, k, v, lengths), out, 1e-6)


@pytest.mark.parametrize("length", [99, 2**32 + 5, -3, -(2**40) + 5])
def test_a_length_on_the_device_beyond_the_cache(length, device):
    """It cannot be refused; it must not be read."""
    q, k, v = operands(device, B=1, heads=1, kv_heads=1)
    roomy = torch.full((2, 1, 1, 200, 24), float("nan"), device=device)
    roomy[:, :, :, 60:140] = torch.stack([k, v])
    out = decode_attention(q, *roomy[:, :, :, 60:140], torch.tensor(length, device=device))
    assert_close(out, sdpa(q, k, v, 80) if length > 0 else torch.zeros_like(q), 1e-6)


@pytest.mark.parametrize(
    ("heads", "splits", "shared"), [(2, 1, False), (2, 3, True), (4, 1, True), (4, 3, False)], ids=str
)
def test_a_mask_with_holes(heads, splits, shared, device):
    q, k, v = operands(device, heads=heads, filled=70)
    mask = torch.rand(1 if shared else 2, 1, 1, 75, device=device) > 0.4
    # left padding, longer than a block
    mask[0, ..., :40] = False
    out = decode_attention(q, k, v, 70, mask, splits=splits)
    assert_close(out, sdpa(q, k, v, 70, mask), 1e-6)
    assert_close(out, decode_attention_reference(q, k, v, 70, mask), 1e-6)
    assert_close(decode_attention(q, k, v, torch.tensor(70, device=device), mask, splits=splits), out)
    unmasked = decode_attention(q, k, v, 70, splits=splits)
    with pytest.raises(AssertionError):
        assert_close(out, unmasked, 1e-6)


@pytest.mark.parametrize(("heads", "splits"), [(1, 1), (1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_to_attend_to_gives_zero(dtype, splits, heads, device):
    """A fully masked row, beside one that is not; and NaN where the mask is False."""
    q, k, v = operands(device, dtype, heads=heads, kv_heads=1)
    mask = torch.ones(2, 1, 1, 80, dtype=torch.bool, device=device)
    mask[0] = False
    mask[1, ..., :50] = False
    expected = sdpa(q, k, v, 80, mask)
    k[0] = v[0] = k[1, :, :50] = v[1, :, :50] = float("nan")
    for attend in (decode_attention_reference, lambda *a: decode_attention(*a, splits=splits)):
        out = attend(q, k, v, 80, mask)
        assert torch.equal(out[0], torch.zeros_like(out[0]))
        assert_close(out[1], expected[1], near(dtype))
    assert torch.equal(decode_attention(q, k, v, 0, splits=splits), torch.zeros_like(q))


def test_the_mask_may_be_a_view(device):
    q, k, v = operands(device)
    mask = torch.rand(2, 1, 1, 80, device=device) > 0.4
    expected = decode_attention(q, k, v, 80, mask)
    column = mask[:, 0, 0].T.contiguous().T[:, None, None]
    assert not column.is_contiguous()
    assert torch.equal(decode_attention(q, k, v, 80, column), expected)
    one = mask[:1].expand(2, 1, 1, 80)
    assert torch.equal(decode_attention(q, k, v, 80, one), decode_attention(q, k, v, 80, mask[:1]))


@pytest.mark.parametrize("heads", [2, 6], ids="heads{}".format)
def test_strides_of_the_operands(heads, device):
    """Queries that are a view of packed rows, caches [B, capacity, kv_heads, head_dim] and slices of larger ones."""
    q, k, v = operands(device, heads=heads, filled=70)
    expected = decode_attention(q, k, v, 70)
    packed = torch.zeros(2, 1, heads + 5, 30, device=device)
    packed[:, :, 2:-3, 6:] = q.transpose(1, 2)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    roomy = torch.full((3, 4, 100, 50), float("nan"), device=device)
    roomy[:2, 2:, 7:87, 26:] = v
    out = decode_attention(packed[:, :, 2:-3, 6:].transpose(1, 2), k, roomy[:2, 2:, 7:87, 26:], 70)
    assert torch.equal(out, expected)


def test_the_scale(device):
    q, k, v = operands(device)
    assert_close(decode_attention(q, k, v, 80), sdpa(q, k, v, 80, scale=24**-0.5), 1e-6)
    # scores up to 15: half a unit in the last place of one changes its weight by 5e-7 of itself, on either side
    assert_close(decode_attention(q, k, v, 80, scale=0.7), sdpa(q, k, v, 80, scale=0.7), 4e-6)
    with pytest.raises(AssertionError):
        assert_close(decode_attention(q, k, v, 80), sdpa(q, k, v, 80, scale=0.25), 1e-6)


@pytest.mark.parametrize("heads", [1, 2], ids="heads{}".format)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("at", [0, 40, 79])
def test_scores_far_apart_do_not_overflow(at, splits, heads, device):
    """The largest score is subtracted, wherever it stands; without that, exp overflows or everything is 0."""
    q, k, v = operands(device, B=1, heads=heads, kv_heads=1)
    k[:, :, at] = q[:, 0] * 300
    k[:, :, (at + 5) % 80] = -k[:, :, at]
    exact = sdpa(q.double(), k.double(), v.double(), 80)
    # weights off by an fp32 unit or two of a score of 1500
    assert (decode_attention(q, k, v, 80, splits=splits).double() - exact).abs().max() < 1e-3


@pytest.mark.parametrize("heads", [1, 2], ids="heads{}".format)
@pytest.mark.parametrize("splits", [1, 3])
def test_scores_far_below_zero_do_not_vanish(splits, heads, device):
    """Every weight is tiny, but for the largest score that is subtracted."""
    q, k, v = operands(device, B=1, heads=heads, kv_heads=1)
    q, k = q.abs() + 1, k * 1e-2 - 100
    exact = sdpa(q.double(), k.double(), v.double(), 80)
    assert (decode_attention(q, k, v, 80, splits=splits).double() - exact).abs().max() < 1e-3


@pytest.mark.parametrize("heads", [1, 2], ids="heads{}".format)
@pytest.mark.parametrize("splits", [1, 5])
def test_same_input_same_output(splits, heads, device):
    q, k, v = operands(device, torch.float16, heads=heads, kv_heads=1)
    first = decode_attention(q, k, v, 80, splits=splits)
    assert torch.equal(decode_attention(q, k, v, 80, splits=splits), first)


@pytest.mark.parametrize("heads", [1, 2], ids="heads{}".format)
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_what_is_not_a_number_is_not_hidden(splits, heads, device):
    """A NaN that is attended to comes out as NaN, not as the 0 of a row with nothing to attend to."""
    q, k, v = operands(device, B=3, heads=heads, kv_heads=1)
    q[0] = k[1, :, 50] = v[2, :, 50] = float("nan")
    assert decode_attention(q, k, v, 80, splits=splits).isnan().all()


def counted(kernel, calls):
    class Counting:
        def __getitem__(self, grid):
            calls.append(grid)
            return kernel[grid]

    return Counting()


@pytest.mark.parametrize(
    ("length", "wanted"),
    [(300, 1), (520, 2), (torch.tensor(300), 3)],
    ids=["short: one", "long: two", "on the device: by capacity"],
)
def test_a_long_context_is_split(length, wanted, device, monkeypatch):
    """By what the host knows; a short one is not, and there the second kernel does not run."""
    attends, merges = [], []
    monkeypatch.setattr(MODULE, "device_facts", lambda device: ("a small device", 4))
    monkeypatch.setattr(MODULE, "_decode_attention_kernel", counted(MODULE._decode_attention_kernel, attends))
    monkeypatch.setattr(MODULE, "_merge_splits_kernel", counted(MODULE._merge_splits_kernel, merges))
    q, k, v = operands(device, B=1, heads=1, kv_heads=1, capacity=800, head_dim=16)
    length = length.to(device) if isinstance(length, torch.Tensor) else length
    assert_close(decode_attention(q, k, v, length), sdpa(q, k, v, int(length)), 1e-6)
    assert attends == [(1, wanted)]
    assert merges == ([(1,)] if wanted > 1 else [])


@pytest.mark.parametrize(
    ("programs", "width", "splits"),
    [
        (1, 255, 1),
        (1, 511, 1),
        (1, 512, 2),
        (32, 4096, 9),
        (8, 4096, 16),
        (8, 10**6, 33),
        (1, 10**6, 64),
        (264, 10**6, 1),
        (10**5, 10**6, 1),
        (4, 0, 1),
    ],
)
def test_how_many_splits(programs, width, splits):
    """On 132 multiprocessors: two programs for each, 256 tokens a program or more, 64 splits at most."""
    assert MODULE.count_splits(programs, width, 132, min_split=256, programs_per_sm=2) == splits


@pytest.mark.parametrize("group", [1, 2], ids="group{}".format)
@pytest.mark.parametrize("splits", [1, 3])
def test_a_wrong_rival_does_not_pass(splits, group, device):
    q, k, v = operands(device, B=1, heads=2 * group)
    out = decode_attention(q, k, v, 70, splits=splits)
    assert_close(out, sdpa(q, k, v, 70), 1e-6)
    rivals = {
        "the newest token left out": sdpa(q, k, v, 69),
        "one token too many": sdpa(q, k, v, 71),
        "heads of the other group": sdpa(q, k.flip(1), v.flip(1), 70),
        "keys for values": sdpa(q, k, k, 70),
    }
    for rival in rivals.values():
        with pytest.raises(AssertionError):
            assert_close(out, rival, 1e-6)


def test_query_heads_of_a_group_stand_together(device):
    """Head 1 of 4 belongs to KV head 0 of 2, not to KV head 1."""
    q, k, v = operands(device, B=1, heads=4)
    interleaved = torch.nn.functional.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))
    with pytest.raises(AssertionError):
        assert_close(decode_attention(q, k, v, 80), interleaved, 1e-6)


def test_no_rows(device):
    assert decode_attention(*operands(device, B=0), 5).shape == (0, 2, 1, 24)


def ones(*shape, **options):
    return torch.ones(shape, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": ones(2, 2, 2, 24)}, r"decode_attention: q \(2, 2, 2, 24\), .* must be \[B, heads, 1, head_dim\]"),
        ({"q": ones(2, 2, 24)}, r"q \(2, 2, 24\)"),
        ({"v_cache": ones(2, 2, 79, 24)}, r"v_cache \(2, 2, 79, 24\)"),
        ({"q": ones(3, 2, 1, 24)}, r"q \(3, 2, 1, 24\) and k_cache \(2, 2, 80, 24\) differ in B or in head_dim"),
        ({"q": ones(2, 2, 1, 32)}, "differ in B or in head_dim"),
        ({"q": ones(2, 3, 1, 24)}, "3 query heads are not 1 to 128 for each of 2 KV heads"),
        ({"q": ones(2, 1, 1, 24)}, "1 query heads"),
        ({"q": ones(2, 258, 1, 24)}, "258 query heads"),
        ({"q": ones(2, 2, 1, 257), **dict.fromkeys(("k_cache", "v_cache"), ones(2, 2, 8, 257))}, "head_dim 257"),
        ({"q": ones(2, 66, 1, 129), **dict.fromkeys(("k_cache", "v_cache"), ones(2, 1, 80, 129))}, "128 x 256 padded"),
        ({"q": ones(2, 2, 1, 24).half()}, "dtypes differ: q torch.float16"),
        ({"k_cache": lambda on: ones(2, 2, 24, 80, device=on).mT}, "last axis of k_cache must be contiguous"),
        ({"q": lambda on: ones(2, 2, 1, 48, device=on)[..., ::2]}, "last axis of q must be contiguous"),
        ({"v_cache": lambda on: ones(2, 2, 80, 24, device="meta")}, "v_cache meta"),
        ({"mask": ones(2, 1, 1, 80)}, "mask is torch.float32; bool"),
        ({"mask": ones(2, 2, 1, 80, dtype=torch.bool)}, r"mask has shape \(2, 2, 1, 80\); \[2 or 1, 1, 1, T\]"),
        ({"mask": ones(2, 80, dtype=torch.bool)}, r"mask has shape \(2, 80\)"),
        ({"mask": ones(3, 1, 1, 80, dtype=torch.bool)}, r"mask has shape \(3, 1, 1, 80\)"),
        ({"mask": ones(2, 1, 1, 40, dtype=torch.bool)}, "length 70 is not from 0 to 40"),
        ({"length": 81}, "length 81 is not from 0 to 80"),
        ({"length": -1}, "length -1"),
        ({"length": torch.tensor(1.0)}, "length is torch.float32"),
        ({"length": torch.tensor([1, 2, 3])}, r"length has shape \(3,\)"),
        ({"splits": 0}, "splits 0 is not from 1 to 64"),
        ({"splits": 65}, "splits 65"),
    ],
)
def test_refuses_and_says_why(change, message, device):
    given = {"q": ones(2, 2, 1, 24), "k_cache": ones(2, 2, 80, 24), "v_cache": ones(2, 2, 80, 24), "length": 70}
    # strides are made on the device: a move keeps those of dense tensors alone
    given = {
        name: value(device) if callable(value) else value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in {**given, **change}.items()
    }
    with pytest.raises(ValueError, match=message):
        decode_attention(**given)
