"""A token drawn for each row after temperature, top-k, top-p, min-p and repetition penalty, for decoding in a graph.

    x[b]      = logits[b] / temperature; before that divided by the penalty where seen, or multiplied where below 0
    kept[b]   = x >= the k-th largest x; of these the most likely that make up p; of these exp(x - max) >= min_p
    chosen[b] = argmax(exp(x - max) / noise) over kept[b]; without noise argmax(x)
    the state moves on as in `greedy_token`

With noise from an exponential distribution this is torch.multinomial(softmax(x), 1), from the same random numbers.
Of equal x on the border of p the last ones stay, as torch.sort orders them; on the border of k all of them stay.

No sort, and every program works for every row. A border is found four bits a step, the highest first: of the tokens
that share the bits found so far each program adds up how many have which next four bits, and what they weigh; the next
step adds up the programs, in their order, and goes on with the four bits that hold the border. Logits of 16 bits
without a penalty take four steps for k and four for p, others eight each; steps whose border is not asked for end at
once. Then each program draws from its tokens, and the last kernel of `greedy_token` chooses among them and moves the
state on. Moves B * V * itemsize bytes a step, which lie in the cache.
Source: transformers 5.23, generation/logits_process.py; Gumbel-max in torch's multinomial.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsi_kernels._pdl import begin, launch_dependents, launch_options, wait
from dsi_kernels._triton import tl, triton
from dsi_kernels.greedy_token import _advance_kernel, advance_state, check_state
from dsi_kernels.operands import check_contiguous, check_devices, check_dtypes, shapes

# tokens of a program: the least, and the most, from which on there are more than so many programs
BLOCK_V, LARGEST, PROGRAMS, WARPS = 1024, 8192, 512, 4
# bits of a key that one step looks at, and tokens that are compared with every digit at once
DIGIT, PIECE = 4, 128
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
    advance_state(chosen, tokens, history, positions, counters, finished, ends, pad)


# --- numbers in order ---------------------------------------------------------------------------------------------


@triton.jit
def _read(logits_ptr, seen_ptr, settings_ptr, at, inside, HALF: tl.constexpr):
    """(x, uint32 in the order of x): scores as they are drawn from, and of 16 bits the logits' own order."""
    logits = tl.load(logits_ptr + at, mask=inside, other=float("-inf"))
    x = logits.to(tl.float32)
    if seen_ptr is not None:
        penalty, inverse = tl.load(settings_ptr + 3), tl.load(settings_ptr + 4)
        before = tl.load(seen_ptr + at, mask=inside, other=0) != 0
        x = tl.where(before, tl.where(x < 0, x * penalty, x * inverse), x)
    x = x * tl.load(settings_ptr + 5)
    # a negative zero is equal to the other, and its key must be too
    x = tl.where(x == 0.0, 0.0, x)
    if HALF:
        bits = logits.to(tl.int16, bitcast=True).to(tl.int32)
        key = tl.where(x == 0.0, 0, bits ^ ((bits >> 31) & 0x7FFF)) + 0x8000
    else:
        bits = x.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF) ^ LOWEST
    return x, key.to(tl.uint32, bitcast=True)


@triton.jit
def _value(key, logits_ptr, settings_ptr, HALF: tl.constexpr):
    """The x of a key."""
    if HALF:
        bits = key.to(tl.int32, bitcast=True) - 0x8000
        bits = (bits ^ ((bits >> 31) & 0x7FFF)).to(tl.int16)
        x = bits.to(logits_ptr.dtype.element_ty, bitcast=True).to(tl.float32) * tl.load(settings_ptr + 5)
    else:
        bits = key.to(tl.int32, bitcast=True) ^ LOWEST
        x = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return x


# --- borders ------------------------------------------------------------------------------------------------------


@triton.jit
def _of_row(top_ptr, sum_ptr, row, blocks, BLOCK_B: tl.constexpr):
    """(the largest x of a row, sum of exp(x - it))."""
    b = tl.arange(0, BLOCK_B)
    tops = tl.load(top_ptr + row * blocks + b, mask=b < blocks, other=float("-inf"))
    sums = tl.load(sum_ptr + row * blocks + b, mask=b < blocks, other=0.0)
    top = tl.max(tops, axis=0)
    return top, tl.sum(sums * tl.exp(tops - top), axis=0)


