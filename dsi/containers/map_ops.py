"""The operations of layers of maps, [B, C, H, W] with channels last, as torch has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsi.containers.conv import FusedConv

if TYPE_CHECKING:
    from dsi.containers.ops import NormOp


class AtenMapOps:
    """The part of `AtenOps` that maps are computed with."""

    def group_norm(self, norm: NormOp, x: Tensor, *, silu: bool = False) -> Tensor:
        """The norm over groups of channels, through SiLU where asked for."""
        y = F.group_norm(x, norm.groups, norm.weight, norm.bias, norm.eps)
        return F.silu(y, inplace=True) if silu else y

    def conv(self, conv: FusedConv, x: Tensor) -> Tensor:
        """conv(x)."""
        return conv.forward(x)

    def conv_norm(self, conv: FusedConv, x: Tensor, norm: NormOp, addend: Tensor | None, *, silu: bool) -> Tensor:
        """silu(norm(conv(x) + addend)), the addend [B, channels of conv(x)] the same for every pixel."""
        y = conv.forward(x)
        if addend is not None:
            y.add_(addend[:, :, None, None])
        return self.group_norm(norm, y, silu=silu)

    def conv_add(
        self, conv: FusedConv, x: Tensor, residual: Tensor, divisor: float = 1.0, *,
        shortcut: FusedConv | None = None, groups: int = 0,
    ) -> Tensor:  # fmt: skip
        """(conv(x) + residual) / divisor, or shortcut(residual) in the residual's place.

        groups: what the norm of the sum will divide its channels into, as far as anybody knows; 0 for nobody.
        """
        total = conv.add(x, residual if shortcut is None else self.conv(shortcut, residual))
        return total if divisor == 1.0 else total.div_(divisor)

    def upsample_conv(self, conv: FusedConv, x: Tensor, size: Any = None) -> Tensor:
        """conv of x with every pixel repeated to twice its sides, or to a size given, (height, width)."""
        sizes = {"scale_factor": 2.0} if size is None else {"size": size}
        return self.conv(conv, F.interpolate(x, mode="nearest", **sizes))

    def downsample_conv(self, conv: FusedConv, x: Tensor, *, pads: bool) -> Tensor:
        """conv of x, with a row and a column of zeros at its ends where asked for."""
        if pads:
            x = F.pad(x, (0, 1, 0, 1)).contiguous(memory_format=torch.channels_last)
        return self.conv(conv, x)

    def geglu(self, linear: Any, x: Tensor) -> Tensor:
        """value * gelu(gate), with value | gate = linear(x)."""
        value, gate = linear.forward(x).chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)
