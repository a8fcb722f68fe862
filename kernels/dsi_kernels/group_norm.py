"""GroupNorm of a channels-last map, with the sums before it and the SiLU behind it, for inference (forward only).

    s = x + x_bias + addend + residual                                      (one rounding to the input dtype)
    y = silu((s - mean) * rsqrt(var + eps) * weight + bias)                 (silu where asked for)

with mean and variance over all pixels of a group's channels. Channels are side by side, so a group is a narrow strip of
a tall matrix [pixels, channels], and one program a group would keep few multiprocessors busy. Three ways:

    1 launch     one program per batch row and group, that reads its strip twice, or once where it fits the registers
    2 launches   chunks of pixels times blocks of channels leave a mean and a sum of squares for each group that they
                 have part of; whoever applies them merges the chunks first
    3 launches   the same with the chunks merged once, by programs of their own: many chunks

Squares are taken in fp32 of distances from each channel's first pixel in a chunk, and merged by Chan's formula: a mean
that is far from 0 costs the digits that it costs x itself, where a sum of squares would lose all of them. The second
reading begins with the rows that were read last, which the L2 cache still has. Moves 3 * B * N * C * itemsize bytes, 2
where the cache or the registers hold the map, memory bound. No atomics: same input, same output.

Casting: the sum is rounded once, and normalised as rounded; statistics, scale and SiLU are in fp32, rounded once.

Source: Wu & He 2018, https://arxiv.org/abs/1803.08494; Chan, Golub & LeVeque 1983, The American Statistician 37 (3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dsi_kernels._group_kernels import (
    group_apply_kernel,
    group_merge_kernel,
    group_moments_kernel,
    group_norm_held_kernel,
    group_norm_kernel,
)
from dsi_kernels._launch import Launch, Launches, kind_of
from dsi_kernels._pdl import SWITCH, launch_options
from dsi_kernels._triton import triton
from dsi_kernels.add_map import channel_block, check_map
from dsi_kernels.operands import check_devices, check_dtypes, check_rows_contiguous, shapes
from dsi_kernels.tuned import device_facts, launch_config

# elements of a strip that one program holds in its registers, padded to powers of two, and of those that a warp does
HELD, HELD_BY_WARP = 16384, 1024
# value of the setting `hold`: such a strip is one launch
HOLD = 2
# what becomes of the sum
UNWANTED, X, WRITTEN = 0, 1, 2
# parts that a program merges at a time, and the most that one of two launches does
MERGED, MERGED_AT_MOST = 4096, 4096


def group_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float = 1e-5,
    x_bias: Tensor | None = None,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    silu: bool = False,
    keep_sum: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What the kernel must compute, in plain torch. The tests' oracle and the CPU path."""
    total = x
    if not (x_bias is None and addend is None and residual is None):
        terms = torch.zeros(x.shape[:2], device=x.device)
        terms = terms if x_bias is None else terms + x_bias.float()
        terms = terms if addend is None else terms + addend.float()
        wide = x.float() + terms.view(*x.shape[:2], *[1] * (x.ndim - 2))
        total = (wide if residual is None else wide + residual.float()).to(x.dtype)
    # in fp64, since a mean that is far from 0 costs digits
    y = F.group_norm(total.double(), groups, None, None, eps).float()
    sides = (-1, *[1] * (x.ndim - 2))
    y = y if weight is None else y * weight.float().view(sides)
    y = y if bias is None else y + bias.float().view(sides)
    y = (F.silu(y) if silu else y).to(x.dtype)
    return y.movedim(1, -1).contiguous().movedim(-1, 1), total if keep_sum else None


