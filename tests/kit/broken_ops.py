"""Containers whose operations are broken, each in one way."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsi.containers import DecoderLayer, EncoderLayer
from dsi.containers.activations import ACTIVATIONS
from dsi.containers.ops import AtenOps, NormOp
from tests.kit.subjects import WINDOW


def broken(table: type[AtenOps], base: type[DecoderLayer] | type[EncoderLayer] = DecoderLayer) -> Any:
    """The container that computes with a table of operations, under the table's name."""
    ops = table()
    return type(table.__name__, (base,), {"ops": property(lambda self: ops), "__module__": __name__})


def broken_encoder(table: type[AtenOps]) -> Any:
    """As `broken`, of an encoder layer."""
    return broken(table, EncoderLayer)


# --- attention --------------------------------------------------------------------------------------------------------


@broken
class KvGroupOffByOne(AtenOps):
    def attend(self, q, k, v, *rest, **named):
        return super().attend(q, k.roll(1, 1), v.roll(1, 1), *rest, **named)


@broken
class OneKvHeadForAll(AtenOps):
    def attend(self, q, k, v, *rest, **named):
        return super().attend(q, k[:, :1].expand_as(k), v, *rest, **named)


@broken
class HeadsInterleavedOverGroups(AtenOps):
    """Query head h reads kv head h % kv_heads, not h // group."""

    def attend(self, q, k, v, *rest, **named):
        group = q.shape[1] // k.shape[1]
        return super().attend(q, k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1), *rest, **named)


@broken
class ScaledTwice(AtenOps):
    def attend(self, q, k, v, mask, causal, scale, *rest, **named):
        return super().attend(q, k, v, mask, causal, scale * scale, *rest, **named)


@broken
class NotScaled(AtenOps):
    def attend(self, q, k, v, mask, causal, scale, *rest, **named):
        return super().attend(q, k, v, mask, causal, 1.0, *rest, **named)


@broken
class NotCausal(AtenOps):
    def attend(self, q, k, v, mask, causal, *rest, **named):
        return super().attend(q, k, v, mask, False, *rest, **named)


@broken
class LonePromptLost(AtenOps):
    """A text of one token attends to nothing."""

    def attend(self, q, k, v, *rest, **named):
        result = super().attend(q, k, v, *rest, **named)
        return torch.zeros_like(result) if q.shape[2] == k.shape[2] == 1 else result


@broken
class RowsMixed(AtenOps):
    """From five rows on, each gets its neighbour's."""

    def attend(self, q, k, v, *rest, **named):
        result = super().attend(q, k, v, *rest, **named)
        return result.roll(1, 0) if q.shape[0] == 5 else result


@broken
class ChunkIsAPrompt(AtenOps):
    """Several queries over a filled cache are taken for the first ones."""

    def attend(self, q, k, v, mask, causal, *rest, **named):
        if 1 < q.shape[2] < k.shape[2]:
            mask, causal = None, True
        return super().attend(q, k, v, mask, causal, *rest, **named)


# --- masks ------------------------------------------------------------------------------------------------------------


@broken
class MaskIgnored(AtenOps):
    def attend(self, q, k, v, mask, *rest, **named):
        return super().attend(q, k, v, None, *rest, **named)


@broken_encoder
class EncoderMaskIgnored(AtenOps):
    def attend(self, q, k, v, mask, *rest, **named):
        return super().attend(q, k, v, None, *rest, **named)


@broken
class MaskInverted(AtenOps):
    def attend(self, q, k, v, mask, *rest, **named):
        return super().attend(q, k, v, None if mask is None else ~mask, *rest, **named)


@broken
class MaskOfFirstRow(AtenOps):
    def attend(self, q, k, v, mask, *rest, **named):
        return super().attend(q, k, v, None if mask is None else mask[:1].expand_as(mask), *rest, **named)


def _of_one_row(mask: Tensor | None) -> bool:
    return mask is not None and mask.shape[0] == 1 and mask.dtype is torch.bool and mask.shape[2] == mask.shape[3]


@broken
class LeftMaskOfOneRowLost(AtenOps):
    def attend(self, q, k, v, mask, *rest, **named):
        lost = _of_one_row(mask) and not mask[0, 0, -1, 0]
        return super().attend(q, k, v, None if lost else mask, *rest, **named)


@broken
class RightMaskOfOneRowLost(AtenOps):
    def attend(self, q, k, v, mask, *rest, **named):
        lost = _of_one_row(mask) and not mask[0, 0, -1, -1]
        return super().attend(q, k, v, None if lost else mask, *rest, **named)


