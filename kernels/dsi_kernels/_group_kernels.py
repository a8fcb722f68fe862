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
    mean, square = tl.zeros([BLOCK_N, BLOCK_C], tl.float32), tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    lane, taken = tl.arange(0, BLOCK_N), tl.cast(0.0, tl.float32)
    for first in range(0, rows, BLOCK_N):
        live = (first + lane < rows)[:, None] & inside[None, :]
        at = (first + lane)[:, None] * C + cols[None, :]
        h = _summed(x_ptr, r_ptr, base, terms, at, live, ADDS)
        if s_ptr is not None:
            tl.store(s_ptr + base + at, h.to(s_ptr.dtype.element_ty), mask=live)
        taken += 1.0
        apart = tl.where(live, h - mean, 0.0)
        mean += apart * (1.0 / taken)
        square += apart * (h - mean)
    count = ((tl.maximum(rows - lane, 0) + BLOCK_N - 1) // BLOCK_N).to(tl.float32)[:, None]
    merged = tl.sum(mean * count, axis=0) / rows
    apart = mean - merged[None, :]
    return merged, tl.sum(square + count * apart * apart, axis=0)


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
def group_moments_kernel(
    x_ptr, r_ptr, a_ptr, xb_ptr, parts_ptr, s_ptr, N, C, a_b, chunk,
    ADDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """parts [B, chunks, 2, C]: mean and squares of a chunk's rows, by channel."""
    k, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    _, _, terms = _parameters(None, None, xb_ptr, a_ptr, b * a_b, cols, inside, BLOCK_C, PDL)
    # int64 before the multiply: 4 maps of 1024 x 1024 x 512 pass 2**31 elements
    base = (b * N + k * chunk) * C
    rows = tl.minimum(N - k * chunk, chunk)
    mean, square = _moments(x_ptr, r_ptr, s_ptr, base, terms, rows, cols, inside, C, ADDS, BLOCK_N, BLOCK_C)
    parts_ptr += (b * tl.num_programs(0) + k) * 2 * C
    tl.store(parts_ptr + cols, mean, mask=inside)
    tl.store(parts_ptr + C + cols, square, mask=inside)


@triton.jit
def _over_chunks(parts_ptr, mean, N, C, chunk, chunks, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SQUARE: tl.constexpr):
    """Sum of a group's elements, or of their squared distances from `mean`."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, chunks * WIDTH, BLOCK):
        e = first + tl.arange(0, BLOCK)
        k = e // WIDTH
        live = k < chunks
        count = tl.where(live, tl.minimum(N - k * chunk, chunk), 0).to(tl.float32)
        at = parts_ptr + k * 2 * C + e % WIDTH
        means = tl.load(at, mask=live, other=0.0)
        if SQUARE:
            apart = means - mean
            total += tl.load(at + C, mask=live, other=0.0) + count * apart * apart
        else:
            total += means * count
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["eps"])
def group_merge_kernel(
    parts_ptr, moments_ptr, N, C, chunk, chunks, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """moments [B, groups, 2]: mean and 1 / deviation of a group."""
    group, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if PDL:
        launch_dependents()
        wait()
    parts_ptr += b * chunks * 2 * C + group * WIDTH
    elements = tl.cast(N * WIDTH, tl.float32)
    mean = _over_chunks(parts_ptr, 0.0, N, C, chunk, chunks, WIDTH, BLOCK, False) / elements
    square = _over_chunks(parts_ptr, mean, N, C, chunk, chunks, WIDTH, BLOCK, True)
    moments_ptr += (b * tl.num_programs(0) + group) * 2
    tl.store(moments_ptr, mean)
    tl.store(moments_ptr + 1, _deviation(square, elements, eps))


@triton.jit
def _merged(
    parts_ptr, cols, first, N, C, chunk, chunks, eps, WIDTH: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr
):
    """(mean, 1 / deviation) of the groups that the channels `cols` are in, whose own channels begin at `first`."""
    j, k = first + tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_K)
    live = (k < chunks)[:, None] & (j < C)[None, :]
    count = tl.where(k < chunks, tl.minimum(N - k * chunk, chunk), 0).to(tl.float32)[:, None]
    at = parts_ptr + k[:, None] * 2 * C + j[None, :]
    means = tl.load(at, mask=live, other=0.0)
    mean = tl.sum(means * count, axis=0) / N
    apart = means - mean[None, :]
    square = tl.sum(tl.load(at + C, mask=live, other=0.0) + count * apart * apart, axis=0)
    mine = (cols // WIDTH)[:, None] == (j // WIDTH)[None, :]
    of_group = tl.sum(tl.where(mine, mean[None, :], 0.0), axis=1) / WIDTH
    apart = mean[None, :] - of_group[:, None]
    square = tl.sum(tl.where(mine, square[None, :] + N * apart * apart, 0.0), axis=1)
    return of_group, _deviation(square, tl.cast(N * WIDTH, tl.float32), eps)


@triton.jit(do_not_specialize=["eps"])
def group_apply_kernel(
    x_ptr, r_ptr, a_ptr, xb_ptr, parts_ptr, w_ptr, b_ptr, y_ptr, N, C, a_b, chunk, chunks, eps, step,
    ADDS: tl.constexpr, SILU: tl.constexpr, MERGE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y of `step` rows; parts_ptr: [B, chunks, 2, C] where they are to be merged, else the groups' [B, groups, 2]."""
    # what the launch before read last is read first
    block, b = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(2).to(tl.int64)
    cols, lane = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)
    inside = cols < C
    scale, shift, terms = _parameters(w_ptr, b_ptr, xb_ptr, a_ptr, b * a_b, cols, inside, BLOCK_C, PDL)
    if MERGE:
        first = tl.program_id(1) * BLOCK_C // WIDTH * WIDTH
        parts_ptr += b * chunks * 2 * C
        mean, deviation = _merged(parts_ptr, cols, first, N, C, chunk, chunks, eps, WIDTH, BLOCK_J, BLOCK_K)
    else:
        parts_ptr += (b * (C // WIDTH) + cols // WIDTH) * 2
        mean = tl.load(parts_ptr, mask=inside, other=0.0)
        deviation = tl.load(parts_ptr + 1, mask=inside, other=0.0)
    scale *= deviation
    base = (b * N + block * step) * C
    rows = tl.minimum(N - block * step, step)
    for n in range(0, rows, BLOCK_N):
        live = (n + lane < rows)[:, None] & inside[None, :]
        at = (n + lane)[:, None] * C + cols[None, :]
        h = _summed(x_ptr, r_ptr, base, terms, at, live, ADDS)
        _show(y_ptr, base, at, live, h, mean, scale, shift, SILU)
