from __future__ import annotations

import sys

import pytest
import torch

from dsi_kernels.step_attention import HeadNorm, StepAlibi, StepRope, step_attention, step_attention_reference
from tests.kernels.tolerance import DTYPES, ULP, assert_close

MODULE = sys.modules["dsi_kernels.step_attention"]
# several tiles a split, and several splits, out of few tokens
SMALL = {"tile_bytes": 1, "num_warps": 4, "stages": 1, "min_split": 48, "programs_per_sm": 4, "ahead": 3}


class Case:
    """Operands of a step after `start` tokens; beyond them the caches hold NaN, as memory may."""

    def __init__(
        self, device, dtype=torch.float32, *, B=2, heads=2, kv_heads=2, head_dim=24, capacity=90, start=70, repeat=1
    ):
        self.shape = heads, kv_heads
        self.start, self.device = start, device
        self.qkv = torch.randn(B, (heads + 2 * kv_heads) * head_dim).to(device, dtype)
        k, v = torch.randn(2, B, kv_heads, capacity, head_dim).to(device, dtype)
        known = start if isinstance(start, int) else max(start.tolist())
        k[:, :, known:] = v[:, :, known:] = float("nan")
        self.k, self.v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)

    def run(self, function=step_attention, *, start=None, **options):
        """(output, keys, values), the caches as they are afterwards."""
        k, v = self.k.clone(), self.v.clone()
        if function is step_attention:
            options.setdefault("config", SMALL)
        out = function(self.qkv, k, v, self.start if start is None else start, *self.shape, **options)
        return out, k, v

    def check(self, atol=None, **options):
        """The kernel does what the reference does; returns its output."""
        found = self.run(**options)
        known = {name: x for name, x in options.items() if name not in ("config", "reach")}
        wanted = self.run(step_attention_reference, **known)
        dtype = self.qkv.dtype
        atol = atol or (4e-6 if dtype is torch.float32 else ULP[dtype])
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one.isnan(), other.isnan())
            assert_close(one.nan_to_num(), other.nan_to_num(), atol)
        assert not found[0].isnan().any()
        return found[0]


