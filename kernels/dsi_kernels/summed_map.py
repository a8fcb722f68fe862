"""The sums before a group norm of a channels-last map, and the moments that it needs, for inference (forward only).

    s       = x + x_bias + addend + residual                                (one rounding to the input dtype)
    moments = mean and squared distances of each group of s, by chunk of the rows

Whoever adds a residual reads the whole map; the norm that comes next needs no reading of its own for its statistics
where they are taken here. One program per tile, the norm's. Reads x and residual once and writes s once: 3 * B * N *
C * itemsize bytes, memory bound.

Casting: the sum is rounded once; the moments are those of the rounded, in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsi_kernels._group_plan import Cut, MapMoments, check_groups, group_norm_config, sums_launch, work_of
from dsi_kernels._launch import Launch, Launches, kind_of
from dsi_kernels._pdl import SWITCH


def summed_map_reference(
    x: Tensor,
    groups: int,
    x_bias: Tensor | None = None,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The sum that the kernel must compute, in plain torch, whatever the groups. The tests' oracle and the CPU path."""
    if x_bias is None and addend is None and residual is None:
        return x
    terms = torch.zeros(x.shape[:2], device=x.device)
    terms = terms if x_bias is None else terms + x_bias.float()
    terms = terms if addend is None else terms + addend.float()
    wide = x.float() + terms.view(*x.shape[:2], *[1] * (x.ndim - 2))
    return (wide if residual is None else wide + residual.float()).to(x.dtype)


def summed_map(
    x: Tensor,
    groups: int,
    x_bias: Tensor | None = None,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    config: Mapping[str, int] | None = None,
) -> tuple[Tensor, MapMoments]:
    """The sum of x, x_bias, addend and residual, and what `group_norm` needs to know of it.

    Args:
        x: [B, C, ...], fp16, bf16 or fp32, a map with its channels side by side (channels-last).
        groups: that the norm will divide the channels into.
        x_bias: [C], same dtype.
        addend: [B, C], same dtype, dense along its last axis.
        residual: as x.
        config: all settings of tuned/group_norm/default.json, in the place of the tuned ones.

    Returns:
        (s, moments): s as x, x itself where nothing is added. Inputs are not modified.

    Raises:
        ValueError: shapes, dtypes, layout or devices do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    operands = {"x_bias": x_bias, "addend": addend, "residual": residual}
    sizes = None if config is None else tuple(config.items())
    key = (kind_of(x, *operands.values()), groups, sizes, SWITCH.get())
    cut, launch = _LAUNCHES.get(key, lambda: _launch(x, groups, operands, config))
    s = torch.empty_like(x) if any(t is not None for t in operands.values()) else None
    parts = torch.empty(cut.parts(x.shape[0]), dtype=torch.float32, device=x.device)
    launch(x, residual, addend, x_bias, parts, s)
    return x if s is None else s, MapMoments(parts, groups, cut)


_LAUNCHES: Launches[tuple[Cut, Launch]] = Launches()


def _launch(
    x: Tensor, groups: int, operands: Mapping[str, Tensor | None], config: Mapping[str, int] | None
) -> tuple[Cut, Launch]:
    check_groups("summed_map", x, groups, **operands)
    sizes = group_norm_config(x) if config is None else config
    work = work_of(x, groups, operands["x_bias"], operands["addend"], operands["residual"], 0.0, False)
    cut = Cut.of(work, sizes)
    return cut, sums_launch(work, cut, sizes["num_warps"], x.device)
