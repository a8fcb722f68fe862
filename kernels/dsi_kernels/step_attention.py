"""The attention of a decode step in one launch: head norms, rotary embedding, cache write, split context, merge.

    q, k = rope(norm(q)), rope(norm(k));  k_cache[start], v_cache[start] = k, v
    out  = softmax(bias + cap(scale * q k^T), over the earlier tokens seen and the new one) v

One program per batch row, KV head and split of the context; the query heads of a group share it, so that K and V are
read once: 2 * B * kv_heads * length * head_dim * itemsize bytes, memory bound. Every program turns the queries of its
group itself. The new token's k and v are the softmax's initial state in split 0, out of registers, and split 0 writes
them to the cache: no program reads what another one of the launch writes there, whatever their order.

Splits are counted by the host from the capacity and cut by the device from the length that it reads, min_split tokens
or more each, so one CUDA graph serves every length; programs without tokens end at once. One live split writes the
output. Several leave (m, z, acc) in fp32, and the program that draws the last ticket (an integer atomic with release
and acquire at the scope of the device, after a barrier of its program's threads) adds them up, in the order of the
splits whoever it is, and puts the ticket back to 0: same input, same output, bit for bit.

With programmatic dependent launch the first tiles of K and V, the mask, the position and the tables are loaded before
the wait, and further tiles asked into the L2 cache. All of them were written before the graph was launched: a graph
holds one step, of which this launch alone writes to these buffers, and at slots that are not read; the counters move on
in the step's last kernel. qkv, scratch and tickets are touched after the wait. A program is there the sooner beside
what still runs the smaller it is: 200 tokens of 32 heads cost a step 3.7 us a layer in 13 programs of one warp for each
head, and 6.2 in one of 16 warps (H200).

Casting: norm and rotation in fp32 with one rounding of q and k to the dtype; scores and softmax in fp32, base 2. A
group of two or more goes through tl.dot, which takes the weights rounded to the dtype (fp32 stays fp32, not TF32). One
rounding at the end. Position biases are rounded as the model that has them rounds them.

A token whose mask is False, the new one included, is not attended to, and may hold anything. A start beyond the cache
is not written. Nothing to attend to gives 0.

Source: Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html; Su et al. 2021,
https://arxiv.org/abs/2104.09864; Press et al. 2022, https://arxiv.org/abs/2108.12409.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsi_kernels._pdl import launch_options
from dsi_kernels._step_kernel import step_attention_kernel
from dsi_kernels._step_operands import (
    ROUNDED,
    HeadNorm,
    StepAlibi,
    StepRope,
    check_operand_devices,
    check_options,
    check_places,
    check_rope,
    check_shapes,
)
from dsi_kernels._step_reference import step_attention_reference
from dsi_kernels._triton import triton
from dsi_kernels.decode_attention import MAX_SPLITS, block_sizes
from dsi_kernels.positions import position_stride
from dsi_kernels.tuned import device_facts, launch_config

__all__ = [
    "HeadNorm", "StepAlibi", "StepRope", "count_splits", "settings_key", "step_attention", "step_attention_reference",
]  # fmt: skip

LOG2E = math.log2(math.e)
# what settings are kept for, each up to that many: rows of a batch, positions attended to
ROWS, REACHES = (1, 8, 32), (256, 1024, 8192, 32768)
# fp32 elements that each warp of the merging program adds up at a time
MERGE_TILE = 4096


def count_splits(programs: int, width: int, sms: int, *, min_split: int, programs_per_sm: int) -> int:
    """Into how many parts a context of up to width tokens is split, where there are so many programs without.

    As many as keep the device at programs_per_sm programs for each multiprocessor or below, of min_split tokens each.
    """
    splits = max(1, min(sms * programs_per_sm // max(programs, 1), -(-width // min_split), MAX_SPLITS))
    # the merge reads powers of two of them
    power = 1 << (splits.bit_length() - 1)
    return power if 8 * splits <= 9 * power else splits


def step_attention(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int | Tensor,
    heads: int,
    kv_heads: int,
    *,
    rope: StepRope | None = None,
    norm: HeadNorm | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi: StepAlibi | None = None,
    window: int | None = None,
    ring: bool = False,
    tickets: Tensor | None = None,
    reach: int | None = None,
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """Each row's new token attended to the earlier ones and itself; its k and v are in the caches afterwards.

    Args:
        qkv: [B, (heads + 2 kv_heads) * head_dim], fp16, bf16 or fp32: all q heads, all k, all v.
        k_cache, v_cache: [B, kv_heads, capacity, head_dim], qkv's dtype, last axis contiguous; or with `heads` heads,
            each KV head repeated for its group. Written in place.
        start: earlier tokens, and where the new one stands: an int, or an int32 or int64 tensor [] or [B].
        heads, kv_heads: heads is kv_heads times a group of up to 128; head_dim is any up to 256; the two padded to
            powers of two multiply to 16384 or less.
        rope: rotary terms; None leaves q and k as they are.
        norm: over the heads of q and k, before the rotation.
        mask: bool [B or 1, 1, 1, T], True to attend, T > start; or None. By position, also in a ring.
        scale: multiplies the scores; None for head_dim ** -0.5.
        softcap: c of c * tanh(scores / c), or None.
        alibi: position biases.
        window: how many positions a token sees, itself included; None for all before it.
        ring: position p stands at slot p % capacity, and capacity >= window: the new token takes the place of one that
            it does not see.
        tickets: int32 [B * kv_heads] zeros, zeros again afterwards, used by no launch beside this one; None for new
            ones, which takes a launch.
        reach: positions that the launch is planned for, whatever the cache could hold: splits and settings, and so the
            bits, go by it. More than are filled for as long as the launch is used; None for the capacity.
        config: all settings of tuned/step_attention/default.json, in the place of the tuned ones: tile_bytes of K, and
            as many of V; num_warps; stages of the loop; min_split tokens a program or more; programs_per_sm at most;
            ahead, how many tiles are on their way before the launch before has ended.

    Returns:
        [B, heads * head_dim] in qkv's dtype; 0 where there is nothing to attend to.

    Raises:
        ValueError: shapes, dtypes, layout, devices or an int start do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    check_shapes(qkv, k_cache, v_cache, heads, kv_heads)
    B, head_dim, capacity = qkv.shape[0], k_cache.shape[3], k_cache.shape[2]
    check_rope(qkv, rope, head_dim)
    check_options(qkv, norm, mask, head_dim)
    check_places(qkv, capacity, heads, alibi, window, ring=ring)
    check_operand_devices(qkv, k_cache, v_cache, mask, rope, norm, alibi)
    limit = min(capacity, mask.shape[3] if mask is not None else capacity)
    if isinstance(start, int) and (start < 0 or (not ring and start >= limit)):
        raise ValueError(
            f"step_attention: start {start} is not from 0 to {limit - 1}, below the cache's and mask's width"
        )
    if tickets is not None and (tickets.dtype != torch.int32 or tickets.shape != (B * kv_heads,)):
        raise ValueError(f"step_attention: tickets are {tickets.dtype} {tuple(tickets.shape)}; int32 [{B * kv_heads}]")
    least = start + 1 if isinstance(start, int) and not ring else 1
    if reach is not None and reach < least:
        raise ValueError(f"step_attention: reach {reach} is not {least} or more")
    stride = position_stride("step_attention", "start", start, B, qkv.device)
    if not B:
        return qkv.new_empty(0, heads * head_dim)
    options = {
        "scale": head_dim**-0.5 if scale is None else scale, "softcap": softcap, "window": window, "ring": ring,
        "tickets": tickets, "reach": reach, "config": config,
    }  # fmt: skip
    return _launch(qkv, k_cache, v_cache, start, stride, heads, kv_heads, rope, norm, mask, alibi, options)