def group_norm_config(x: Tensor) -> Mapping[str, int]:
    """The tuned settings for a map.

    launches: 1, 2 or 3, where two become three with too much to merge; hold: HOLD to make it one launch where a group's
    strip fits the registers; block_c: channels of a block, at most; tile, tiles: elements that are read at a time for
    the sums, and how many such tiles a program takes; shown: elements that a program applies them to; num_warps.
    """
    size = max(x.nbytes, 1)
    shape = f"megabytes={1 << max(0, (size - 1).bit_length() - 20)}"
    return launch_config("group_norm", shape, device_facts(x.device)[0])


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float = 1e-5,
    x_bias: Tensor | None = None,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    silu: bool = False,
    keep_sum: bool = False,
    config: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The normalised sum of x, x_bias, addend and residual, and the sum.

    Args:
        x: [B, C, ...], fp16, bf16 or fp32, a map with its channels side by side (channels-last).
        weight, bias: [C], same dtype; None leaves out the multiply, the add.
        groups: that the channels divide into.
        eps: added to the variance; the square of x's unit.
        x_bias: [C], same dtype: the bias of the convolution before, which it left to this op.
        addend: [B, C], same dtype, dense along its last axis: a time embedding's share of each channel.
        residual: as x.
        silu: y is taken through it.
        keep_sum: the sum is wanted too.
        config: all settings of tuned/group_norm/default.json, in the place of the tuned ones.

    Returns:
        (y, s): both as x; s None where it is not wanted, x itself where nothing was added. Inputs are not modified.

    Raises:
        ValueError: shapes, dtypes, layout or devices do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    sizes = None if config is None else tuple(config.items())
    operands = {"weight": weight, "bias": bias, "x_bias": x_bias, "addend": addend, "residual": residual}
    key = (kind_of(x, *operands.values()), groups, eps, silu, keep_sum, sizes, SWITCH.get())
    plan = _LAUNCHES.get(key, lambda: _plan(x, operands, groups, eps, silu=silu, keep_sum=keep_sum, config=config))
    return plan(x, **operands)