def rope(device, dtype=torch.float32, *, rows=2, width=24, pairs=False):
    angle = torch.randn(rows, 1, width // 2) * 3
    angle = angle.repeat_interleave(2, -1) if pairs else angle.repeat(1, 1, 2)
    return StepRope(angle.cos().to(device, dtype), angle.sin().to(device, dtype), pairs)


def norm(device, kind, dtype=torch.float32, width=24):
    q, k, q_bias, k_bias = torch.randn(4, width).to(device, dtype)
    biases = (q_bias, k_bias) if kind == "layer" else (None, None)
    return HeadNorm(kind, q, k, *biases, eps=0.1, offset=0.0 if kind == "layer" else 1.0)


def sdpa(case, k, v, length):
    """An oracle that shares no line with ours, for plain q, k and v."""
    heads, _ = case.shape
    q = case.qkv.view(len(k), -1, k.shape[3])[:, :heads, None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k[:, :, :length], v[:, :, :length], enable_gqa=True)
    return out[:, :, 0].flatten(1)


SIZES = [
    {},
    {"B": 1, "heads": 6, "kv_heads": 2},
    {"B": 1, "heads": 3, "kv_heads": 1, "head_dim": 48},
    {"B": 1, "heads": 1, "kv_heads": 1, "head_dim": 80},
    {"B": 1, "heads": 2, "kv_heads": 1, "head_dim": 256, "start": 20},
    {"B": 3, "heads": 1, "kv_heads": 1, "head_dim": 2, "start": 0},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_reference(sizes, dtype, device):
    case = Case(device, dtype, **sizes)
    out = case.check()
    assert out.dtype == dtype
    if dtype is torch.float32:
        _, k, v = case.run()
        assert_close(out, sdpa(case, k, v, case.start + 1), 1e-6)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("rotary", [24, 10])
@pytest.mark.parametrize("pairs", [False, True])
def test_rope(pairs, rotary, group, device):
    case = Case(device, heads=group, kv_heads=1)
    turned = case.check(rope=rope(device, width=rotary, pairs=pairs))
    # rows of a table: one for all, and one for each
    many = StepRope(*(torch.randn(1, 50, rotary, device=device) for _ in range(2)), pairs)
    for at in ([[7], [31]], [[49]]):
        case.check(rope=many._replace(at=torch.tensor(at, device=device)))
    case.check(rope=StepRope(many.cos[:, 9:10], many.sin[:, 9:10], pairs))
    # what the reference makes of the wrong ones is not what was found
    table = StepRope(*(t.expand(2, 1, -1) for t in rope(device, rows=1, width=rotary, pairs=pairs)[:2]), pairs)
    for rival in (None, table._replace(pairs=not pairs)):
        with pytest.raises(AssertionError):
            assert_close(case.run(step_attention_reference, rope=rival)[0], turned, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("turned", [False, True])
def test_head_norms(turned, kind, heads, dtype, device):
    case = Case(device, dtype, heads=heads, kv_heads=1)
    norms, terms = norm(device, kind, dtype), rope(device, width=10, pairs=kind == "rms") if turned else None
    # one of the weights of 16-bit scores is off by a unit where a query rounds to the other side
    found = case.check(norm=norms, rope=terms, atol=2e-5 if dtype is torch.float32 else 4 * ULP[dtype])
    swapped = norms._replace(q_weight=norms.k_weight, k_weight=norms.q_weight)
    bare = norms._replace(q_weight=None, k_weight=None, q_bias=None, k_bias=None)
    case.check(norm=bare, rope=terms, atol=2e-5 if dtype is torch.float32 else 4 * ULP[dtype])
    for rival in (swapped, bare, norms._replace(offset=0.5), norms._replace(eps=1.0)):
        with pytest.raises(AssertionError):
            assert_close(case.run(step_attention_reference, norm=rival, rope=terms)[0], found)


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("shared", [False, True])
def test_a_mask_with_holes(shared, heads, device):
    case = Case(device, heads=heads)
    mask = torch.rand(1 if shared else 2, 1, 1, 85, device=device) > 0.4
    mask[0, ..., :40] = False
    mask[-1, ..., 70] = True
    out = case.check(mask=mask)
    case.check(mask=mask.transpose(0, 3).contiguous().transpose(0, 3))
    with pytest.raises(AssertionError):
        assert_close(case.run(step_attention_reference)[0], out, 1e-6)
    # not even the new one; and nothing at all, where values may be anything
    mask[0, ..., 70] = False
    case.check(mask=mask)
    mask[0] = False
    case.k[0] = case.v[0] = float("nan")
    assert not case.check(mask=mask)[0].any()


@pytest.mark.parametrize("heads", [2, 6])
def test_scale_and_cap(heads, device):
    case = Case(device, heads=heads)
    out = case.check(softcap=1.5, scale=0.7)
    case.check(softcap=50.0)
    case.check(scale=1.3, atol=1e-5)
    for rival in ({"scale": 0.7}, {"softcap": 1.5}, {"softcap": 2.0, "scale": 0.7}):
        with pytest.raises(AssertionError):
            assert_close(case.run(step_attention_reference, **rival)[0], out, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [2, 6])
def test_alibi(heads, dtype, device):
    case = Case(device, dtype, heads=heads)
    slopes = (torch.rand(heads) / 8).to(device)
    plain = case.check(alibi=StepAlibi(slopes))
    mask = torch.rand(2, 1, 1, 90, device=device) > 0.3
    places = ((mask.long().cumsum(-1) - 1) * mask)[:, 0, 0]
    rough = StepAlibi(slopes.bfloat16().float(), places, "bfloat16", 0.4)
    case.check(alibi=rough, mask=mask)
    case.check(alibi=StepAlibi(slopes, places[:1]))
    for rival in (StepAlibi(slopes.flip(0)), StepAlibi(slopes, places), StepAlibi(slopes, scale=0.5)):
        with pytest.raises(AssertionError):
            assert_close(case.run(step_attention_reference, alibi=rival)[0], plain, 1e-3)


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("window", [1, 2, 20, 71, 200])
def test_a_window(window, heads, device):
    case = Case(device, heads=heads)
    out = case.check(window=window)
    _, k, v = case.run()
    first = max(0, 71 - window)
    assert_close(out, sdpa(case, k[:, :, first:], v[:, :, first:], 71 - first), 1e-6)
    mask = torch.rand(2, 1, 1, 90, device=device) > 0.4
    case.check(window=window, mask=mask)


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("start", [0, 7, 31, 32, 70])
def test_a_ring_is_a_window_of_a_whole_buffer(start, masked, heads, device):
    case = Case(device, heads=heads, start=start)
    mask = torch.rand(2, 1, 1, 90, device=device) > 0.4 if masked else None
    alibi = StepAlibi((torch.rand(heads) / 8).to(device))
    wanted, k, v = case.run(window=32, mask=mask, alibi=alibi)
    ring = Case(device, heads=heads, start=start, capacity=32)
    ring.qkv = case.qkv
    ring.k, ring.v = (torch.full_like(t[:, :, :32], float("nan")) for t in (k, v))
    for p in range(max(0, start - 32), start):
        ring.k[:, :, p % 32], ring.v[:, :, p % 32] = case.k[:, :, p], case.v[:, :, p]
    out = ring.check(window=32, ring=True, mask=mask, alibi=alibi)
    assert_close(out, wanted, 1e-6)
    _, found, _ = ring.run(window=32, ring=True)
    assert torch.equal(found[:, :, start % 32], k[:, :, start])


@pytest.mark.parametrize("group", [2, 5])
def test_repeated_keys(group, device):
    """The cache has every KV head once for each query head; one of them is read, all of them are written."""
    once = Case(device, heads=2 * group, kv_heads=2)
    many = Case(device, heads=2 * group, kv_heads=2, repeat=group)
    many.qkv, many.k, many.v = once.qkv, *(t.repeat_interleave(group, 1) for t in (once.k, once.v))
    out, k, v = many.run()
    wanted = once.run()
    assert torch.equal(out, wanted[0])
    for found, plain in ((k, wanted[1]), (v, wanted[2])):
        assert torch.equal(found.nan_to_num(), plain.repeat_interleave(group, 1).nan_to_num())
    many.check()


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("heads", [1, 2])
def test_a_start_on_the_device(heads, integer, device):
    case = Case(device, heads=heads, kv_heads=1)
    out, k, v = case.run(start=torch.tensor(70, dtype=integer, device=device))
    wanted = case.run()
    assert torch.equal(k.nan_to_num(), wanted[1].nan_to_num())
    assert torch.equal(v.nan_to_num(), wanted[2].nan_to_num())
    assert_close(out, wanted[0], 1e-6)
    rows = Case(device, B=4, heads=heads, kv_heads=1, start=torch.tensor([70, 0, 1, 33], device=device))
    rows.k, rows.v = rows.k.nan_to_num(3.0), rows.v.nan_to_num(-2.0)
    rows.check(window=40)
    rows.check()


@pytest.mark.parametrize("start", [90, 2**32 + 5])
def test_a_start_beyond_the_cache_is_not_written(start, device):
    case = Case(device, start=90)
    roomy = torch.full((2, 2, 2, 200, 24), 7.0, device=device)
    roomy[:, :, :, 60:150] = torch.stack([case.k, case.v])
    case.k, case.v = roomy[:, :, :, 60:150]
    step_attention(case.qkv, case.k, case.v, torch.tensor(start, device=device), 2, 2, config=SMALL)
    assert (roomy[:, :, :, :60] == 7).all()
    assert (roomy[:, :, :, 150:] == 7).all()


@pytest.mark.parametrize("heads", [2, 6])
def test_same_input_same_output_and_tickets_are_given_back(heads, device):
    case = Case(device, torch.float16, heads=heads)
    tickets = torch.zeros(4, dtype=torch.int32, device=device)
    first = case.run(tickets=tickets)[0]
    for _ in range(3):
        assert torch.equal(case.run(tickets=tickets)[0], first)
        assert not tickets.any()
    one = {**SMALL, "min_split": 1024}
    assert_close(case.run(config=one)[0], first, ULP[torch.float16])


@pytest.mark.parametrize("heads", [2, 6])
def test_splits_are_added_up_a_few_at_a_time(heads, device, monkeypatch):
    case = Case(device, heads=heads)
    many = {**SMALL, "min_split": 16}
    at_once = case.run(config=many)[0]
    monkeypatch.setattr(MODULE, "MERGE_TILE", 1)
    assert_close(case.run(config=many)[0], at_once, 1e-6)
    case.check(config=many)


def test_whoever_draws_the_last_ticket_merges(device, monkeypatch):
    """One ticket too few drawn, and the output stays as it was born."""
    case = Case(device)
    tickets = torch.full((4,), -1, dtype=torch.int32, device=device)
    assert case.run(tickets=tickets)[0].isnan().all()


@pytest.mark.parametrize("heads", [2, 6])
def test_bits_go_by_the_reach_and_not_by_the_room(heads, device):
    """A cache that an earlier, longer text has enlarged, and one with less room than was planned for."""
    case = Case(device, heads=heads, start=60)
    rooms = [64, 90, 400]
    k, v = (torch.nn.functional.pad(t[:, :, :60], (0, 0, 0, 340), value=float("nan")) for t in (case.k, case.v))
    given = {"start": torch.tensor(60, device=device), "config": {**SMALL, "min_split": 16}}
    outs, others = [], []
    for room in rooms:
        case.k, case.v = k[:, :, :room].clone(), v[:, :, :room].clone()
        outs.append(case.check(reach=128, **given))
        others.append(case.run(**given)[0])
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    assert not torch.equal(others[0], others[2])


@pytest.mark.parametrize(
    ("programs", "width", "splits"),
    [(32, 200, 2), (32, 4096, 16), (8, 10**6, 64), (16, 10**6, 32), (600, 10**6, 1), (1, 0, 1)],
)
def test_how_many_splits(programs, width, splits):
    assert MODULE.count_splits(programs, width, 132, min_split=128, programs_per_sm=4) == splits


def test_no_rows(device):
    assert Case(device, B=0).run()[0].shape == (0, 48)


def changed(**changes):
    return lambda case: [setattr(case, name, value(getattr(case, name))) for name, value in changes.items()]


BOOL = torch.ones(2, 1, 1, 90, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (changed(qkv=lambda t: t[:, 1:]), {}, "qkv has rows of 143; 144 are needed"),
        (changed(qkv=lambda t: t[:1]), {}, r"qkv \(1, 144\), k_cache \(2, 2, 90, 24\)"),
        (changed(v=lambda t: t[:, :, 1:]), {}, r"v_cache \(2, 2, 89, 24\)"),
        (changed(shape=lambda s: (3, 2)), {}, "3 query heads are not 1 to 128 for each of 2 KV heads"),
        (changed(k=lambda t: t[:, :1], v=lambda t: t[:, :1]), {}, "the cache has 1 heads; 2, or 2"),
        (changed(k=lambda t: t.half()), {}, "dtypes differ"),
        (changed(k=lambda t: t.mT.contiguous().mT), {}, "last axis of k_cache"),
        (changed(v=lambda t: t.to("meta")), {}, "v_cache meta"),
        (changed(), {"rope": rope("cpu", rows=3)}, r"cos \(3, 1, 24\)"),
        (changed(), {"rope": rope("cpu", width=26)}, "rotary_dim 26"),
        (changed(), {"rope": rope("cpu", torch.float16)}, "cos is torch.float16"),
        (changed(), {"rope": rope("cpu", rows=1)._replace(at=torch.zeros(2, dtype=torch.int64))}, "at is torch.int64"),
        (changed(), {"norm": norm("cpu", "batch")}, "norm 'batch' is unknown"),
        (changed(), {"norm": norm("cpu", "rms", width=23)}, r"q_weight has shape \(23,\)"),
        (changed(), {"mask": BOOL.float()}, "mask is torch.float32"),
        (changed(), {"mask": BOOL[:, 0]}, r"mask is torch.bool \(2, 1, 90\)"),
        (changed(), {"mask": BOOL[..., :70]}, "start 70 is not from 0 to 69"),
        (changed(start=lambda s: -1), {}, "start -1"),
        (changed(start=lambda s: 90), {}, "start 90"),
        (changed(start=lambda s: torch.tensor(1.0)), {}, "start is torch.float32"),
        (changed(), {"window": 0}, "window 0"),
        (changed(), {"reach": 70}, "reach 70 is not 71 or more"),
        (changed(), {"window": 91, "ring": True}, "a ring of 90 slots needs a window from 1 to 90, not 91"),
        (changed(), {"ring": True}, "a ring of 90 slots"),
        (changed(), {"alibi": StepAlibi(torch.ones(3))}, r"slopes are torch.float32 \(3,\)"),
        (changed(), {"alibi": StepAlibi(torch.ones(2), rounded="int8")}, "rounded 'int8'"),
        (changed(), {"alibi": StepAlibi(torch.ones(2), torch.ones(2, 90))}, "places are torch.float32"),
        (changed(), {"tickets": torch.zeros(3, dtype=torch.int32)}, "tickets are torch.int32"),
    ],
)
def test_refuses_and_says_why(change, options, message, device):
    case = Case(device)
    change(case)
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    with pytest.raises(ValueError, match=message):
        case.run(**options)