def settings_key(head_dim: int, group: int, itemsize: int, rows: int, reach: int) -> str:
    """The shape under which the tuned table has the settings for so many rows and positions attended to at most."""
    most = next((one for one in ROWS if rows <= one), ROWS[-1])
    far = next((one for one in REACHES if reach <= one), REACHES[-1])
    return f"head_dim={head_dim},group={group},bytes={itemsize},rows={most},reach={far}"


def _settings(
    qkv: Tensor, head_dim: int, group: int, reach: int, config: Mapping[str, int] | None
) -> tuple[Mapping[str, int], int]:
    """(launch settings, multiprocessors)."""
    name, sms = device_facts(qkv.device)
    if config is None:
        key = settings_key(head_dim, group, qkv.element_size(), qkv.shape[0], reach)
        config = launch_config("step_attention", key, name)
    return config, sms


def _blocks(
    group: int, head_dim: int, itemsize: int, splits: int, reach: int, config: Mapping[str, int]
) -> dict[str, Any]:
    """How a launch is cut, and its warps."""
    block_g, block_d = block_sizes(group, head_dim)
    heads, most = triton.next_power_of_2(group), triton.next_power_of_2(splits)
    dot = group > 1
    block_t = min(256, max(16, config["tile_bytes"] // (block_d * itemsize)))
    # a thread keeps 64 elements of acc, or fewer
    warps = min(16, max(config["num_warps"], block_g * block_d // 2048))
    return {
        "DOT": dot,
        "BLOCK_G": block_g,
        "BLOCK_D": block_d,
        "BLOCK_T": block_t,
        # as many tokens as the threads hold at sixteen bytes each
        "ROWS": max(1, min(block_t, warps * 512 // (block_d * itemsize))),
        "HEADS": heads,
        "MOST": most,
        "BLOCK_S": max(1, min(most, MERGE_TILE * warps // (heads * block_d))),
        "STAGES": config["stages"],
        "AHEAD": config["ahead"],
        # whether a split can be longer than a tile
        "LONG": min(reach, max(config["min_split"], triton.cdiv(reach, splits))) > block_t,
        "num_warps": warps,
    }


def _rope_arguments(qkv: Tensor, rope: StepRope | None) -> tuple[dict[str, Any], list[int]]:
    """(pointers and constants, strides)."""
    if rope is None:
        return {"cos_ptr": None, "sin_ptr": None, "at_ptr": None, "AT_STRIDE": 0, "ROTARY": 0, "PAIRS": False}, [0] * 4
    cos, sin, pairs, at = rope
    strides = [x for t in (cos, sin) for x in (t.stride(0) * (t.shape[0] > 1), t.stride(1))]
    at_stride = 0 if at is None or at.shape[0] == 1 else at.stride(0)
    constants = {"AT_STRIDE": at_stride, "ROTARY": cos.shape[-1], "PAIRS": pairs}
    return {"cos_ptr": cos, "sin_ptr": sin, "at_ptr": at, **constants}, strides


def _norm_arguments(norm: HeadNorm | None) -> dict[str, Any]:
    if norm is None:
        norm = HeadNorm("", None, None)
    pointers = {"q_w_ptr": norm.q_weight, "k_w_ptr": norm.k_weight, "q_b_ptr": norm.q_bias, "k_b_ptr": norm.k_bias}
    return {**pointers, "eps": float(norm.eps), "offset": float(norm.offset), "NORM": norm.kind}


def _alibi_arguments(qkv: Tensor, alibi: StepAlibi | None) -> dict[str, Any]:
    dtype = {torch.bfloat16: 1, torch.float16: 2}.get(qkv.dtype, 0)
    if alibi is None:
        none = dict.fromkeys(("slopes_ptr", "places_ptr"))
        return {**none, "alibi_scale": 1.0, "places_b": 0, "ROUND": 0, "DTYPE": dtype, "SCALED": False}
    places = alibi.places
    return {
        "slopes_ptr": alibi.slopes, "places_ptr": places, "alibi_scale": float(alibi.scale),
        "places_b": 0 if places is None or places.shape[0] == 1 else places.stride(0),
        "ROUND": ROUNDED[alibi.rounded], "DTYPE": dtype, "SCALED": alibi.scale != 1.0,
    }  # fmt: skip


def _launch(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int | Tensor,
    start_stride: int,
    heads: int,
    kv_heads: int,
    rope: StepRope | None,
    norm: HeadNorm | None,
    mask: Tensor | None,
    alibi: StepAlibi | None,
    options: dict[str, Any],
) -> Tensor:
    (B, cache_heads, capacity, head_dim), group = k_cache.shape, heads // kv_heads
    width = capacity if mask is None else min(capacity, mask.shape[3])
    window, cap, ring = options["window"], options["softcap"], options["ring"]
    planned = width if options["reach"] is None else options["reach"]
    # what is scanned at most: of a ring, every slot
    reach = capacity if ring else planned if window is None else min(planned, window)
    reach = min(reach, start + 1) if isinstance(start, int) else reach
    config, sms = _settings(qkv, head_dim, group, reach, options["config"])
    limits = {key: config[key] for key in ("min_split", "programs_per_sm")}
    splits = count_splits(B * kv_heads, reach, sms, **limits)

    out = torch.empty((B, heads * head_dim), dtype=qkv.dtype, device=qkv.device)
    m = z = acc = tickets = None
    if splits > 1:
        parts = torch.empty(B * heads * splits * (head_dim + 2), dtype=torch.float32, device=qkv.device)
        acc, m, z = parts.split([B * heads * splits * head_dim, B * heads * splits, B * heads * splits])
        tickets = options["tickets"]
        if tickets is None:
            tickets = torch.zeros(B * kv_heads, dtype=torch.int32, device=qkv.device)
    rope_given, rope_strides = _rope_arguments(qkv, rope)
    mask_strides = (0, 0) if mask is None else (mask.stride(0) * (mask.shape[0] > 1), mask.stride(3))
    with torch.cuda.device_of(qkv):
        step_attention_kernel[(B * kv_heads, splits)](
            qkv, k_cache, v_cache, out, m, z, acc, tickets,
            # of a ring, the mask's width: it goes by positions
            mask_ptr=mask, start=start, width=mask.shape[3] if ring and mask is not None else width,
            capacity=capacity, splits=splits, min_split=config["min_split"],
            window=2**30 if window is None else window,
            # without a cap base 2 is in the scale, with one it is in the cap
            scale=options["scale"] * LOG2E if cap is None else options["scale"] / cap,
            cap=1.0 if cap is None else cap * LOG2E,
            kv_heads=kv_heads, group=group, qkv_b=qkv.stride(0),
            k_b=k_cache.stride(0), k_h=k_cache.stride(1), k_t=k_cache.stride(2),
            v_b=v_cache.stride(0), v_h=v_cache.stride(1), v_t=v_cache.stride(2),
            cos_b=rope_strides[0], cos_t=rope_strides[1], sin_b=rope_strides[2], sin_t=rope_strides[3],
            mask_b=mask_strides[0], mask_t=mask_strides[1],
            START_STRIDE=start_stride, HEAD_DIM=head_dim, CAPPED=cap is not None, RING=ring,
            REPEAT=cache_heads // kv_heads,
            **rope_given, **_norm_arguments(norm), **_alibi_arguments(qkv, alibi),
            **_blocks(group, head_dim, qkv.element_size(), splits, reach, config), **launch_options(qkv.device),
        )  # fmt: skip
    return out
