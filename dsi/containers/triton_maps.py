"""The operations on channels-last maps through dsi_kernels: group norms, and what convolutions leave to others."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dsi.containers.launches import torch_wins
from dsi.containers.ops import AtenOps, NormOp


class TritonMapOps(AtenOps):
    """A convolution is cuDNN's, without its bias: torch adds that in a pass of its own, which is here the next one."""

    def group_norm(self, norm: NormOp, x: Tensor, *, silu: bool = False) -> Tensor:
        if not _takes(x, norm.weight) or torch_wins(x):
            return super().group_norm(norm, x, silu=silu)
        import dsi_kernels

        return dsi_kernels.group_norm(x, norm.weight, norm.bias, norm.groups, norm.eps, silu=silu)[0]

    def conv(self, conv: Any, x: Tensor) -> Tensor:
        if conv.bias is None or torch_wins(x):
            return super().conv(conv, x)
        y: Tensor = conv.forward(x, bias=False)
        if not _takes(y, conv.bias):
            return y.add_(conv.bias[:, None, None])
        import dsi_kernels

        return dsi_kernels.add_map(y, conv.bias, out=y)

    def conv_norm(self, conv: Any, x: Tensor, norm: NormOp, addend: Tensor | None, *, silu: bool) -> Tensor:
        if torch_wins(x) or not _takes(x, norm.weight) or not (addend is None or addend.dtype is x.dtype):
            return super().conv_norm(conv, x, norm, addend, silu=silu)
        import dsi_kernels

        y = conv.forward(x, bias=False)
        terms = {"x_bias": conv.bias, "addend": None if addend is None else addend.expand(y.shape[0], -1)}
        return dsi_kernels.group_norm(y, norm.weight, norm.bias, norm.groups, norm.eps, **terms, silu=silu)[0]

    def conv_add(self, conv: Any, x: Tensor, residual: Tensor, divisor: float = 1.0) -> Tensor:
        if torch_wins(x) or not _takes(residual, conv.weight):
            return super().conv_add(conv, x, residual, divisor)
        import dsi_kernels

        y = conv.forward(x, bias=False)
        return dsi_kernels.add_map(y, conv.bias, residual, divisor, out=y)

    def geglu(self, linear: Any, x: Tensor) -> Tensor:
        if torch_wins(x):
            return super().geglu(linear, x)
        import dsi_kernels

        return dsi_kernels.geglu(linear.forward(x))


def _takes(x: Tensor, parameter: Tensor | None) -> bool:
    """Whether our kernels know such a map: channels side by side, and parameters of its dtype."""
    if not x.is_floating_point() or x.element_size() > 4 or (parameter is not None and parameter.dtype is not x.dtype):
        return False
    return x.movedim(1, -1).is_contiguous()
