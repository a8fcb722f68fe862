"""The operations of a whole forward through dsi_kernels, beside those of a decode step."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dsi.containers.launches import torch_wins
from dsi.containers.ops import AtenOps, HeadNorms, Heads, NormOp, Rope
from dsi.containers.triton_step import TritonStepOps


class TritonOps(TritonStepOps):
    """dsi_kernels where one covers the operation and the host can keep up with them; the rest is torch's."""

    name = "triton"

    def norm(self, norm: NormOp, x: Tensor) -> Tensor:
        if torch_wins(x):
            return super().norm(norm, x)
        import dsi_kernels

        x = x.contiguous()
        if norm.kind == "layer":
            return dsi_kernels.layer_norm(x, norm.weight, norm.bias, norm.eps)
        if norm.weight is None or norm.offset:
            return super().norm(norm, x)
        return dsi_kernels.rms_norm(x, norm.weight, norm.eps)

    def project_norm(self, linear: Any, x: Tensor, residual: Tensor, norm: NormOp) -> tuple[Tensor, Tensor]:
        if torch_wins(residual):
            return super().project_norm(linear, x, residual, norm)
        import dsi_kernels

        y, residual = linear.forward(x), residual.contiguous()
        if norm.kind == "layer":
            return dsi_kernels.add_layer_norm(y, residual, norm.weight, norm.bias, norm.eps)
        if norm.weight is None or norm.offset:
            return self.norm(norm, total := y.add_(residual)), total
        return dsi_kernels.add_rms_norm(y, residual, norm.weight, norm.eps)

    def activate(self, linear: Any, x: Tensor, kind: str) -> Tensor:
        if torch_wins(x):
            return super().activate(linear, x, kind)
        import dsi_kernels

        return dsi_kernels.bias_activation(F.linear(x, linear.weight), linear.bias, kind)

    def gate(self, linear: Any, x: Tensor, kind: str) -> Tensor:
        if torch_wins(x):
            return super().gate(linear, x, kind)
        import dsi_kernels

        return dsi_kernels.gated_activation(linear.forward(x), kind)

    def split(
        self, qkv: Tensor, shape: Heads, rope: Rope | None, norms: HeadNorms = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        import dsi_kernels

        if rope is None or norms is not None or rope.pairs or torch_wins(qkv):
            return super().split(qkv, shape, rope, norms)
        batch, length, _ = qkv.shape
        k, v = qkv.new_empty(2, batch, shape.kv_heads, length, shape.head_dim).unbind(0)
        q = dsi_kernels.rope_kv_write(qkv, rope.cos, rope.sin, k, v, 0, *shape)
        return q, k, v


class TritonLayerOps(TritonOps):
    """dsi_kernels around the attention, which is of a form that they do not know."""

    name = "triton, attention aten"

    split = AtenOps.split
    append = AtenOps.append
    decode = AtenOps.decode
