"""The kernels of group_norm.py: what a group's sums are, and what they are applied to."""

from __future__ import annotations

from dsi_kernels._pdl import launch_dependents, wait
from dsi_kernels._triton import tl, triton


@triton.jit
def _parameter(ptr, at, inside, other, BLOCK: tl.constexpr):
    """Numbers of channels in fp32, `other` where there are none."""
    if ptr is None:
        row = tl.full([BLOCK], other, tl.float32)
    else:
        row = tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)
    return row


@triton.jit
def _parameters(w_ptr, b_ptr, xb_ptr, a_ptr, at, cols, inside, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """(scale, shift, terms) of the channels, once the kernels before have ended; `at` is where the addend stands."""
    if PDL:
        launch_dependents()
    scale, shift = _parameter(w_ptr, cols, inside, 1.0, BLOCK), _parameter(b_ptr, cols, inside, 0.0, BLOCK)
    terms = _parameter(xb_ptr, cols, inside, 0.0, BLOCK)
    if PDL:
        wait()
    return scale, shift, terms + _parameter(a_ptr, at + cols, inside, 0.0, BLOCK)


@triton.jit
def _summed(x_ptr, r_ptr, base, terms, at, live, ADDS: tl.constexpr):
    """x plus whatever is added to it, rounded, in fp32."""
    x = tl.load(x_ptr + base + at, mask=live, other=0.0)
    h = x.to(tl.float32)
    if ADDS:
        h = h + terms[None, :]
        if r_ptr is not None:
            h = h + tl.load(r_ptr + base + at, mask=live, other=0.0).to(tl.float32)
        h = h.to(x.dtype).to(tl.float32)
    return h


@triton.jit
def _moments(
    x_ptr, r_ptr, s_ptr, base, terms, rows, cols, inside, C, ADDS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(mean, sum of squared distances from it) of each channel over rows, one or more; the sums go to s_ptr."""
    lane = tl.arange(0, BLOCK_N)
    # the first row stands near enough: squares lose no more digits to it than the logarithm of the number of rows
    pivot = tl.sum(_summed(x_ptr, r_ptr, base, terms, cols[None, :], inside[None, :], ADDS), axis=0)
    total, square = tl.zeros([BLOCK_N, BLOCK_C], tl.float32), tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for first in range(0, rows, BLOCK_N):
        live = (first + lane < rows)[:, None] & inside[None, :]
        at = (first + lane)[:, None] * C + cols[None, :]
        h = _summed(x_ptr, r_ptr, base, terms, at, live, ADDS)
        if s_ptr is not None:
            tl.store(s_ptr + base + at, h.to(s_ptr.dtype.element_ty), mask=live)
        apart = tl.where(live, h - pivot[None, :], 0.0)
        total += apart
        square += apart * apart
    apart = tl.sum(total, axis=0) / rows
    return pivot + apart, tl.sum(square, axis=0) - rows * apart * apart


@triton.jit
def _deviation(square, elements, eps):
    """1 / deviation."""
    return 1.0 / tl.sqrt_rn(square / elements + tl.cast(eps, tl.float32))


@triton.jit
def _show(y_ptr, base, at, live, h, mean, scale, shift, SILU: tl.constexpr):
    y = (h - mean[None, :]) * scale[None, :] + shift[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(y_ptr + base + at, y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["eps"])
def group_norm_kernel(
    x_ptr, r_ptr, a_ptr, xb_ptr, w_ptr, b_ptr, y_ptr, s_ptr, N, C, a_b, eps,
    ADDS: tl.constexpr, SILU: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program per group and batch row, which reads its strip twice."""
    # int64 before the multiply: 4 maps of 1024 x 1024 x 512 pass 2**31 elements
    group, b, j = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_C)
    inside, cols, base = j < WIDTH, group * WIDTH + j, b * N * C
    scale, shift, terms = _parameters(w_ptr, b_ptr, xb_ptr, a_ptr, b * a_b, cols, inside, BLOCK_C, PDL)
    means, squares = _moments(x_ptr, r_ptr, s_ptr, base, terms, N, cols, inside, C, ADDS, BLOCK_N, BLOCK_C)
    mean = tl.sum(tl.where(inside, means, 0.0), axis=0) / WIDTH
    apart = means - mean
    square = tl.sum(tl.where(inside, squares + N * apart * apart, 0.0), axis=0)
    scale *= _deviation(square, tl.cast(N * WIDTH, tl.float32), eps)
    mean, lane = tl.zeros([BLOCK_C], tl.float32) + mean, tl.arange(0, BLOCK_N)
    for first in range(0, N, BLOCK_N):
        live = (first + lane < N)[:, None] & inside[None, :]
        at = (first + lane)[:, None] * C + cols[None, :]
        h = _summed(x_ptr, r_ptr, base, terms, at, live, ADDS)
        _show(y_ptr, base, at, live, h, mean, scale, shift, SILU)


@triton.jit(do_not_specialize=["eps"])
def group_norm_held_kernel(
    x_ptr, r_ptr, a_ptr, xb_ptr, w_ptr, b_ptr, y_ptr, s_ptr, N, C, a_b, eps,
    ADDS: tl.constexpr, SILU: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program per group and batch row, which reads its strip once."""
    group, b, j = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_C)
    inside, cols, base = j < WIDTH, group * WIDTH + j, b * N * C
    scale, shift, terms = _parameters(w_ptr, b_ptr, xb_ptr, a_ptr, b * a_b, cols, inside, BLOCK_C, PDL)
    lane, elements = tl.arange(0, BLOCK_N), tl.cast(N * WIDTH, tl.float32)
    live = (lane < N)[:, None] & inside[None, :]
    at = lane[:, None] * C + cols[None, :]
    h = _summed(x_ptr, r_ptr, base, terms, at, live, ADDS)
    if s_ptr is not None:
        tl.store(s_ptr + base + at, h.to(s_ptr.dtype.element_ty), mask=live)
    mean = tl.sum(tl.sum(tl.where(live, h, 0.0), axis=0), axis=0) / elements
    apart = tl.where(live, h - mean, 0.0)
    scale *= _deviation(tl.sum(tl.sum(apart * apart, axis=0), axis=0), elements, eps)
    _show(y_ptr, base, at, live, h, tl.zeros([BLOCK_C], tl.float32) + mean, scale, shift, SILU)


@triton.jit
def _first_group(block, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr):
    """The group that a block of channels begins in."""
    return block * BLOCK_C // WIDTH


@triton.jit
def group_moments_kernel(
    x_ptr, r_ptr, a_ptr, xb_ptr, parts_ptr, s_ptr, N, C, a_b, chunk,
    ADDS: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """parts [B, chunks, blocks, PLACES, 2]: mean and squares of a chunk's rows in the groups of a block's channels."""
    k, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    cols = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    _, _, terms = _parameters(None, None, xb_ptr, a_ptr, b * a_b, cols, inside, BLOCK_C, PDL)
    # int64 before the multiply: 4 maps of 1024 x 1024 x 512 pass 2**31 elements
    base = (b * N + k * chunk) * C
    rows = tl.minimum(N - k * chunk, chunk)
    means, squares = _moments(x_ptr, r_ptr, s_ptr, base, terms, rows, cols, inside, C, ADDS, BLOCK_N, BLOCK_C)

    place = tl.arange(0, PLACES)
    mine = ((cols // WIDTH)[None, :] == (_first_group(block, WIDTH, BLOCK_C) + place)[:, None]) & inside[None, :]
    channels = tl.maximum(tl.sum(mine.to(tl.float32), axis=1), 1.0)
    mean = tl.sum(tl.where(mine, means[None, :], 0.0), axis=1) / channels
    apart = means[None, :] - mean[:, None]
    square = tl.sum(tl.where(mine, squares[None, :] + rows * apart * apart, 0.0), axis=1)
    to = parts_ptr + (((b * tl.num_programs(0) + k) * tl.num_programs(1) + block) * PLACES + place) * 2
    tl.store(to, mean)
    tl.store(to + 1, square)


@triton.jit
def _merged(
    parts_ptr, groups, N, C, chunk, lo, hi, WIDTH: tl.constexpr, PLACES: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, SQUARED: tl.constexpr, mean,
):  # fmt: skip
    """Sums over the chunks lo <= k < hi of the groups [BLOCK_G]: of elements, or of squared distances from `mean`.

    A group's channels are in SPAN blocks or fewer.
    """
    e = tl.arange(0, BLOCK_K * SPAN)
    k, blocks = lo + e // SPAN, tl.cdiv(C, BLOCK_C)
    block = (groups * WIDTH // BLOCK_C)[:, None] + (e % SPAN)[None, :]
    first, last = block * BLOCK_C, block * BLOCK_C + BLOCK_C
    channels = tl.minimum((groups * WIDTH + WIDTH)[:, None], last) - tl.maximum((groups * WIDTH)[:, None], first)
    live = (k < hi)[None, :] & (channels > 0) & (groups * WIDTH < C)[:, None]
    at = ((k * blocks)[None, :] + block) * PLACES + groups[:, None] - _first_group(block, WIDTH, BLOCK_C)
    count = tl.where(live, channels * tl.minimum(N - k * chunk, chunk)[None, :], 0).to(tl.float32)
    means = tl.load(parts_ptr + at * 2, mask=live, other=0.0)
    if SQUARED:
        apart = means - mean[:, None]
        total = tl.load(parts_ptr + at * 2 + 1, mask=live, other=0.0) + count * apart * apart
    else:
        total = count * means
    return tl.sum(total, axis=1)


@triton.jit
def _of_chunks(
    parts_ptr, groups, N, C, chunk, chunks, eps, WIDTH: tl.constexpr, PLACES: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(mean, 1 / deviation) of the groups [BLOCK_G]."""
    elements = tl.cast(N * WIDTH, tl.float32)
    total, square = tl.zeros([BLOCK_G], tl.float32), tl.zeros([BLOCK_G], tl.float32)
    for k in range(0, chunks, BLOCK_K):
        total += _merged(
            parts_ptr, groups, N, C, chunk, k, chunks, WIDTH, PLACES, SPAN, BLOCK_G, BLOCK_K, BLOCK_C, False, total
        )
    mean = total / elements
    for k in range(0, chunks, BLOCK_K):
        square += _merged(
            parts_ptr, groups, N, C, chunk, k, chunks, WIDTH, PLACES, SPAN, BLOCK_G, BLOCK_K, BLOCK_C, True, mean
        )
    return mean, _deviation(square, elements, eps)


@triton.jit(do_not_specialize=["eps"])
def group_merge_kernel(
    parts_ptr, moments_ptr, N, C, chunk, chunks, eps, WIDTH: tl.constexpr, PLACES: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """moments [B, groups, 2]: mean and 1 / deviation of a group."""
    b, place = tl.program_id(1).to(tl.int64), tl.arange(0, 1)
    if PDL:
        launch_dependents()
        wait()
    parts_ptr += b * chunks * tl.cdiv(C, BLOCK_C) * PLACES * 2
    mean, deviation = _of_chunks(
        parts_ptr, tl.program_id(0) + place, N, C, chunk, chunks, eps, WIDTH, PLACES, SPAN, 1, BLOCK_K, BLOCK_C
    )
    moments_ptr += (b * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(moments_ptr + place, mean)
    tl.store(moments_ptr + 1 + place, deviation)


@triton.jit(do_not_specialize=["eps"])
def group_apply_kernel(
    x_ptr, r_ptr, a_ptr, xb_ptr, parts_ptr, w_ptr, b_ptr, y_ptr, N, C, a_b, chunk, chunks, eps,
    ADDS: tl.constexpr, SILU: tl.constexpr, MERGE: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr,
    SPAN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y of BLOCK_N rows; parts_ptr: the chunks' parts where they are to be merged, else the groups' [B, groups, 2]."""
    # what the launch before read last is read first
    row, b = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_N, tl.program_id(2).to(tl.int64)
    block, lane = tl.program_id(1), tl.arange(0, BLOCK_N)
    cols = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    scale, shift, terms = _parameters(w_ptr, b_ptr, xb_ptr, a_ptr, b * a_b, cols, inside, BLOCK_C, PDL)
    # asked for before the moments, which take their time
    live, base = (row + lane < N)[:, None] & inside[None, :], (b * N + row) * C
    at = lane[:, None] * C + cols[None, :]
    h = _summed(x_ptr, r_ptr, base, terms, at, live, ADDS)
    if MERGE:
        parts_ptr += b * chunks * tl.num_programs(1) * PLACES * 2
        groups = _first_group(block, WIDTH, BLOCK_C) + tl.arange(0, PLACES)
        means, deviations = _of_chunks(
            parts_ptr, groups, N, C, chunk, chunks, eps, WIDTH, PLACES, SPAN, PLACES, BLOCK_K, BLOCK_C
        )
        mine = (cols // WIDTH)[:, None] == groups[None, :]
        mean = tl.sum(tl.where(mine, means[None, :], 0.0), axis=1)
        deviation = tl.sum(tl.where(mine, deviations[None, :], 0.0), axis=1)
    else:
        parts_ptr += (b * (C // WIDTH) + cols // WIDTH) * 2
        mean = tl.load(parts_ptr, mask=inside, other=0.0)
        deviation = tl.load(parts_ptr + 1, mask=inside, other=0.0)
    _show(y_ptr, base, at, live, h, mean, scale * deviation, shift, SILU)
