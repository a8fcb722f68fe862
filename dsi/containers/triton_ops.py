"""The operations of a whole forward through dsi_kernels, beside those of a decode step."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsi.containers.launches import IN_GRAPH, PLANS, torch_wins
from dsi.containers.linear import FusedLinear
from dsi.containers.ops import AtenOps, HeadNorms, Heads, NormOp, Rope
from dsi.containers.packing import Texts
from dsi.containers.triton_maps import TritonMapOps
from dsi.containers.triton_prompt import prompt_product
from dsi.containers.triton_step import TritonStepOps

# values of the setting `choice` of dsi_kernels.attention: its kernel, torch's backends, and that of wide heads
OWN, CUDNN, WIDE = 2, 3, 6
BACKENDS: Mapping[int, SDPBackend] = MappingProxyType(
    {CUDNN: SDPBackend.CUDNN_ATTENTION, 4: SDPBackend.FLASH_ATTENTION, 5: SDPBackend.EFFICIENT_ATTENTION}
)


class TritonOps(TritonMapOps, TritonStepOps):
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

    def project(self, linear: Any, x: Tensor) -> Tensor:
        if (config := _fused(linear, x, "")) is None:
            return super().project(linear, x)
        import dsi_kernels

        return dsi_kernels.linear_fused(x, linear.weight, linear.bias, config=config)

    def project_add(self, linear: Any, x: Tensor, residual: Tensor, following: NormOp | None = None) -> Tensor:
        if (config := _fused(linear, x, "add")) is None or not residual.is_contiguous():
            return super().project_add(linear, x, residual, following)
        import dsi_kernels

        return dsi_kernels.linear_fused(x, linear.weight, linear.bias, residual=residual, config=config)

    def project_add_(self, linear: Any, x: Tensor, residual: Tensor) -> Tensor:
        if x.dim() < 3 or _fused(linear, x, "add") is not None:
            return self.project_add(linear, x, residual)
        config = prompt_product(linear, x, "add")
        if config is None or not residual.is_contiguous():
            return super().project_add_(linear, x, residual)
        import dsi_kernels

        given = (x, linear.weight, linear.bias)
        return dsi_kernels.prompt_linear(*given, residual=residual, out=residual, config=config)

    def project_norm(self, linear: Any, x: Tensor, residual: Tensor, norm: NormOp) -> tuple[Tensor, Tensor]:
        if torch_wins(residual):
            return super().project_norm(linear, x, residual, norm)
        normed, total = self._norm_of_sum(linear, x, residual, norm, keep_sum=True)
        assert total is not None, "the sum was asked for"
        return normed, total

    def project_normed(self, linear: Any, x: Tensor, residual: Tensor, norm: NormOp) -> Tensor:
        if torch_wins(residual):
            return super().project_norm(linear, x, residual, norm)[0]
        return self._norm_of_sum(linear, x, residual, norm, keep_sum=False)[0]

    def _norm_of_sum(
        self, linear: Any, x: Tensor, residual: Tensor, norm: NormOp, *, keep_sum: bool
    ) -> tuple[Tensor, Tensor | None]:
        import dsi_kernels

        residual = residual.contiguous()
        if _known(norm) and (config := _fused(linear, x, "norm")) is not None:
            norms = (norm.kind, norm.weight, norm.bias, norm.eps)
            given = (x, linear.weight, linear.bias, residual, *norms)
            return dsi_kernels.linear_norm(*given, keep_sum=keep_sum, config=config)
        if (config := prompt_product(linear, x, "add")) is not None:
            total = dsi_kernels.prompt_linear(x, linear.weight, linear.bias, residual=residual, config=config)
            return self.norm(norm, total), total
        y = linear.forward(x)
        if norm.kind == "layer":
            return dsi_kernels.add_layer_norm(y, residual, norm.weight, norm.bias, norm.eps, keep_sum=keep_sum)
        if norm.weight is None or norm.offset:
            return self.norm(norm, total := y.add_(residual)), total
        return dsi_kernels.add_rms_norm(y, residual, norm.weight, norm.eps)

    def activate(self, linear: Any, x: Tensor, kind: str) -> Tensor:
        if torch_wins(x):
            return super().activate(linear, x, kind)
        import dsi_kernels

        if (config := _fused(linear, x, kind)) is not None:
            return dsi_kernels.linear_fused(x, linear.weight, linear.bias, kind=kind, config=config)
        if (config := prompt_product(linear, x, "activation")) is not None:
            return dsi_kernels.prompt_linear(x, linear.weight, linear.bias, kind=kind, config=config)
        return dsi_kernels.bias_activation(F.linear(x, linear.weight), linear.bias, kind)

    def gate(self, linear: Any, x: Tensor, kind: str) -> Tensor:
        if torch_wins(x):
            return super().gate(linear, x, kind)
        import dsi_kernels

        if (config := _fused(linear, x, "gate")) is not None:
            return dsi_kernels.linear_fused(x, linear.weight, linear.bias, kind=kind, gated=True, config=config)
        if (config := prompt_product(linear, x, "gate")) is not None:
            return dsi_kernels.prompt_linear(x, linear.weight, linear.bias, kind=kind, gated=True, config=config)
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

    def split_into(
        self, qkv: Tensor, shape: Heads, rope: Rope | None, norms: HeadNorms, kv: Any
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        if norms is not None or (rope is not None and rope.pairs) or torch_wins(qkv):
            return None
        import dsi_kernels

        batch, length, _ = qkv.shape
        start, k, v = kv.reserve(batch, shape, length, qkv)
        cos, sin = (None, None) if rope is None else (rope.cos, rope.sin)
        q = dsi_kernels.rope_kv_write(qkv, cos, sin, k, v, start, *shape)
        return q, *kv.visible()

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        softcap: float | None = None,
    ) -> Tensor:
        causal = causal and mask is None
        own = softcap is None and _whole(q, k, mask, causal)
        config = _attention(q, k, mask, causal) if own else {}
        backend = config.get("choice", 0)
        if backend == OWN:
            import dsi_kernels

            return dsi_kernels.attention(q, k, v, mask, causal=causal, scale=scale, config=config).flatten(2)
        if backend == WIDE and _is_wide(q, k, mask, causal):
            import dsi_kernels

            return dsi_kernels.wide_attention(q, k, v, scale).flatten(2)
        if backend not in BACKENDS or mask is not None:
            return super().attend(q, k, v, mask, causal, scale, softcap)
        # a backend that refuses what it is given leaves it to the next
        with sdpa_kernel([BACKENDS[backend], SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
            grouped = k.shape[1] != q.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(2)

    def packs(self, x: Tensor) -> bool:
        return x.is_cuda

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, packed: Texts, scale: float) -> Tensor:
        import dsi_kernels

        # [T, heads, d], views of one row a token
        q, k, v = (x.transpose(1, 2)[0] for x in (q, k, v))
        return dsi_kernels.varlen_attention(q, k, v, packed.starts, packed.longest, scale, packed.causal)[None]


class TritonLayerOps(TritonOps):
    """dsi_kernels around the attention, which is of a form that they do not know."""

    name = "triton, attention aten"

    split = AtenOps.split
    split_into = AtenOps.split_into
    append = AtenOps.append
    attend = AtenOps.attend
    decode = AtenOps.decode
    packs = AtenOps.packs
    attend_packed = AtenOps.attend_packed


def _fused(linear: Any, x: Tensor, follows: str) -> Mapping[str, int] | None:
    """The settings of our product for what follows it, None where the library's is the faster or ours is not for it."""
    # a rank's part of a layer has a class of its own; a step's rows, two dimensions, have kernels of their own
    if type(linear) is not FusedLinear or linear.form != "aten" or x.dim() < 3 or not x.is_contiguous():
        return None
    if torch_wins(x) or linear.weight.dtype is not x.dtype or not x.numel():
        return None
    from dsi_kernels.linear_fused import FUSED, linear_config

    config = linear_config(x, linear.weight, follows)
    return config if config["choice"] == FUSED else None