class _Map(NamedTuple):
    """What is computed: the sizes of a map, and what is done to it."""

    batch: int
    rows: int
    channels: int
    width: int
    eps: float
    adds: bool
    silu: bool
    # of the addend, by batch row
    stride: int

    def held(self) -> bool:
        """Whether the registers of one program hold a group's strip."""
        return triton.next_power_of_2(self.rows) * triton.next_power_of_2(self.width) <= HELD

    def whole(self, sizes: Mapping[str, int], device: torch.device) -> Launch:
        """Given x, residual, addend, x_bias, weight, bias, y and s."""
        block_c = triton.next_power_of_2(self.width)
        block_n = triton.next_power_of_2(self.rows) if self.held() else max(1, sizes["tile"] // block_c)
        options = launch_options(device)
        constants = (self.adds, self.silu, self.width, block_n, block_c, options.pop("PDL"))
        fixed = (self.rows, self.channels, self.stride, self.eps, *constants)
        options["num_warps"] = min(max(block_n * block_c // HELD_BY_WARP, 1), 16)
        kernel = group_norm_held_kernel if self.held() else group_norm_kernel
        return Launch(kernel, (self.channels // self.width, self.batch), fixed, options)


class _Plan:
    """The launches for operands that are alike, their addresses apart.

    Args:
        launches: of one launch, or of the sums' parts, maybe of their merging, and of y.
        parts, moments: shapes of what they hand on.
        total: what becomes of the sum: UNWANTED, X as nothing is added to it, or WRITTEN.
    """

    def __init__(
        self, launches: tuple[Launch, ...], total: int, parts: tuple[int, ...] = (), moments: tuple[int, ...] = ()
    ) -> None:
        self._launches, self._total, self._parts, self._moments = launches, total, parts, moments

    def __call__(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, x_bias: Tensor | None, addend: Tensor | None,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        y = torch.empty_like(x)
        total = torch.empty_like(x) if self._total == WRITTEN else None
        if len(self._launches) == 1:
            self._launches[0](x, residual, addend, x_bias, weight, bias, y, total)
        elif self._launches:
            parts = torch.empty(self._parts, dtype=torch.float32, device=x.device)
            self._launches[0](x, residual, addend, x_bias, parts, total)
            if len(self._launches) == 3:
                moments = torch.empty(self._moments, dtype=torch.float32, device=x.device)
                self._launches[1](parts, moments)
                parts = moments
            given = (x, residual, addend, x_bias) if total is None else (total, None, None, None)
            self._launches[-1](*given, parts, weight, bias, y)
        return y, x if self._total == X else total


_LAUNCHES: Launches[_Plan] = Launches()


def _check(x: Tensor, groups: int, **operands: Tensor | None) -> None:
    if x.ndim < 3 or not x.shape[1:].numel() or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"group_norm: x {tuple(x.shape)} must be [B, C, pixels ...], its C in {groups} groups")
    wanted = dict.fromkeys(operands, x.shape[1:2]) | {"addend": x.shape[:2], "residual": x.shape}
    for name, t in operands.items():
        if t is not None and t.shape != wanted[name]:
            raise ValueError(f"group_norm: {shapes(x=x, **{name: t})}; {tuple(wanted[name])} is needed")
    check_dtypes("group_norm", x=x, **operands)
    check_rows_contiguous("group_norm", **{name: t for name, t in operands.items() if name != "residual"})
    check_map("group_norm", x=x, residual=operands["residual"])
    check_devices("group_norm", x=x, **operands)


def _plan(
    x: Tensor, operands: Mapping[str, Tensor | None], groups: int, eps: float, *, silu: bool, keep_sum: bool,
    config: Mapping[str, int] | None,
) -> _Plan:  # fmt: skip
    _check(x, groups, **operands)
    added = [operands[name] for name in ("x_bias", "addend", "residual")]
    adds = any(t is not None for t in added)
    total = UNWANTED if not keep_sum else WRITTEN if adds else X
    if not x.numel():
        return _Plan((), total)
    B, C = x.shape[:2]
    sizes = group_norm_config(x) if config is None else config
    stride = 0 if added[1] is None else added[1].stride(0)
    work = _Map(B, x.shape[2:].numel(), C, C // groups, float(eps), adds, silu, stride)
    if (work.held() and sizes["hold"] == HOLD) or sizes["launches"] == 1:
        return _Plan((work.whole(sizes, x.device),), total)
    return _chunked(work, sizes, total, x.device)


def _chunked(work: _Map, sizes: Mapping[str, int], total: int, device: torch.device) -> _Plan:
    """The plan of two launches or three."""
    B, N, C, width = work[:4]
    block_c = channel_block(C, sizes["block_c"])
    block_n, blocks, step = sizes["tile"] // block_c, triton.cdiv(C, block_c), sizes["shown"] // block_c
    chunk = sizes["tiles"] * block_n
    chunks = triton.cdiv(N, chunk)
    # groups that a block may have channels of, and blocks that a group may
    places = max(block_c // width, 1) if block_c % width == 0 or width % block_c == 0 else (block_c - 2) // width + 2
    span = 1 if block_c % width == 0 else (width - 2) // block_c + 2
    places, span = triton.next_power_of_2(places), triton.next_power_of_2(span)
    merges = sizes["launches"] == 2 and chunks * places * span <= MERGED_AT_MOST
    block_k = max(1, min(triton.next_power_of_2(chunks), MERGED // (span * (places if merges else 1))))
    options = launch_options(device) | {"num_warps": sizes["num_warps"]}
    pdl, sides = options.pop("PDL"), (width, places, span, block_k)

    first = (N, C, work.stride, chunk, work.adds, width, places, block_n, block_c, pdl)
    launches = [Launch(group_moments_kernel, (chunks, blocks, B), first, options)]
    if not merges:
        second = (N, C, chunk, chunks, work.eps, *sides, block_c, pdl)
        launches.append(Launch(group_merge_kernel, (C // width, B), second, options))
    adds = work.adds and total != WRITTEN
    last = (N, C, work.stride, chunk, chunks, work.eps, adds, work.silu, merges, *sides, step, block_c, pdl)
    launches.append(Launch(group_apply_kernel, (triton.cdiv(N, step), blocks, B), last, options))
    return _Plan(tuple(launches), total, (B, chunks, blocks, places, 2), (B, C // width, 2))
