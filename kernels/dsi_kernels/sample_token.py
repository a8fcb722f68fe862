"""A token drawn for each row after temperature, top-k, top-p, min-p and repetition penalty, for decoding in a graph.

    x[b]      = logits[b] / temperature; before that divided by the penalty where seen, or multiplied where below 0
    kept[b]   = x >= the k-th largest x; of these the most likely that make up p; of these exp(x - max) >= min_p
    chosen[b] = argmax(exp(x - max) / noise) over kept[b]; without noise argmax(x)
    the state moves on as in `greedy_token`

With noise from an exponential distribution this is torch.multinomial(softmax(x), 1), from the same random numbers.
Of equal x on the border of p the last ones stay, as torch.sort orders them; on the border of k all of them stay.

Three kernels: scores and the largest of each group of 64 tokens; one program a row that looks for the borders; the
state. No sort: the 128 groups with the largest maxima hold all tokens from some score on. Where the borders lie among
these (k <= 128, or a p that these tokens make up) the rest is not looked at again, else the row is bisected as a whole,
once a bit. Moves B * V * (itemsize + 4) bytes where it is, and B * V * 4 bytes a bit more where it is not.
Source: transformers 5.23, generation/logits_process.py; Gumbel-max in torch's multinomial.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsi_kernels._pdl import begin, launch_options
from dsi_kernels._triton import tl, triton
from dsi_kernels.greedy_token import _advance_kernel, check_state
from dsi_kernels.operands import check_contiguous, check_devices, check_dtypes, shapes

GROUP = 64
# groups whose tokens one program holds at once
CAP = 128
BLOCK_V = 2048
# tokens of a vocabulary: the maxima of all its groups are held at once
MAX_VOCAB = 1 << 18
# what `settings` holds, in order; the last is 1 / temperature, 1 / penalty, as torch divides by a number on CUDA
SETTINGS = ("top_k", "top_p", "min_p", "penalty", "inverse_penalty", "inverse_temperature")

LOWEST = tl.constexpr(-(1 << 31))


def sampling_settings(
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    penalty: float = 1.0,
    temperature: float = 1.0,
) -> list[float]:
    """The numbers of `settings`: neutral where nothing is given.

    Args:
        top_k: None for all.
        top_p, min_p, penalty, temperature: as transformers takes them.
    """
    return [float(top_k or MAX_VOCAB), top_p, min_p, penalty, 1.0 / penalty, 1.0 / temperature]


def sample_token_reference(
    logits: Tensor,
    noise: Tensor | None,
    settings: Tensor,
    tokens: Tensor,
    history: Tensor,
    positions: Tensor,
    counters: Tensor,
    invalid: Tensor,
    seen: Tensor | None = None,
    finished: Tensor | None = None,
    ends: Tensor | None = None,
    pad: Tensor | None = None,
) -> None:
    """What the kernels must do, in plain torch. The tests' oracle and the CPU path."""
    top_k, top_p, min_p, penalty, inverse_penalty, inverse_temperature = settings.tolist()
    x = logits.float()
    if seen is not None:
        x = torch.where(seen != 0, torch.where(x < 0, x * penalty, x * inverse_penalty), x)
    x = x * inverse_temperature
    k = min(int(top_k), x.shape[1])
    x = x.masked_fill(x < x.topk(k).values[:, -1:], float("-inf"))
    if top_p < 1:
        ascending, order = x.sort(stable=True)
        gone = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        gone[:, -1] = False
        x = x.masked_fill(gone.scatter(1, order, gone), float("-inf"))
    probabilities = x.softmax(-1)
    invalid |= ~(probabilities.amax() < float("inf"))
    top = probabilities.amax(-1, keepdim=True)
    probabilities = probabilities.masked_fill(probabilities < min_p * top, 0.0)
    chosen = (probabilities if noise is None else probabilities / noise).argmax(-1)
    if seen is not None:
        seen.scatter_(1, chosen[:, None], 1)
    if finished is not None and ends is not None and pad is not None:
        chosen = torch.where(finished, pad, chosen)
        finished |= (chosen[:, None] == ends).any(1)
    tokens.copy_(chosen[:, None])
    history[:, int(counters[2])] = chosen
    positions += 1
    counters += 1