@triton.jit
def _descend(part_ptr, mark_ptr, key_ptr, row, rows, blocks, step, DIGIT: tl.constexpr, STEPS: tl.constexpr,
             BLOCK_B: tl.constexpr):  # fmt: skip
    """What step - 1 found: (digit, key so far, above it, weight above it, weight of its digit, want, floor)."""
    D: tl.constexpr = 1 << DIGIT
    last = tl.maximum(step - 1, 0)
    slot = row * 2 * STEPS + last
    b, d = tl.arange(0, BLOCK_B), tl.arange(0, D)
    at = (((last % 2) * rows + row) * blocks + b[:, None]) * (2 * D) + d[None, :]
    # everything that is read stands before what waits for it
    counts = tl.load(part_ptr + at, mask=(b < blocks)[:, None], other=0.0)
    weights = tl.load(part_ptr + at + D, mask=(b < blocks)[:, None], other=0.0)
    above, heavier = tl.load(mark_ptr + slot * 3), tl.load(mark_ptr + slot * 3 + 1)
    want = tl.load(mark_ptr + slot * 3 + 2)
    key, floor = tl.load(key_ptr + slot * 2), tl.load(key_ptr + slot * 2 + 1)
    weights = tl.sum(weights, axis=0)
    measure = tl.where(last < STEPS, tl.sum(counts, axis=0), weights)
    more = above + tl.sum(tl.where(d[None, :] > d[:, None], measure[None, :], 0.0), axis=1)
    digit = tl.min(tl.where(more < want, d, D - 1), axis=0)
    above = tl.sum(tl.where(d == digit, more, 0.0), axis=0)
    heavier = heavier + tl.sum(tl.where(d > digit, weights, 0.0), axis=0)
    own = tl.sum(tl.where(d == digit, weights, 0.0), axis=0)
    return digit, key | (digit << (DIGIT * (STEPS - 1 - last % STEPS))), above, heavier, own, want, floor


