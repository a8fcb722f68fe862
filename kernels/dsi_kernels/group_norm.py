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
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dsi_kernels._group_kernels import group_norm_held_kernel, group_norm_kernel
from dsi_kernels._group_plan import (
    Cut,
    MapMoments,
    Work,
    check_groups,
    group_norm_config,
    shown_launches,
    sums_launch,
    work_of,
)
from dsi_kernels._launch import Launch, Launches, kind_of
from dsi_kernels._pdl import SWITCH, launch_options
from dsi_kernels._triton import triton
from dsi_kernels.summed_map import summed_map_reference

# elements of a strip that one program holds in its registers, padded to powers of two, and of those that a warp does
HELD, HELD_BY_WARP = 16384, 1024
# value of the setting `hold`: such a strip is one launch
HOLD = 2
# what becomes of the sum
UNWANTED, X, WRITTEN = 0, 1, 2


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
    total = summed_map_reference(x, groups, x_bias, addend, residual)
    # in fp64, since a mean that is far from 0 costs digits
    y = F.group_norm(total.double(), groups, None, None, eps).float()
    sides = (-1, *[1] * (x.ndim - 2))
    y = y if weight is None else y * weight.float().view(sides)
    y = y if bias is None else y + bias.float().view(sides)
    y = (F.silu(y) if silu else y).to(x.dtype)
    return y.movedim(1, -1).contiguous().movedim(-1, 1), total if keep_sum else None


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
    moments: MapMoments | None = None,
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
        moments: x's own, where whoever made it took them (`summed_map`); nothing may be added then.
        config: all settings of tuned/group_norm/default.json, in the place of the tuned ones.

    Returns:
        (y, s): both as x; s None where it is not wanted, x itself where nothing was added. Inputs are not modified.

    Raises:
        ValueError: shapes, dtypes, layout or devices do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    sizes = None if config is None else tuple(config.items())
    operands = {"weight": weight, "bias": bias, "x_bias": x_bias, "addend": addend, "residual": residual}
    taken, cut = (None, None) if moments is None else (moments.parts, moments[1:])
    key = (kind_of(x, taken, *operands.values()), cut, groups, eps, silu, keep_sum, sizes, SWITCH.get())
    asked: dict[str, Any] = {"silu": silu, "keep_sum": keep_sum, "config": config, "moments": moments}
    return _LAUNCHES.get(key, lambda: _plan(x, operands, groups, eps, **asked))(x, taken, **operands)


class _Plan:
    """The launches for operands that are alike, their addresses apart.

    Args:
        total: what becomes of the sum: UNWANTED, X as nothing is added to it, or WRITTEN.
        whole: all at once; None for the others, or for a map without elements.
        sums: of `sums_launch`; None where somebody has taken the moments.
        shown: of `shown_launches`.
        parts, moments: shapes of what they hand on.
    """

    def __init__(
        self, total: int, *, whole: Launch | None = None, sums: Launch | None = None, shown: tuple[Launch, ...] = (),
        parts: tuple[int, ...] = (), moments: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        self._total, self._whole, self._sums, self._shown = total, whole, sums, shown
        self._parts, self._moments = parts, moments

    def __call__(
        self, x: Tensor, given: Tensor | None, weight: Tensor | None, bias: Tensor | None, x_bias: Tensor | None,
        addend: Tensor | None, residual: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        y = torch.empty_like(x)
        total = torch.empty_like(x) if self._total == WRITTEN else None
        if self._whole is not None:
            self._whole(x, residual, addend, x_bias, weight, bias, y, total)
        if not self._shown:
            return y, x if self._total == X else total
        parts = given
        if self._sums is not None:
            parts = torch.empty(self._parts, dtype=torch.float32, device=x.device)
            self._sums(x, residual, addend, x_bias, parts, total)
        if len(self._shown) == 2:
            moments = torch.empty(self._moments, dtype=torch.float32, device=x.device)
            self._shown[0](parts, moments)
            parts = moments
        summed = (x, residual, addend, x_bias) if total is None else (total, None, None, None)
        self._shown[-1](*summed, parts, weight, bias, y)
        return y, x if self._total == X else total


_LAUNCHES: Launches[_Plan] = Launches()


def _plan(
    x: Tensor, operands: Mapping[str, Tensor | None], groups: int, eps: float, *, silu: bool, keep_sum: bool,
    config: Mapping[str, int] | None, moments: MapMoments | None,
) -> _Plan:  # fmt: skip
    check_groups("group_norm", x, groups, **operands)
    work = work_of(x, groups, operands["x_bias"], operands["addend"], operands["residual"], eps, silu)
    _check_moments(work, groups, moments)
    total = UNWANTED if not keep_sum else WRITTEN if work.adds else X
    if not x.numel():
        return _Plan(total)
    sizes = group_norm_config(x) if config is None else config
    if moments is None and ((_held(work) and sizes["hold"] == HOLD) or sizes["launches"] == 1):
        return _Plan(total, whole=_whole(work, sizes, x.device))
    cut = Cut.of(work, sizes) if moments is None else moments.cut
    sums = sums_launch(work, cut, sizes["num_warps"], x.device) if moments is None else None
    shown = shown_launches(work, cut, sizes, x.device, adds=work.adds and total != WRITTEN)
    return _Plan(total, sums=sums, shown=shown, parts=cut.parts(work.batch), moments=(work.batch, groups, 2))


def _check_moments(work: Work, groups: int, moments: MapMoments | None) -> None:
    if moments is None:
        return
    if work.adds:
        raise ValueError("group_norm: moments are those of x; x_bias, addend and residual must be in it already")
    cut, found = moments.cut, tuple(moments.parts.shape)
    sizes = (triton.cdiv(work.rows, cut.chunk), triton.cdiv(work.channels, cut.block_c))
    if groups != moments.groups or found != cut.parts(work.batch) or sizes != (cut.chunks, cut.blocks):
        raise ValueError(f"group_norm: moments {found} of {moments.groups} groups are those of another map, or norm")


def _held(work: Work) -> bool:
    """Whether the registers of one program hold a group's strip."""
    return triton.next_power_of_2(work.rows) * triton.next_power_of_2(work.width) <= HELD


def _whole(work: Work, sizes: Mapping[str, int], device: torch.device) -> Launch:
    """Given x, residual, addend, x_bias, weight, bias, y and s."""
    held, block_c = _held(work), triton.next_power_of_2(work.width)
    block_n = triton.next_power_of_2(work.rows) if held else max(1, sizes["tile"] // block_c)
    options = launch_options(device)
    constants = (work.adds, work.silu, work.width, block_n, block_c, options.pop("PDL"))
    fixed = (work.rows, work.channels, work.stride, work.eps, *constants)
    options["num_warps"] = min(max(block_n * block_c // HELD_BY_WARP, 1), 16)
    kernel = group_norm_held_kernel if held else group_norm_kernel
    return Launch(kernel, (work.channels // work.width, work.batch), fixed, options)