# --- numbers in order ---------------------------------------------------------------------------------------------


@triton.jit
def _key(x):
    """int32 in the order of the floats."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The float of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _middle(low, high):
    return (low + ((high.to(tl.int64) - low) >> 1)).to(tl.int32)


# --- over tokens that are held ------------------------------------------------------------------------------------


@triton.jit
def _held_kth(key, held, low, high, k):
    """The largest t, low <= t <= high, that at least k keys reach."""
    while low < high:
        middle = _middle(low, high) + 1
        enough = tl.sum((held & (key >= middle)).to(tl.int32)) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _held_border(key, weight, low, high, want):
    """The smallest t, low <= t <= high, above which there is less than `want`."""
    while low < high:
        middle = _middle(low, high)
        less = tl.sum(tl.where(key > middle, weight, 0.0)) < want
        high = tl.where(less, middle, high)
        low = tl.where(less, low, middle + 1)
    return low


# --- over a whole row ---------------------------------------------------------------------------------------------


@triton.jit
def _row_count(x_ptr, V, least, most, first, BLOCK_V: tl.constexpr):
    """How many tokens from `first` on have keys from `least` to `most`."""
    found = tl.zeros((BLOCK_V,), dtype=tl.int32)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        key = _key(tl.load(x_ptr + v, mask=v < V, other=float("-inf")))
        found += ((key >= least) & (key <= most) & (v >= first) & (v < V)).to(tl.int32)
    return tl.sum(found)


@triton.jit
def _row_weight(x_ptr, V, top, least, BLOCK_V: tl.constexpr):
    """Sum of exp(x - top) over keys from `least` on."""
    weight = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        x = tl.load(x_ptr + v, mask=v < V, other=float("-inf"))
        weight += tl.where(_key(x) >= least, tl.exp(x - top), 0.0)
    return tl.sum(weight)


@triton.jit
def _row_kth(x_ptr, V, low, high, k, BLOCK_V: tl.constexpr):
    while low < high:
        middle = _middle(low, high) + 1
        enough = _row_count(x_ptr, V, middle, 0x7FFFFFFF, 0, BLOCK_V) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _row_border(x_ptr, V, top, low, high, want, BLOCK_V: tl.constexpr):
    while low < high:
        middle = _middle(low, high)
        less = _row_weight(x_ptr, V, top, middle + 1, BLOCK_V) < want
        high = tl.where(less, middle, high)
        low = tl.where(less, low, middle + 1)
    return low


# --- borders ------------------------------------------------------------------------------------------------------


@triton.jit
def _floor(group_key, known, highest, groups, CAP: tl.constexpr):
    """The smallest key that the maxima of no more than CAP groups reach."""
    floor = tl.cast(LOWEST, tl.int32)
    if groups > CAP:
        high = highest + 1
        while floor < high:
            middle = _middle(floor, high)
            few = tl.sum(((group_key >= middle) & known).to(tl.int32), axis=0) <= CAP
            high = tl.where(few, middle, high)
            floor = tl.where(few, floor, middle + 1)
    return floor


@triton.jit
def _k_border(x_ptr, V, key, e, held, floor, highest, top, total, k, BLOCK_V: tl.constexpr):
    """(the key of the k-th largest, sum of exp(x - top) of all that reach it)."""
    border, whole = tl.cast(LOWEST, tl.int32), total
    if k < V:
        if tl.sum(held.to(tl.int32)) >= k:
            border = _held_kth(key, held, floor, highest, k)
            whole = tl.sum(tl.where(key >= border, e, 0.0))
        else:
            border = _row_kth(x_ptr, V, border, floor, k, BLOCK_V)
            whole = _row_weight(x_ptr, V, top, border, BLOCK_V)
    return border, whole


@triton.jit
def _p_border(x_ptr, V, key, e, i, held, floor, highest, top, border, want, BLOCK_V: tl.constexpr):
    """(the smallest key with less than `want` above it; of those on it the first that stays)."""
    if (border >= floor) | (tl.sum(e) >= want):
        border = _held_border(key, e, tl.maximum(border, floor), highest, want)
        above = tl.sum(tl.where(key > border, e, 0.0))
        equal = tl.sum((held & (key == border)).to(tl.int32))
    else:
        border = _row_border(x_ptr, V, top, border, floor, want, BLOCK_V)
        above = _row_weight(x_ptr, V, top, border + 1, BLOCK_V)
        equal = _row_count(x_ptr, V, border, border, 0, BLOCK_V)
    room = tl.minimum((want - above) / tl.exp(_value(border) - top), 1e9)
    stay = tl.maximum(tl.ceil(room).to(tl.int32), 1)
    first = 0
    if equal > stay:
        last = V - 1
        while first < last:
            middle = _middle(first, last) + 1
            if border >= floor:
                after = tl.sum((held & (key == border) & (i >= middle)).to(tl.int32))
            else:
                after = _row_count(x_ptr, V, border, border, middle, BLOCK_V)
            first = tl.where(after >= stay, middle, first)
            last = tl.where(after >= stay, last, middle - 1)
    return border, first


@triton.jit
def _stays(key, e, i, border, first, min_p):
    return ((key > border) | ((key == border) & (i >= first))) & (e >= min_p)


@triton.jit
def _best_of_row(x_ptr, noise_ptr, V, top, border, first, min_p, BLOCK_V: tl.constexpr):
    best, chosen = tl.cast(-1.0, tl.float32), V - 1
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        x = tl.load(x_ptr + v, mask=v < V, other=float("-inf"))
        e = tl.exp(x - top)
        kept = (v < V) & _stays(_key(x), e, v, border, first, min_p)
        if noise_ptr is not None:
            e = e / tl.load(noise_ptr + v, mask=kept, other=1.0)
        e = tl.where(kept, e, -1.0)
        here = tl.max(e, axis=0)
        where = tl.min(tl.where(e == here, v, V - 1), axis=0)
        chosen = tl.where(here > best, where, chosen)
        best = tl.maximum(here, best)
    return best, chosen


# --- the kernels --------------------------------------------------------------------------------------------------


@triton.jit
def _scores_kernel(
    logits_ptr, settings_ptr, seen_ptr, x_ptr, group_ptr, max_ptr, sum_ptr, V, groups, blocks,
    BLOCK_V: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    row, block = tl.program_id(0), tl.program_id(1)
    v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    at = row.to(tl.int64) * V + v
    x = tl.load(logits_ptr + at, mask=v < V, other=float("-inf")).to(tl.float32)
    if seen_ptr is not None:
        penalty, inverse = tl.load(settings_ptr + 3), tl.load(settings_ptr + 4)
        before = tl.load(seen_ptr + at, mask=v < V, other=0) != 0
        x = tl.where(before, tl.where(x < 0, x * penalty, x * inverse), x)
    x = x * tl.load(settings_ptr + 5)
    # a negative zero is equal to the other, and its key must be too
    x = tl.where(x == 0.0, 0.0, x)
    tl.store(x_ptr + at, x, mask=v < V)
    top = tl.max(x, axis=0)
    tl.store(max_ptr + row * blocks + block, top)
    tl.store(sum_ptr + row * blocks + block, tl.sum(tl.exp(x - tl.where(top == float("-inf"), 0.0, top)), axis=0))
    g = block * (BLOCK_V // GROUP) + tl.arange(0, BLOCK_V // GROUP)
    tl.store(group_ptr + row * groups + g, tl.max(tl.reshape(x, (BLOCK_V // GROUP, GROUP)), axis=1), mask=g < groups)


# a size of 1 is a constant to Triton, and one group or token then fails an assertion of its coalescing pass (3.6)
@triton.jit(do_not_specialize=["V", "groups", "blocks"])
def _choose_kernel(  # noqa: PLR0915 - one program does all for its row
    x_ptr, group_ptr, max_ptr, sum_ptr, picked_ptr, noise_ptr, settings_ptr, seen_ptr, value_ptr, index_ptr,
    invalid_ptr, V, groups, blocks, GROUP: tl.constexpr, CAP: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    row = tl.program_id(0)
    x_ptr += row.to(tl.int64) * V
    if noise_ptr is not None:
        noise_ptr += row.to(tl.int64) * V
    b = tl.arange(0, BLOCK_B)
    tops = tl.load(max_ptr + row * blocks + b, mask=b < blocks, other=float("-inf"))
    sums = tl.load(sum_ptr + row * blocks + b, mask=b < blocks, other=0.0)
    top = tl.max(tops, axis=0)
    total = tl.sum(sums * tl.exp(tops - top), axis=0)
    # a NaN and an infinity make it NaN
    tl.store(invalid_ptr, tl.cast(1, tl.int8), mask=(total < float("inf")) == 0)
    highest = _key(top)
    k = tl.load(settings_ptr).to(tl.int32)
    p, min_p = tl.load(settings_ptr + 1), tl.load(settings_ptr + 2)

    # the groups with the largest maxima: together they hold every token whose key reaches `floor`
    g = tl.arange(0, BLOCK_G)
    group_key = _key(tl.load(group_ptr + row * groups + g, mask=g < groups, other=float("-inf")))
    floor = _floor(group_key, g < groups, highest, groups, CAP)
    largest = (group_key >= floor) & (g < groups)
    tl.store(picked_ptr + row * CAP + tl.cumsum(largest.to(tl.int32), axis=0) - 1, g, mask=largest)
    tl.debug_barrier()
    c, count = tl.arange(0, CAP), tl.sum(largest.to(tl.int32), axis=0)
    i = tl.load(picked_ptr + row * CAP + c, mask=c < count, other=0)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    held = (c < count)[:, None] & (i < V)
    x = tl.load(x_ptr + i, mask=held, other=float("-inf"))
    key = _key(x)
    held = held & (key >= floor)
    e = tl.where(held, tl.exp(x - top), 0.0)

    border, whole = _k_border(x_ptr, V, key, e, held, floor, highest, top, total, k, BLOCK_V)
    first = 0
    if p < 1.0:
        # the most likely one always stays
        want = tl.maximum(p, 1e-30) * whole
        border, first = _p_border(x_ptr, V, key, e, i, held, floor, highest, top, border, want, BLOCK_V)
    if (border >= floor) | (tl.exp(_value(floor) - top) < min_p):
        kept = held & _stays(key, e, i, border, first, min_p)
        if noise_ptr is not None:
            e = e / tl.load(noise_ptr + i, mask=kept, other=1.0)
        e = tl.where(kept, e, -1.0)
        best = tl.max(e)
        chosen = tl.min(tl.where(e == best, i, V - 1))
    else:
        best, chosen = _best_of_row(x_ptr, noise_ptr, V, top, border, first, min_p, BLOCK_V)
    chosen = tl.minimum(chosen, V - 1)
    if seen_ptr is not None:
        tl.store(seen_ptr + row.to(tl.int64) * V + chosen, tl.cast(1, tl.int8))
    tl.store(value_ptr + row, best)
    tl.store(index_ptr + row, chosen)


def _check(
    logits: Tensor,
    noise: Tensor | None,
    settings: Tensor,
    invalid: Tensor,
    seen: Tensor | None,
    finished: Tensor | None,
) -> None:
    if logits.shape[1] > MAX_VOCAB:
        raise ValueError(f"sample_token: {shapes(logits=logits)} must be [B, V], V up to {MAX_VOCAB}")
    if noise is not None and (noise.shape != logits.shape or noise.dtype != torch.float32):
        raise ValueError(f"sample_token: {shapes(noise=noise)} must be float32 {list(logits.shape)}")
    if seen is not None and (seen.shape != logits.shape or seen.dtype != torch.int8):
        raise ValueError(f"sample_token: {shapes(seen=seen)} must be int8 {list(logits.shape)}")
    if settings.shape != (len(SETTINGS),) or settings.dtype != torch.float32:
        raise ValueError(f"sample_token: {shapes(settings=settings)} must be float32 [{len(SETTINGS)}]")
    if invalid.shape != (1,) or invalid.dtype != torch.bool:
        raise ValueError(f"sample_token: {shapes(invalid=invalid)} must be bool [1]")
    if finished is not None and finished.shape != (logits.shape[0],):
        raise ValueError(f"sample_token: finished {tuple(finished.shape)} must be [{logits.shape[0]}]")


def sample_token(
    logits: Tensor,
    noise: Tensor | None,
    settings: Tensor,
    tokens: Tensor,
    history: Tensor,
    positions: Tensor,
    counters: Tensor,
    invalid: Tensor,
    seen: Tensor | None = None,
    finished: Tensor | None = None,
    ends: Tensor | None = None,
    pad: Tensor | None = None,
) -> None:
    """Draw each row's next token and move the loop's state on; all but logits, noise and settings is written in place.

    Args:
        logits: [B, V], B up to 64, V up to 262144, fp16, bf16 or fp32, contiguous.
        noise: float32 [B, V], exponentially distributed, or None for the most likely token.
        settings: float32 [6], of `sampling_settings`, read on the device.
        tokens, history, positions, counters, finished, ends, pad: of `greedy_token`.
        invalid: bool [1], set where a row has a NaN, an infinity, or nothing but minus infinity.
        seen: int8 [B, V], tokens that the penalty is for; the chosen are added. None: no penalty.

    Raises:
        ValueError: shapes, dtypes, layout or devices do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    check_state("sample_token", logits, tokens, history, positions, counters)
    _check(logits, noise, settings, invalid, seen, finished)
    if finished is not None and (ends is None or pad is None):
        raise ValueError("sample_token: finished comes with ends and pad")
    check_dtypes("sample_token", logits=logits)
    state = {"tokens": tokens, "history": history, "positions": positions, "counters": counters}
    given = {name: t for name, t in (("noise", noise), ("seen", seen)) if t is not None}
    check_contiguous("sample_token", logits=logits, settings=settings, **state, **given)
    check_devices("sample_token", logits=logits, settings=settings, invalid=invalid, **state, **given)

    rows, V = logits.shape
    blocks, groups = triton.cdiv(V, BLOCK_V), triton.cdiv(V, GROUP)
    x = torch.empty((rows, V), dtype=torch.float32, device=logits.device)
    group, top, total = (x.new_empty((rows, n)) for n in (groups, blocks, blocks))
    value, picked, index = x.new_empty((rows, 1)), *(x.new_empty((rows, n), dtype=torch.int32) for n in (CAP, 1))
    count, options = 0 if ends is None else ends.numel(), launch_options(logits.device)
    with torch.cuda.device_of(logits):
        _scores_kernel[(rows, blocks)](
            logits, settings, seen, x, group, top, total, V, groups, blocks, BLOCK_V=BLOCK_V, GROUP=GROUP, num_warps=4,
            **options,
        )  # fmt: skip
        _choose_kernel[(rows,)](
            x, group, top, total, picked, noise, settings, seen, value, index, invalid.view(torch.int8), V, groups,
            blocks, GROUP=GROUP, CAP=CAP, BLOCK_G=triton.next_power_of_2(groups),
            BLOCK_B=triton.next_power_of_2(blocks), BLOCK_V=8192, num_warps=16, **options,
        )  # fmt: skip
        _advance_kernel[(1,)](
            value, index, tokens, history, positions, counters,
            None if finished is None else finished.view(torch.int8), ends, pad, rows, 1, V, history.stride(0),
            count, BLOCK_B=triton.next_power_of_2(rows), BLOCK_P=1, BLOCK_E=triton.next_power_of_2(max(count, 1)),
            num_warps=4, **options,
        )  # fmt: skip
