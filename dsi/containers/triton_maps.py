"""The operations on channels-last maps through dsi_kernels: group norms, and what convolutions leave to others."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dsi.containers.launches import torch_wins
from dsi.containers.ops import AtenOps, NormOp

# the attribute of a map that its moments are left at, with the count of changes that they were taken at
LEFT = "dsi_moments"


class TritonMapOps(AtenOps):
    """A convolution is cuDNN's, without its bias: torch adds that in a pass of its own, which is here the next one."""

    def group_norm(self, norm: NormOp, x: Tensor, *, silu: bool = False) -> Tensor:
        if not _takes(x, norm.weight) or torch_wins(x):
            return super().group_norm(norm, x, silu=silu)
        import dsi_kernels

        moments = _moments(x, norm.groups)
        given = (x, norm.weight, norm.bias, norm.groups, norm.eps)
        return dsi_kernels.group_norm(*given, silu=silu, moments=moments)[0]

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

    def conv_add(
        self, conv: Any, x: Tensor, residual: Tensor, divisor: float = 1.0, *, shortcut: Any = None, groups: int = 0
    ) -> Tensor:
        if torch_wins(x) or not _takes(residual, conv.weight):
            return super().conv_add(conv, x, residual, divisor, shortcut=shortcut, groups=groups)
        import dsi_kernels

        y, bias = conv.forward(x, bias=False), None
        if shortcut is not None:
            residual, bias = shortcut.forward(residual, bias=False), shortcut.bias
        # what is changed without a count of its changes may be no longer what the moments are of
        if divisor == 1.0 and groups and y.shape[1] % groups == 0 and not y.is_inference():
            bias = None if bias is None else bias.expand(y.shape[0], -1)
            total, moments = dsi_kernels.summed_map(y, groups, conv.bias, bias, residual)
            setattr(total, LEFT, (moments, total._version))
            return total
        if bias is not None:
            residual = dsi_kernels.add_map(residual, bias, out=residual)
        return dsi_kernels.add_map(y, conv.bias, residual, divisor, out=y)

    def upsample_conv(self, conv: Any, x: Tensor, size: Any = None) -> Tensor:
        if size is not None or torch_wins(x) or not _takes(x, None):
            return super().upsample_conv(conv, x, size)
        import dsi_kernels

        return self.conv(conv, dsi_kernels.upsample_map(x))

    def geglu(self, linear: Any, x: Tensor) -> Tensor:
        if torch_wins(x):
            return super().geglu(linear, x)
        import dsi_kernels

        return dsi_kernels.geglu(linear.forward(x))


def _moments(x: Tensor, groups: int) -> Any:
    """What whoever made the map has left to its norm; None where that is of other groups, or the map was changed."""
    moments, version = getattr(x, LEFT, (None, 0))
    return moments if moments is not None and moments.groups == groups and x._version == version else None


def _takes(x: Tensor, parameter: Tensor | None) -> bool:
    """Whether our kernels know such a map: channels side by side, and parameters of its dtype."""
    if not x.is_floating_point() or x.element_size() > 4 or (parameter is not None and parameter.dtype is not x.dtype):
        return False
    return x.movedim(1, -1).is_contiguous()