def _known(norm: NormOp) -> bool:
    """Whether our kernels know the norm."""
    return norm.kind == "layer" or (norm.weight is not None and not norm.offset)


def _whole(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Whether the attention is that of whole texts, in a form that a choice was measured for."""
    if q.shape[2] == 1 or (causal and q.shape[2] != k.shape[2]):
        return False
    return mask is None or (mask.dtype is torch.bool and mask.shape[1] == 1)


def _is_wide(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Whether two products and a pass between them are that attention: every head has its own keys, and sees all."""
    from dsi_kernels.wide_attention import MAX_KEYS

    return mask is None and not causal and q.shape[1] == k.shape[1] and k.shape[2] <= MAX_KEYS


def _attention(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Mapping[str, int]:
    """The settings for this attention; none where our launch would cost more than it saves."""
    from dsi_kernels.attention import attention_config

    config = attention_config(k.shape[2], q.shape[3], causal=causal, masked=mask is not None, like=q)
    # cuDNN plans anew for every length, 45 to 93 ms each (H200, torch 2.11): a graph pays that once, a prompt of any
    # length each time, for 30 us a layer (1 x 2048, 32 heads of 128: 87 us against our 117, flash's 167)
    if config["choice"] == CUDNN and not (IN_GRAPH.get() and PLANS.get()):
        config = {**config, "choice": OWN}
    return {} if config["choice"] == OWN and torch_wins(q) else config
