"""The kernel of `step_attention`, and how a launch is cut into programs.

A tile of the context is BLOCK_T tokens. Small groups of query heads take it as [ROWS, 1, REPS, BLOCK_D], where ROWS is
as many tokens as the program's threads hold at sixteen bytes each: every row keeps a softmax of its own for every head,
so that the loop exchanges nothing between warps, and within one only the parts of a score. Rows come first, as that is
where Triton puts the threads that one token leaves over; then q, k, v and acc have one layout, and nothing moves from
one to another. Larger groups go through tl.dot, as [BLOCK_T, BLOCK_D]. Both carry (m, z, acc): a softmax's largest
score, its sum of weights and its weighted values.

What comes of the launch before, the new token's q, k and v, is loaded in one go after the wait, as it lies in memory
and turned by a half, in the layout that it is used in: a trip to memory costs as much as the attention to 100 tokens.
"""

from __future__ import annotations

from dsi_kernels._pdl import launch_dependents, wait
from dsi_kernels._triton import tl, triton
from dsi_kernels.positions import read_position


@triton.jit
def _affine(x, w_ptr, b_ptr, at, inside, offset):
    """x * (w[at] + offset) + b[at]."""
    if w_ptr is not None:
        x = x * (tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32) + offset)
    if b_ptr is not None:
        x = x + tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _partner(d, ROTARY: tl.constexpr, PAIRS: tl.constexpr):
    """(whether a dimension is the first of the two that turn together, the other one)."""
    if PAIRS:
        first, other = d % 2 == 0, d ^ 1
    else:
        first = d < ROTARY // 2
        other = tl.where(first, d + ROTARY // 2, d - ROTARY // 2)
    return first, other


@triton.jit
def _head(ptr, at, d, live, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, PAIRS: tl.constexpr):
    """Heads at ptr + at + d, and the same with the partners of their dimensions, zeros where not live: fp32."""
    x = tl.load(ptr + at + d, mask=live & (d < HEAD_DIM), other=0.0).to(tl.float32)
    y = x
    if ROTARY > 0:
        _, other = _partner(d, ROTARY, PAIRS)
        y = tl.load(ptr + at + other, mask=live & (d < ROTARY), other=0.0).to(tl.float32)
    return x, y


@triton.jit
def _formed(
    x, y, cos, sin, w_ptr, b_ptr, d, eps, offset,
    HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Heads normed and turned; y are x's partners. Dimensions beyond the head stay 0."""
    inside = d < HEAD_DIM
    mean, rstd = 0.0, 1.0
    if NORM == "layer":
        mean = tl.expand_dims(tl.sum(x, axis=3) / HEAD_DIM, 3)
    if NORM != "":
        centred = tl.where(inside, x - mean, 0.0)
        rstd = tl.expand_dims(tl.rsqrt(tl.sum(centred * centred, axis=3) / HEAD_DIM + eps), 3)
        x = _affine(centred * rstd, w_ptr, b_ptr, d, inside, offset)
    if ROTARY > 0:
        first, other = _partner(d, ROTARY, PAIRS)
        if NORM != "":
            y = _affine((y - mean) * rstd, w_ptr, b_ptr, other, d < ROTARY, offset)
        x = x * cos + tl.where(d < ROTARY, tl.where(first, -y, y), 0.0) * sin
    return x


@triton.jit
def _round(x, ROUND: tl.constexpr):
    if ROUND == 1:
        x = x.to(tl.bfloat16).to(tl.float32)
    elif ROUND == 2:
        x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def _bias(slope, places_ptr, at, live, alibi_scale, ROUND: tl.constexpr, DTYPE: tl.constexpr, SCALED: tl.constexpr):
    """Of keys at positions `at`, in base 2; slope broadcasts with at."""
    if places_ptr is not None:
        at = tl.load(places_ptr + at, mask=live, other=0)
    bias = _round(_round(slope * _round(at.to(tl.float32), ROUND), ROUND), DTYPE)
    if SCALED:
        bias = _round(bias * alibi_scale, DTYPE)
    return bias * 1.4426950408889634


@triton.jit
def _capped(s, cap, CAPPED: tl.constexpr):
    """cap * tanh(s); as it is without a cap."""
    if CAPPED:
        # 1 - 2 / (e^2x + 1) loses what is small beside 1: there the series will do
        s2 = s * s
        small = s * (1.0 - s2 * (0.3333333333333333 - s2 * (0.13333333333333333 - s2 * 0.05396825396825397)))
        large = 2.0 * tl.sigmoid(2.0 * s) - 1.0
        s = tl.where(tl.abs(s) < 0.1, small, large) * cap
    return s


@triton.jit
def _tile(
    k_ptr, v_ptr, mask_ptr, t0, r, k_t, v_t, mask_t, hi, n, oldest, capacity,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, RING: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """(k, v, position of each slot, whether it is attended to) of slots t0 + r."""
    d = tl.arange(0, BLOCK_D)[None, :] if DOT else tl.arange(0, BLOCK_D)[None, None, None, :]
    t = t0 + r
    live = t < hi
    wide, inside = tl.expand_dims(r, len(r.shape)), tl.expand_dims(live, len(r.shape))
    if HEAD_DIM != BLOCK_D:
        inside = inside & (d < HEAD_DIM)
    # a tile's place in 64 bits, a token's place in the tile in 32
    first = tl.cast(t0, tl.int64)
    k = tl.load(k_ptr + first * k_t + (wide * k_t + d), mask=inside, other=0.0)
    v = tl.load(v_ptr + first * v_t + (wide * v_t + d), mask=inside, other=0.0)
    at = t
    if RING:
        at = n - 1 - (n - 1 - t) % capacity
        live = live & (at >= oldest)
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + at.to(tl.int64) * mask_t, mask=live, other=0) != 0)
    if mask_ptr is not None or RING:
        # what is not attended to may be anything
        v = tl.where(tl.expand_dims(live, len(r.shape)), v, 0.0)
    return k, v, at, live


@triton.jit
def _fold(
    q, k, v, at, live, slope, places_ptr, scale, cap, alibi_scale, m, z, acc,
    CAPPED: tl.constexpr, ROUND: tl.constexpr, DTYPE: tl.constexpr, SCALED: tl.constexpr, ALIBI: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """The softmax (m, z, acc) with a tile more.

    DOT: q [G, D], k [T, D], m [G]. Else q [R, G, 1, D], k [R, 1, REPS, D], m [R, G, 1]: one layout for them all.
    """
    if DOT:
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        live, at = live[None, :], at[None, :]
    else:
        s = tl.sum(q * k.to(tl.float32), axis=3) * scale
    s = _capped(s, cap, CAPPED)
    if ALIBI:
        s += _bias(slope, places_ptr, at, live, alibi_scale, ROUND, DTYPE, SCALED)
    s = tl.where(live, s, float("-inf"))
    top = tl.maximum(m, tl.max(s, axis=1) if DOT else tl.max(s, axis=2)[:, :, None])
    # -inf - -inf is NaN: with nothing seen yet, measure from 0
    base = tl.where(top == float("-inf"), 0.0, top)
    kept = tl.exp2(m - base)
    if DOT:
        p = tl.exp2(s - base[:, None])
        z = z * kept + tl.sum(p, axis=1)
        acc = acc * kept[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    else:
        p = tl.exp2(s - base)
        z = z * kept + tl.sum(p, axis=2)[:, :, None]
        acc = acc * kept[:, :, :, None] + tl.sum(p[:, :, :, None] * v.to(tl.float32), axis=2)[:, :, None, :]
    return top, z, acc


@triton.jit
def _merge(
    m_ptr, z_ptr, acc_ptr, out_ptr, row, group, live, splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr, MOST: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The splits of a group's heads, whose first is `row`, added up in their order."""
    g, d, s = tl.arange(0, HEADS), tl.arange(0, BLOCK_D), tl.arange(0, MOST)
    first = (row + g) * splits
    # past the L1 cache, which does not see other multiprocessors' writes
    there = (g < group)[:, None] & (s < live)[None, :]
    m = tl.load(m_ptr + first[:, None] + s[None, :], mask=there, other=float("-inf"), cache_modifier=".cg")
    z = tl.load(z_ptr + first[:, None] + s[None, :], mask=there, other=0.0, cache_modifier=".cg")
    if BLOCK_S == MOST:
        # all at once, in the same trip
        inside = there[:, :, None] & (d < HEAD_DIM)[None, None, :]
        where = acc_ptr + ((first[:, None] + s[None, :]) * HEAD_DIM)[:, :, None] + d[None, None, :]
        acc = tl.load(where, mask=inside, other=0.0, cache_modifier=".cg")
    top = tl.max(m, axis=1)
    base = tl.where(top == float("-inf"), 0.0, top)
    shares = tl.exp2(m - base[:, None])
    total = tl.sum(z * shares, axis=1)
    if BLOCK_S == MOST:
        out = tl.sum(acc * shares[:, :, None], axis=1)
    else:
        out = tl.zeros([HEADS, BLOCK_D], tl.float32)
        for s0 in tl.range(0, live, BLOCK_S):
            # names of their own: these are narrower than those above, and a loop's names keep their types
            part = s0 + tl.arange(0, BLOCK_S)
            at = first[:, None] + part[None, :]
            mine = (g < group)[:, None] & (part < live)[None, :]
            share = tl.load(m_ptr + at, mask=mine, other=float("-inf"), cache_modifier=".cg")
            share = tl.exp2(share - base[:, None])
            within = mine[:, :, None] & (d < HEAD_DIM)[None, None, :]
            place = acc_ptr + (at * HEAD_DIM)[:, :, None] + d[None, None, :]
            out += tl.sum(tl.load(place, mask=within, other=0.0, cache_modifier=".cg") * share[:, :, None], axis=1)
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    whole = (g < group)[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(out_ptr + ((row + g) * HEAD_DIM)[:, None] + d[None, :], out.to(out_ptr.dtype.element_ty), mask=whole)


@triton.jit
def _stretch(
    place, split, splits, min_split, width, capacity, window, BLOCK_T: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """(earlier tokens, first position seen, first slot and end of this split, splits that have tokens, or 1)."""
    n = tl.minimum(tl.maximum(place, 0), 2147483646)
    oldest = tl.maximum(n - window + 1, 0).to(tl.int32)
    if RING:
        # a position is what the mask knows, a slot what the cache holds
        n = n.to(tl.int32)
        end, begin = tl.minimum(n, capacity), n * 0
    else:
        n = tl.minimum(n, capacity).to(tl.int32)
        end, begin = tl.minimum(n, width), oldest
    count = tl.maximum(end - begin, 0)
    step = tl.maximum(tl.cdiv(tl.cdiv(count, splits), BLOCK_T) * BLOCK_T, min_split)
    lo = begin + split * step
    return n, oldest, lo, tl.minimum(lo + step, end), tl.maximum(tl.cdiv(count, step), 1)


@triton.jit
def _leave(
    m, z, acc, m_ptr, z_ptr, acc_ptr, ticket_ptr, out_ptr, row, group, split, splits, live_splits,
    HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr, MOST: tl.constexpr,
    BLOCK_S: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The output of the group whose first head is `row`: from one split, or from all, by whoever ends last."""
    if not DOT:
        top = tl.max(m, axis=0)
        share = tl.exp2(m - tl.where(top == float("-inf"), 0.0, top)[None, :, :])
        z, acc = tl.sum(z * share, axis=0), tl.sum(acc * share[:, :, :, None], axis=0)
        m, z = tl.reshape(top, [BLOCK_G]), tl.reshape(z, [BLOCK_G])
        acc = tl.reshape(acc, [BLOCK_G, BLOCK_D])
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    inside = (g < group)[:, None] & (d < HEAD_DIM)[None, :]
    if live_splits == 1:
        # nothing attended to: 0 / 1
        out = acc / tl.where(z == 0.0, 1.0, z)[:, None]
        at = out_ptr + ((row + g) * HEAD_DIM)[:, None] + d[None, :]
        tl.store(at, out.to(out_ptr.dtype.element_ty), mask=inside)
    elif m_ptr is not None:
        part = (row + g) * splits + split
        tl.store(m_ptr + part, m, mask=g < group)
        tl.store(z_ptr + part, z, mask=g < group)
        tl.store(acc_ptr + (part * HEAD_DIM)[:, None] + d[None, :], acc, mask=inside)
        # every thread's stores come before the one thread's ticket, and every thread's loads after it
        tl.debug_barrier()
        ticket = tl.atomic_add(ticket_ptr + tl.program_id(0), 1, sem="acq_rel", scope="gpu")
        if ticket == live_splits - 1:
            tl.store(ticket_ptr + tl.program_id(0), 0)
            _merge(
                m_ptr, z_ptr, acc_ptr, out_ptr, row, group, live_splits, splits,
                HEAD_DIM, BLOCK_D, HEADS, MOST, BLOCK_S,
            )  # fmt: skip


@triton.jit
def _ask_ahead(
    k_ptr, v_ptr, lo, hi, k_t, v_t,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The tiles of K and V before the AHEAD-th, but the first, to the L2 cache; nothing waits for them."""
    SIZE: tl.constexpr = k_ptr.dtype.element_ty.primitive_bitwidth // 8
    # a line of 128 bytes a request
    LINES: tl.constexpr = BLOCK_D * SIZE // 128 if BLOCK_D * SIZE > 128 else 1
    d = tl.minimum(tl.arange(0, LINES) * (128 // SIZE), HEAD_DIM - 1)[None, :]
    for tile in tl.static_range(1, AHEAD):
        if lo + tile * BLOCK_T < hi:
            t = tl.minimum(lo + tile * BLOCK_T + tl.arange(0, BLOCK_T), hi - 1).to(tl.int64)[:, None]
            _request(k_ptr + t * k_t + d)
            _request(v_ptr + t * v_t + d)


@triton.jit
def _request(at):
    """The lines that addresses are in, to the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _wait(PDL: tl.constexpr):
    if PDL:
        wait()


@triton.jit
def _open(PDL: tl.constexpr):
    if PDL:
        launch_dependents()


@triton.jit
def _seats(split, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr):
    """(tokens of a tile, zeros, query heads, whether the new token is this program's and row's).

    What is computed is [R, G, 1, D], where a row stands for a token of a tile and what is of no head stands in every
    row; with tl.dot it is [G, 1, 1, D]. The last three are of that shape without D.
    """
    if DOT:
        r = tl.arange(0, BLOCK_T)
        head = tl.arange(0, BLOCK_G)[:, None, None]
        still = head * 0
        fresh = still == split
    else:
        rows = tl.arange(0, ROWS)[:, None, None]
        r = rows + tl.arange(0, BLOCK_T // ROWS)[None, None, :] * ROWS
        head = tl.arange(0, BLOCK_G)[None, :, None]
        still = rows * 0
        fresh = rows + split == 0
    return r, still, head, fresh


@triton.jit
def _about(
    at, head, fresh, mask_ptr, slopes_ptr, places_ptr, first, group, width, mask_t, alibi_scale,
    ROUND: tl.constexpr, DTYPE: tl.constexpr, SCALED: tl.constexpr, ALIBI: tl.constexpr, BLOCK_G: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """(slopes of the heads, the new token's bias, whether it is attended to)."""
    slope, bias, seen = 0.0, 0.0, fresh
    if mask_ptr is not None:
        seen = seen & (tl.load(mask_ptr + at * mask_t, mask=seen & (at < width), other=0) != 0)
    if ALIBI:
        slope = tl.load(slopes_ptr + first + head, mask=head < group, other=0.0)
        bias = _bias(slope, places_ptr, at, seen, alibi_scale, ROUND, DTYPE, SCALED)
        if DOT:
            slope = tl.reshape(slope, [BLOCK_G, 1])
    return slope, bias, seen


@triton.jit
def _terms(
    cos_ptr, sin_ptr, at_ptr, b, cos_b, cos_t, sin_b, sin_t, d, AT_STRIDE: tl.constexpr, ROTARY: tl.constexpr
):  # fmt: skip
    """(cos, sin) of the new token's position."""
    cos, sin = 1.0, 0.0
    if ROTARY > 0:
        at = b * 0
        if at_ptr is not None:
            at = tl.load(at_ptr + b * AT_STRIDE)
        cos = tl.load(cos_ptr + b * cos_b + at * cos_t + d, mask=d < ROTARY, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + b * sin_b + at * sin_t + d, mask=d < ROTARY, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def _write(
    k_ptr, v_ptr, k, v, place, d, live, capacity, k_h, k_t, v_h, v_t, RING: tl.constexpr, REPEAT: tl.constexpr
):  # fmt: skip
    """The new token to its slot of the cache; not where that is beyond it."""
    slot = place % capacity if RING else place
    live = live & (slot >= 0) & (slot < capacity)
    for copy in range(REPEAT):
        tl.store(k_ptr + copy * k_h + slot * k_t + d, k, mask=live)
        tl.store(v_ptr + copy * v_h + slot * v_t + d, v, mask=live)


# what grows with every token is no reason to compile again
@triton.jit(do_not_specialize=["start", "width", "splits", "min_split", "window", "mask_b", "places_b"])
def step_attention_kernel(  # noqa: PLR0915 - a prologue, a loop and an epilogue
    qkv_ptr, k_ptr, v_ptr, out_ptr, m_ptr, z_ptr, acc_ptr, ticket_ptr, cos_ptr, sin_ptr, at_ptr,
    q_w_ptr, k_w_ptr, q_b_ptr, k_b_ptr, mask_ptr, slopes_ptr, places_ptr,
    start, width, capacity, splits, min_split, window, scale, cap, eps, offset, alibi_scale, kv_heads, group,
    qkv_b, k_b, k_h, k_t, v_b, v_h, v_t, cos_b, cos_t, sin_b, sin_t, mask_b, mask_t, places_b,
    START_STRIDE: tl.constexpr, AT_STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr,
    PAIRS: tl.constexpr, NORM: tl.constexpr, CAPPED: tl.constexpr, RING: tl.constexpr, REPEAT: tl.constexpr,
    ROUND: tl.constexpr, DTYPE: tl.constexpr, SCALED: tl.constexpr,
    DOT: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    HEADS: tl.constexpr, MOST: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr, LONG: tl.constexpr,
    AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    _open(PDL)
    ALIBI: tl.constexpr = slopes_ptr is not None
    # int64 before a stride multiplies: a cache of 128k tokens passes 2**31 elements at batch 32
    b = (tl.program_id(0) // kv_heads).to(tl.int64)
    h = (tl.program_id(0) % kv_heads).to(tl.int64)
    split = tl.program_id(1)
    scale, cap, alibi_scale = tl.cast(scale, tl.float32), tl.cast(cap, tl.float32), tl.cast(alibi_scale, tl.float32)
    eps, offset = tl.cast(eps, tl.float32), tl.cast(offset, tl.float32)

    place = read_position(start, b, START_STRIDE)
    n, oldest, lo, hi, live_splits = _stretch(place, split, splits, min_split, width, capacity, window, BLOCK_T, RING)
    # as every kernel that was launched so must, it waits, and ends then, having touched nothing
    if split >= live_splits:
        _wait(PDL)
        return

    r, still, head, fresh = _seats(split, BLOCK_G, BLOCK_T, ROWS, DOT)
    d = tl.arange(0, BLOCK_D)[None, None, None, :]
    k_ptr += b * k_b + h * REPEAT * k_h
    v_ptr += b * v_b + h * REPEAT * v_h
    if mask_ptr is not None:
        mask_ptr += b * mask_b
    if places_ptr is not None:
        places_ptr += b * places_b
    k, v, at, live = _tile(
        k_ptr, v_ptr, mask_ptr, lo, r, k_t, v_t, mask_t, hi, n, oldest, capacity, HEAD_DIM, BLOCK_D, RING, DOT
    )
    if PDL and LONG:
        _ask_ahead(k_ptr, v_ptr, lo, hi, k_t, v_t, HEAD_DIM, BLOCK_D, BLOCK_T, AHEAD)
    slope, new_bias, seen = _about(
        still.to(tl.int64) + place, head, fresh, mask_ptr, slopes_ptr, places_ptr, h * group, group, width, mask_t,
        alibi_scale, ROUND, DTYPE, SCALED, ALIBI, BLOCK_G, DOT,
    )  # fmt: skip
    wide = still[:, :, :, None]
    cos, sin = _terms(cos_ptr, sin_ptr, at_ptr, b, cos_b, cos_t, sin_b, sin_t, wide + d, AT_STRIDE, ROTARY)
    _wait(PDL)

    row_ptr = qkv_ptr + b * qkv_b
    k_new_ptr = row_ptr + (kv_heads * group + h) * HEAD_DIM
    head, ours = head[:, :, :, None], fresh[:, :, :, None]
    q, q_other = _head(row_ptr + h * group * HEAD_DIM, head * HEAD_DIM + wide, d, head < group, HEAD_DIM, ROTARY, PAIRS)
    k_new, k_other = _head(k_new_ptr, wide, d, ours, HEAD_DIM, ROTARY, PAIRS)
    v_new = tl.load(k_new_ptr + kv_heads * HEAD_DIM + wide + d, mask=ours & (d < HEAD_DIM), other=0.0)
    q = _formed(
        q, q_other, cos, sin, q_w_ptr, q_b_ptr, wide + d, eps, offset, HEAD_DIM, ROTARY, PAIRS, NORM
    ).to(k.dtype)  # fmt: skip
    k_new = _formed(
        k_new, k_other, cos, sin, k_w_ptr, k_b_ptr, wide + d, eps, offset, HEAD_DIM, ROTARY, PAIRS, NORM
    ).to(k.dtype)  # fmt: skip

    first = head == 0 if DOT else ours
    _write(
        k_ptr, v_ptr, k_new, v_new, wide.to(tl.int64) + place, d, ours & first & (d < HEAD_DIM), capacity,
        k_h, k_t, v_h, v_t, RING, REPEAT,
    )  # fmt: skip

    # the softmax of the new token alone
    m = _capped(tl.sum(q.to(tl.float32) * k_new.to(tl.float32), axis=3) * scale, cap, CAPPED) + new_bias
    m = tl.where(seen, m, float("-inf"))
    z = tl.where(seen, 1.0, 0.0) + tl.zeros_like(m)
    acc = tl.where(seen[:, :, :, None], v_new.to(tl.float32), 0.0) + tl.zeros_like(q).to(tl.float32)
    if DOT:
        q, acc = tl.reshape(q, [BLOCK_G, BLOCK_D]), tl.reshape(acc, [BLOCK_G, BLOCK_D])
        m, z = tl.reshape(m, [BLOCK_G]), tl.reshape(z, [BLOCK_G])
    else:
        q = q.to(tl.float32)

    m, z, acc = _fold(
        q, k, v, at, live, slope, places_ptr, scale, cap, alibi_scale, m, z, acc,
        CAPPED, ROUND, DTYPE, SCALED, ALIBI, DOT,
    )  # fmt: skip
    if LONG:
        for t0 in tl.range(lo + BLOCK_T, hi, BLOCK_T, num_stages=STAGES):
            k, v, at, live = _tile(
                k_ptr, v_ptr, mask_ptr, t0, r, k_t, v_t, mask_t, hi, n, oldest, capacity, HEAD_DIM, BLOCK_D, RING, DOT
            )
            m, z, acc = _fold(
                q, k, v, at, live, slope, places_ptr, scale, cap, alibi_scale, m, z, acc,
                CAPPED, ROUND, DTYPE, SCALED, ALIBI, DOT,
            )  # fmt: skip
    _leave(
        m, z, acc, m_ptr, z_ptr, acc_ptr, ticket_ptr, out_ptr, (b * kv_heads + h) * group, group, split, splits,
        live_splits, HEAD_DIM, BLOCK_G, BLOCK_D, HEADS, MOST, BLOCK_S, DOT,
    )  # fmt: skip