@broken
class HoleIgnored(AtenOps):
    """What is masked between two tokens counts."""

    def attend(self, q, k, v, mask, *rest, **named):
        if mask is not None and mask.dtype is torch.bool:
            before = mask.long().cumsum(-1) > 0
            after = mask.long().flip(-1).cumsum(-1).flip(-1) > 0
            mask = before & after
        return super().attend(q, k, v, mask, *rest, **named)


@broken
class NaNWithoutTokens(AtenOps):
    """0 / 0 in a row that has no token at all."""

    def attend(self, q, k, v, mask, *rest, **named):
        result = super().attend(q, k, v, mask, *rest, **named)
        if mask is not None and mask.dtype is torch.bool:
            empty = ~mask.any(-1).any(-1).any(-1)
            result = result.masked_fill(empty[:, None, None], float("nan"))
        return result


@broken
class WindowIgnored(AtenOps):
    """Every query sees all keys before it."""

    def attend(self, q, k, v, mask, *rest, **named):
        # shorter texts have no window, and are masked for their padding
        if mask is not None and mask.dtype is torch.bool and k.shape[2] > WINDOW:
            mask = torch.ones_like(mask).tril(k.shape[2] - q.shape[2])
        return super().attend(q, k, v, mask, *rest, **named)


# --- positions --------------------------------------------------------------------------------------------------------


@broken
class RopeOffByOne(AtenOps):
    """Queries are turned as the position before theirs."""

    def split(self, qkv, shape, rope, norms=None):
        q, k, v = super().split(qkv, shape, rope, norms)
        if rope is not None and qkv.shape[1] > 1:
            turned = type(rope)(*(terms.roll(1, 1) for terms in rope))
            q = super().split(qkv, shape, turned, norms)[0]
        return q, k, v


@broken
class ValuesTurned(AtenOps):
    """Values are rotated too."""

    def split(self, qkv, shape, rope, norms=None):
        q, k, v = super().split(qkv, shape, rope, norms)
        return q, k, self._turned(v, rope)

    def _turned(self, v, rope):
        return v * rope.cos.unsqueeze(1) + v.roll(v.shape[-1] // 2, -1) * rope.signed.unsqueeze(1)


@broken
class KeysNotTurned(AtenOps):
    def split(self, qkv, shape, rope, norms=None):
        q, _, v = super().split(qkv, shape, rope, norms)
        return q, super().split(qkv, shape, None, norms)[1], v


# --- norms and activations --------------------------------------------------------------------------------------------


def _with_eps(norm: NormOp, eps: float) -> NormOp:
    return NormOp(norm.kind, norm.weight, norm.bias, eps, norm.offset)


@broken
class WrongEps(AtenOps):
    def norm(self, norm, x):
        return super().norm(_with_eps(norm, 1e-5), x)


@broken
class EpsOutsideTheRoot(AtenOps):
    def norm(self, norm, x):
        return x / (x.square().mean(-1, keepdim=True).sqrt() + norm.eps) * norm.weight


@broken
class NormWeightLost(AtenOps):
    def norm(self, norm, x):
        return super().norm(norm, x) / norm.weight


@broken_encoder
class MeanNotRemoved(AtenOps):
    """An RMS norm where a layer norm stands."""

    def norm(self, norm, x):
        return x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight + norm.bias


@broken_encoder
class NormBiasLost(AtenOps):
    def norm(self, norm, x):
        return F.layer_norm(x, x.shape[-1:], norm.weight, None, norm.eps)


@broken_encoder
class UnbiasedVariance(AtenOps):
    """Divides by n - 1."""

    def norm(self, norm, x):
        size = x.shape[-1]
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().sum(-1, keepdim=True) / (size - 1)
        return centred * (variance + norm.eps).rsqrt() * norm.weight + norm.bias


@broken
class GateSwapped(AtenOps):
    """The activation is over the other half."""

    def gate(self, linear, x, kind):
        gate, up = linear.forward(x).chunk(2, dim=-1)
        return ACTIVATIONS[kind](up).mul_(gate)


@broken
class GateNotActivated(AtenOps):
    def gate(self, linear, x, kind):
        gate, up = linear.forward(x).chunk(2, dim=-1)
        return gate * up


# --- rounding ---------------------------------------------------------------------------------------------------------


def _coarse(x: Tensor, bits: int) -> Tensor:
    """x without the last bits of its mantissa."""
    return ((x.view(torch.int16) >> bits) << bits).view(x.dtype)


@broken
class RoughInBf16(AtenOps):
    """The MLP's products lose three bits in bf16."""

    def gate(self, linear, x, kind):
        result = super().gate(linear, x, kind)
        return _coarse(result, 3) if x.dtype is torch.bfloat16 else result


@broken
class RoughInFp16(AtenOps):
    """The MLP's products lose three bits in fp16."""

    def gate(self, linear, x, kind):
        result = super().gate(linear, x, kind)
        return _coarse(result, 3) if x.dtype is torch.float16 else result