@triton.jit
def _entry(
    part_ptr, mark_ptr, key_ptr, row, rows, blocks, step, k, p, total, V, DIGIT: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """What a step goes on from: (key so far, above it, weight above it, want, floor)."""
    # of no use in a first step, where nothing was written yet
    _, key, above, heavier, own, want, floor = _descend(
        part_ptr, mark_ptr, key_ptr, row, rows, blocks, step, DIGIT, STEPS, BLOCK_B
    )
    first, narrowed = step % STEPS == 0, (step == STEPS) & (k < V)
    # p is of what k left, and the most likely one always stays
    share = tl.maximum(p, 1e-30) * tl.where(narrowed, heavier + own, total)
    want = tl.where(first, tl.where(step == 0, k, share), want)
    floor = tl.where(first, tl.where(narrowed, key, 0), floor)
    return tl.where(first, 0, key), tl.where(first, 0.0, above), tl.where(first, 0.0, heavier), want, floor


@triton.jit
def _digits(
    logits_ptr, seen_ptr, settings_ptr, row, first, V, key, step, top, BLOCK_V: tl.constexpr, PIECE: tl.constexpr,
    DIGIT: tl.constexpr, STEPS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """How many of a block's tokens that share the key so far have which next digit, and what they weigh."""
    D: tl.constexpr = 1 << DIGIT
    shift = (DIGIT * (STEPS - 1 - step % STEPS)).to(tl.uint32)
    prefix = key.to(tl.uint32, bitcast=True) >> shift >> DIGIT
    d = tl.arange(0, D)[:, None]
    counts, weights = tl.zeros((D, PIECE), dtype=tl.float32), tl.zeros((D, PIECE), dtype=tl.float32)
    for start in range(first, first + BLOCK_V, 8 * PIECE):
        for piece in tl.static_range(8):
            # a thread that loads a token compares it with every digit
            v = start + piece * PIECE + tl.arange(0, PIECE)[None, :]
            x, u = _read(logits_ptr, seen_ptr, settings_ptr, row.to(tl.int64) * V + v, v < V, HALF)
            u = u >> shift
            shares = (v < V) & ((step % STEPS == 0) | ((u >> DIGIT) == prefix))
            hit = tl.where(shares, (u & (D - 1)).to(tl.int32), -1) == d
            counts += tl.where(hit, 1.0, 0.0)
            weights += tl.where(hit, tl.exp(x - top), 0.0)
    return tl.sum(counts, axis=1), tl.sum(weights, axis=1)


# a size of 1 would be a constant, of which Triton's coalescing pass fails an assertion (3.6), and each step a kernel
@triton.jit(do_not_specialize=["rows", "blocks", "step"])
def _narrow_kernel(
    logits_ptr, seen_ptr, settings_ptr, top_ptr, sum_ptr, part_ptr, mark_ptr, key_ptr, V, rows, blocks, step,
    BLOCK_V: tl.constexpr, BLOCK_B: tl.constexpr, PIECE: tl.constexpr, DIGIT: tl.constexpr, STEPS: tl.constexpr,
    HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        launch_dependents()
    # no kernel writes them
    k, p = tl.load(settings_ptr), tl.load(settings_ptr + 1)
    if PDL:
        wait()
    row, block = tl.program_id(0), tl.program_id(1)
    if ((step < STEPS) & (k < V)) | ((step >= STEPS) & (p < 1.0)):
        top, total = _of_row(top_ptr, sum_ptr, row, blocks, BLOCK_B)
        key, above, heavier, want, floor = _entry(
            part_ptr, mark_ptr, key_ptr, row, rows, blocks, step, k, p, total, V, DIGIT, STEPS, BLOCK_B
        )
        if block == 0:
            slot = row * 2 * STEPS + step
            tl.store(mark_ptr + slot * 3, above)
            tl.store(mark_ptr + slot * 3 + 1, heavier)
            tl.store(mark_ptr + slot * 3 + 2, want)
            tl.store(key_ptr + slot * 2, key)
            tl.store(key_ptr + slot * 2 + 1, floor)
        counts, weights = _digits(
            logits_ptr, seen_ptr, settings_ptr, row, block * BLOCK_V, V, key, step, top, BLOCK_V, PIECE, DIGIT, STEPS,
            HALF,
        )  # fmt: skip
        D: tl.constexpr = 1 << DIGIT
        at = (((step % 2) * rows + row) * blocks + block) * (2 * D) + tl.arange(0, D)
        tl.store(part_ptr + at, counts)
        tl.store(part_ptr + at + D, weights)


@triton.jit
def _border(
    logits_ptr, settings_ptr, part_ptr, mark_ptr, key_ptr, row, block, rows, blocks, V, top, BLOCK_B: tl.constexpr,
    DIGIT: tl.constexpr, STEPS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """(the smallest key that stays, how many that have it are too many, how many of them come after the block and are
    more than those that stay: the last ones stay)."""
    k, p = tl.load(settings_ptr), tl.load(settings_ptr + 1)
    border, surplus, after = tl.cast(0, tl.int32), tl.cast(0, tl.int32), tl.cast(0, tl.int32)
    if (k < V) | (p < 1.0):
        steps = tl.where(p < 1.0, 2 * STEPS, STEPS)
        digit, border, above, _, _, want, floor = _descend(
            part_ptr, mark_ptr, key_ptr, row, rows, blocks, steps, DIGIT, STEPS, BLOCK_B
        )
        if p < 1.0:
            if border.to(tl.uint32, bitcast=True) < floor.to(tl.uint32, bitcast=True):
                border = floor
            else:
                b = tl.arange(0, BLOCK_B)
                at = (((2 * STEPS - 1) % 2 * rows + row) * blocks + b) * (2 << DIGIT) + digit
                equal = tl.load(part_ptr + at, mask=b < blocks, other=0.0).to(tl.int32)
                own = tl.exp(_value(border, logits_ptr, settings_ptr, HALF) - top)
                stay = tl.maximum(tl.ceil(tl.minimum((want - above) / own, 1e9)).to(tl.int32), 1)
                surplus = tl.sum(equal, axis=0) - stay
                after = tl.sum(tl.where(b > block, equal, 0), axis=0) - stay
    return border.to(tl.uint32, bitcast=True), surplus, after


# --- the kernels at both ends -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["blocks"])
def _scores_kernel(
    logits_ptr, seen_ptr, settings_ptr, top_ptr, sum_ptr, V, blocks,
    BLOCK_V: tl.constexpr, HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    row, block = tl.program_id(0), tl.program_id(1)
    v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    x, _ = _read(logits_ptr, seen_ptr, settings_ptr, row.to(tl.int64) * V + v, v < V, HALF)
    top = tl.max(x, axis=0)
    tl.store(top_ptr + row * blocks + block, top)
    tl.store(sum_ptr + row * blocks + block, tl.sum(tl.exp(x - tl.where(top == float("-inf"), 0.0, top)), axis=0))


@triton.jit(do_not_specialize=["rows", "blocks"])
def _draw_kernel(
    logits_ptr, noise_ptr, seen_ptr, settings_ptr, top_ptr, sum_ptr, part_ptr, mark_ptr, key_ptr, value_ptr, index_ptr,
    invalid_ptr, V, rows, blocks, BLOCK_V: tl.constexpr, BLOCK_B: tl.constexpr, DIGIT: tl.constexpr,
    STEPS: tl.constexpr, HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    row, block = tl.program_id(0), tl.program_id(1)
    top, total = _of_row(top_ptr, sum_ptr, row, blocks, BLOCK_B)
    # a NaN and an infinity make it NaN
    tl.store(invalid_ptr, tl.cast(1, tl.int8), mask=(total < float("inf")) == 0)
    border, surplus, after = _border(
        logits_ptr, settings_ptr, part_ptr, mark_ptr, key_ptr, row, block, rows, blocks, V, top, BLOCK_B, DIGIT, STEPS,
        HALF,
    )  # fmt: skip
    v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    at = row.to(tl.int64) * V + v
    x, u = _read(logits_ptr, seen_ptr, settings_ptr, at, v < V, HALF)
    e = tl.exp(x - top)
    kept = (v < V) & (u >= border) & (e >= tl.load(settings_ptr + 2))
    if surplus > 0:
        on = ((v < V) & (u == border)).to(tl.int32)
        kept = kept & ((on == 0) | (tl.cumsum(on, axis=0, reverse=True) + after <= 0))
    if noise_ptr is not None:
        e = e / tl.load(noise_ptr + at, mask=kept, other=1.0)
    e = tl.where(kept, e, -1.0)
    best = tl.max(e, axis=0)
    tl.store(value_ptr + row * blocks + block, best)
    # one that stands nowhere, a NaN, is no token either
    tl.store(index_ptr + row * blocks + block, tl.minimum(tl.min(tl.where(e == best, v, V - 1), axis=0), V - 1))


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
        logits: [B, V], B up to 256, V up to 262144, fp16, bf16 or fp32, contiguous.
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
    block = min(max(triton.next_power_of_2(rows * V // PROGRAMS), BLOCK_V), LARGEST)
    blocks = triton.cdiv(V, block)
    half = seen is None and logits.dtype != torch.float32
    steps = triton.cdiv(16 if half else 32, DIGIT)
    scratch = torch.empty(rows * (blocks * (3 + (4 << DIGIT)) + 6 * steps), dtype=torch.float32, device=logits.device)
    top, total, value, part, mark = scratch.split(
        [rows * blocks, rows * blocks, rows * blocks, rows * blocks * (4 << DIGIT), rows * 6 * steps]
    )
    index, key = (torch.empty(n, dtype=torch.int32, device=logits.device) for n in (rows * blocks, rows * 4 * steps))
    count, options = 0 if ends is None else ends.numel(), launch_options(logits.device)
    sizes = {"BLOCK_V": block, "HALF": half, "num_warps": WARPS, **options}
    search = {"BLOCK_B": triton.next_power_of_2(blocks), "DIGIT": DIGIT, "STEPS": steps, **sizes}
    with torch.cuda.device_of(logits):
        _scores_kernel[(rows, blocks)](logits, seen, settings, top, total, V, blocks, **sizes)
        for step in range(2 * steps):
            _narrow_kernel[(rows, blocks)](
                logits, seen, settings, top, total, part, mark, key, V, rows, blocks, step,
                PIECE=PIECE, **search,
            )  # fmt: skip
        _draw_kernel[(rows, blocks)](
            logits, noise, seen, settings, top, total, part, mark, key, value, index, invalid.view(torch.int8), V,
            rows, blocks, **search,
        )  # fmt: skip
        _advance_kernel[(1,)](
            value, index, tokens, history, positions, counters,
            None if finished is None else finished.view(torch.int8), ends, pad, seen, rows, blocks, V,
            history.stride(0), count, BLOCK_B=triton.next_power_of_2(rows), BLOCK_P=triton.next_power_of_2(blocks),
            BLOCK_E=triton.next_power_of_2(max(count, 1)), num_warps=4, **options,
        )  # fmt: skip
