"""The operations between the linear layers, as torch has them. They run anywhere, and are what CPU uses.

`dsi.containers.tables` says which table of operations a device gets, `triton_ops` and `triton_step` replace what our
kernels cover. A table has no state, so a container holds one by name and survives pickling and device moves.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsi.containers.activations import ACTIVATIONS
from dsi.containers.linear import FusedLinear, has_bf16
from dsi.containers.map_ops import AtenMapOps
from dsi.containers.unlisted import Unlisted

if TYPE_CHECKING:
    from dsi.containers.packing import Texts


class Rope(NamedTuple):
    """Rotary embedding of the positions at hand.

    cos, sin: [1 or B, S, rotary_dim]; signed: sin, negative where the first of two dimensions stands that turn
    together, so that `rotate_half(x) * sin == roll(x, rotary_dim / 2) * signed`; pairs: dimensions 2i and 2i + 1 turn
    together, not i and i + rotary_dim / 2; at: int64 [B, 1], positions to be taken from terms of all positions,
    [1, N, rotary_dim], which a kernel does itself.
    """

    cos: Tensor
    sin: Tensor
    signed: Tensor
    pairs: bool = False
    at: Tensor | None = None

    def taken(self) -> Rope:
        """The terms of the positions at hand, whoever would have taken them."""
        at = self.at
        return self if at is None else Rope(self.cos[0][at], self.sin[0][at], self.signed[0][at], self.pairs)

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor, pairs: bool = False) -> Rope:
        if pairs:
            return cls(cos, sin, torch.stack((-sin[..., ::2], sin[..., 1::2]), dim=-1).flatten(-2), True)
        half = sin.shape[-1] // 2
        return cls(cos, sin, torch.cat((-sin[..., :half], sin[..., half:]), dim=-1))

    @classmethod
    def from_rows(cls, rows: Tensor, pairs: bool) -> Rope:
        """Terms of table rows [1 or B, S, rotary_dim]: the sines of all pairs of dimensions, then their cosines."""
        sin, cos = rows.chunk(2, dim=-1)
        if pairs:
            return cls.of(cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1), True)
        return cls.of(torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1))


class Heads(NamedTuple):
    """How the rows of a fused q|k|v projection divide: numbers of query heads and kv heads, and the head size."""

    heads: int
    kv_heads: int
    head_dim: int


class Biased(NamedTuple):
    """The mask of a step whose scores are biased by slope * place of the key: a kernel computes the biases itself.

    mask: bool [1 or B, 1, 1, T], True = attend, or None; slopes: float32 [heads]; places: int64 [B, T], or None where a
    key's place is its position; rounded: the dtype that slopes, places and products are rounded to, None for float32;
    scale: multiplies the biases once they have the dtype of the scores.
    """

    mask: Tensor | None
    slopes: Tensor
    places: Tensor | None
    rounded: torch.dtype | None
    scale: float

    def additive(self, dtype: torch.dtype, length: int) -> Tensor:
        """The first `length` keys' biases, [1 or B, heads, 1, length], and the dtype's minimum where one is masked."""
        places = self.places
        places = torch.arange(length, device=self.slopes.device)[None] if places is None else places[:, :length]
        slopes = self.slopes if self.rounded is None else self.slopes.to(self.rounded)
        bias = (slopes.view(1, -1, 1, 1) * places[:, None, None]).to(dtype)
        bias = bias * self.scale if self.scale != 1.0 else bias
        return bias if self.mask is None else bias.masked_fill(~self.mask[..., :length], torch.finfo(dtype).min)


class NormOp(Unlisted):
    """A normalization that shares its parameters with the stock module it stands for.

    Args:
        kind: "layer", "rms" or "group".
        weight, bias: the stock module's own parameters, or None.
        eps: added to the variance or mean square.
        offset: added to the weight; see `dsi.policy.Norm`.
        groups: of "group", that the channels divide into.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        kind: str,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
        eps: float,
        offset: float = 0.0,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.kind, self.eps, self.offset, self.groups = kind, eps, offset, groups
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)

    def extra_repr(self) -> str:
        return f"{self.kind}, eps={self.eps}"


HeadNorms = tuple[NormOp, NormOp] | None
"""The norms of the query heads and of the key heads, over head_dim."""


def rotate(x: Tensor, rope: Rope, heads_at: int = 2) -> Tensor:
    """Rotary embedding of x; dimensions past rotary_dim pass through.

    Args:
        x: [B, S, heads, head_dim], or [B, heads, S, head_dim].
        rope: of its positions.
        heads_at: which dimension the heads are, 2 or 1.
    """
    cos, signed = rope.cos, rope.signed
    # terms of one row without a dimension for the heads broadcast as they are where the heads come first
    if heads_at == 2 or cos.shape[0] > 1:
        cos, signed = cos.unsqueeze(heads_at), signed.unsqueeze(heads_at)
    width = cos.shape[-1]
    turned = x if width == x.shape[-1] else x[..., :width]
    other = _swapped(turned) if rope.pairs else turned.roll(width // 2, -1)
    turned = torch.addcmul(turned * cos, other, signed)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)


def _swapped(x: Tensor) -> Tensor:
    """x with its dimensions 2i and 2i + 1 exchanged."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def with_bias(mask: Tensor | None, bias: Tensor, length: int, *, causal: bool) -> Tensor:
    """One additive mask of a mask and a bias.

    Args:
        mask: None, or bool (True = attend) or additive, [B, 1 or heads, S, T].
        bias: [B, heads, 1, T].
        length: S.
        causal: what a missing mask means.

    Returns:
        [B, heads, 1 or S, T], in the dtype of `bias`.
    """
    if mask is None and causal and length > 1:
        mask = torch.ones(length, bias.shape[-1], dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else bias + mask


def _adds_in_place(linear: Any, x: Tensor, residual: Tensor) -> bool:
    """Whether a library's product adds itself to the residual, and is all that there is to do."""
    # a rank's part of a layer has a class, and a sum, of its own
    if type(linear) is not FusedLinear or linear.form != "aten" or linear.bias is not None:
        return False
    alike = x.dtype is residual.dtype is linear.weight.dtype
    return alike and x.dim() > 2 and x.is_contiguous() and residual.is_contiguous()


def _one_row(x: Tensor) -> bool:
    """A single fp32 row in host memory: its mean square is cheaper as a python float (10 us against 17 on a Zen 3)."""
    return x.dtype is torch.float32 and x.numel() == x.shape[-1] and x.device.type == "cpu" and x.is_contiguous()


class AtenOps(AtenMapOps):
    """Torch's own operations."""

    name = "aten"

    def norm(self, norm: NormOp, x: Tensor) -> Tensor:
        """Normalize the last axis of x [..., H]."""
        # past torch's attribute look-up, which is slow
        own = norm._parameters
        weight = own["weight"]
        if norm.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], weight, own["bias"], norm.eps)
        if _one_row(x) and weight is not None and norm.eps > 0 and not norm.offset:
            flat = x.view(-1)
            return (x * (float(flat.dot(flat)) / x.shape[-1] + norm.eps) ** -0.5).mul_(weight)
        if x.is_cuda and weight is not None and weight.dtype is x.dtype:
            # one launch, and no rounding before the product with the weight
            if norm.offset:
                return F.rms_norm(x.float(), x.shape[-1:], weight.float() + norm.offset, norm.eps).to(x.dtype)
            return F.rms_norm(x, x.shape[-1:], weight, norm.eps)
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().mul_(1.0 / x.shape[-1])
        normed = wide * scale.add_(norm.eps).rsqrt_()
        if weight is None:
            return normed.to(x.dtype)
        if norm.offset:
            return normed.mul_(weight.float() + norm.offset).to(x.dtype)
        # a weight of another dtype promotes, as it does in the model
        return normed.to(x.dtype).mul_(weight) if weight.dtype is x.dtype else normed.to(x.dtype) * weight

    def project_norm(self, linear: Any, x: Tensor, residual: Tensor, norm: NormOp) -> tuple[Tensor, Tensor]:
        """(norm(s), s) with s = linear(x) + residual."""
        total = linear.add(x, residual)
        return self.norm(norm, total), total

    def project_normed(self, linear: Any, x: Tensor, residual: Tensor, norm: NormOp) -> Tensor:
        """norm(linear(x) + residual), whose sum nobody needs."""
        return self.project_norm(linear, x, residual, norm)[0]

    def norm_project(self, norm: NormOp, linear: Any, x: Tensor) -> Tensor:
        """linear(norm(x)), x [B, K]."""
        return linear.forward(self.norm(norm, x))

    def norm_product(self, norm: NormOp, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """norm(x) @ weight^T + bias, x [B, K]."""
        return F.linear(self.norm(norm, x), weight, bias)

    def norm_expand(self, norm: NormOp, linear: Any, x: Tensor, kind: str, gated: bool) -> Tensor:
        """activation(linear(norm(x))), or with a gate as in `gate`; x [B, K]."""
        normed = self.norm(norm, x)
        return self.gate(linear, normed, kind) if gated else self.activate(linear, normed, kind)

    # --- linear layers ----------------------------------------------------------------------------------------

    def project(self, linear: Any, x: Tensor) -> Tensor:
        """linear(x)."""
        product: Tensor = linear.forward(x)
        return product

    def project_add(self, linear: Any, x: Tensor, residual: Tensor, following: NormOp | None = None) -> Tensor:
        """linear(x) + residual; `following` is the norm that is taken over it next, which may be taken with it."""
        return linear.add(x, residual)

    def project_add_(self, linear: Any, x: Tensor, residual: Tensor) -> Tensor:
        """As `project_add`; the sum may take the residual's place."""
        if not _adds_in_place(linear, x, residual):
            return self.project_add(linear, x, residual)
        rows = residual.view(-1, linear.out_features)
        rows.addmm_(x.view(-1, linear.in_features), linear._parameters["weight"].t())
        return residual

    def activate(self, linear: Any, x: Tensor, kind: str) -> Tensor:
        """activation(linear(x))."""
        return linear.activate(x, kind)

    def gate(self, linear: Any, x: Tensor, kind: str) -> Tensor:
        """activation(gate) * up, with gate | up = linear(x)."""
        gate, up = linear.forward(x).chunk(2, dim=-1)
        return ACTIVATIONS[kind](gate).mul_(up)

    def split(
        self, qkv: Tensor, shape: Heads, rope: Rope | None, norms: HeadNorms = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, heads, S, head_dim], k and v [B, kv_heads, S, head_dim] from qkv [B, S, rows].

        q and k are normalized over head_dim where `norms` are given, then rotated.
        """
        batch, length, _ = qkv.shape
        split = qkv.view(batch, length, -1, shape.head_dim)
        turning = shape.heads + shape.kv_heads
        qk = split[:, :, :turning]
        if norms is not None:
            q_norm, k_norm = norms
            qk = torch.cat((self.norm(q_norm, qk[:, :, : shape.heads]), self.norm(k_norm, qk[:, :, shape.heads :])), 2)
        if rope is not None:
            qk = rotate(qk, rope)
        q, k, v = qk[:, :, : shape.heads], qk[:, :, shape.heads :], split[:, :, turning:]
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def split_into(
        self, qkv: Tensor, shape: Heads, rope: Rope | None, norms: HeadNorms, kv: Any
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """As `split`, with k and v written to the preallocated cache layer at once; of them all that it holds.

        None, and nothing written, where that takes the way over `split` and the cache's `update`.
        """
        return None

    def append(
        self, qkv: Tensor, shape: Heads, rope: Rope | None, kv: Any, norms: HeadNorms = None, repeat: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `split` for one position a row, qkv [B, rows], with k and v written to the preallocated cache layer.

        The cache gets every kv head `repeat` times. Returns q [B, heads, 1, head_dim], and all keys and values.
        """
        # of one position, [B, heads, 1, head_dim] is a view
        heads = qkv.view(qkv.shape[0], -1, 1, shape.head_dim)
        turning = shape.heads + shape.kv_heads
        qk, v = heads.narrow(1, 0, turning), heads.narrow(1, turning, shape.kv_heads)
        if norms is not None:
            q_norm, k_norm = norms
            q, k = qk.split((shape.heads, shape.kv_heads), dim=1)
            qk = torch.cat((self.norm(q_norm, q), self.norm(k_norm, k)), 1)
        if rope is not None:
            qk = rotate(qk, rope, heads_at=1)
        q, k = qk.split((shape.heads, shape.kv_heads), dim=1)
        if repeat > 1:
            k, v = repeat_heads(k, repeat), repeat_heads(v, repeat)
        return q, *kv.append(k, v)

    def step_attention(
        self,
        qkv: Tensor,
        shape: Heads,
        rope: Rope | None,
        kv: Any,
        mask: Tensor | Biased | None,
        scale: float,
        softcap: float | None = None,
        norms: HeadNorms = None,
        repeat: int = 1,
        window: int | None = None,
    ) -> Tensor:
        """`append` and `decode`: the attention of one new position a row, [B, heads * head_dim].

        The cache layer knows the window itself, but for a graph's, which shows whole buffers.
        """
        q, k, v = self.append(qkv, shape, rope, kv, norms, repeat)
        seen = mask.additive(q.dtype, k.shape[2]) if isinstance(mask, Biased) else mask
        if window is not None and kv.filled is not None:
            recent = (torch.arange(k.shape[2], device=k.device) >= kv.filled - window).view(1, 1, 1, -1)
            seen = recent if seen is None else seen & recent
        return self.decode(q, k, v, seen, scale, softcap, kv.filled)

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
        """Attention; q [B, heads, S, d], k and v [B, kv_heads, T, d]; returns [B, S, heads * d].

        With `softcap` c the scores s become c * tanh(s / c) before the mask.
        """
        batch, heads, length, width = q.shape
        kv_heads = k.shape[1]
        if softcap is not None:
            return _capped(q, k, v, mask, causal, scale, softcap)
        if q.device.type == "cpu" and q.dtype.itemsize == 2 and length == 1 and heads == kv_heads:
            # torch's 16-bit attention of one query is slower than fp32's with the conversion (2-core Zen 5, bf16, 12
            # heads of 64: 30 us against 20 us at 48 positions, 528 us against 155 us at 1000)
            wide = (mask.float() if mask is not None and mask.is_floating_point() else mask, causal, scale)
            return self.attend(q.float(), k.float(), v.float(), *wide).to(q.dtype)
        if mask is None and not causal and length in OPEN_LENGTHS and _opens(q, k):
            return _open(q, k, v, scale)
        if heads != kv_heads:
            if length == 1:
                # the queries of a group take the place of positions: no copy of k and v
                grouped = q.reshape(batch, kv_heads, heads // kv_heads, width)
                if mask is not None and mask.shape[1] > 1:
                    mask = mask.reshape(mask.shape[0], kv_heads, heads // kv_heads, -1)
                out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
                return out.reshape(batch, 1, heads * width)
            k, v = repeat_heads(k, heads // kv_heads), repeat_heads(v, heads // kv_heads)
        is_causal = causal and mask is None and length > 1
        qkv = _widened(q, k, v)
        out = F.scaled_dot_product_attention(*qkv, attn_mask=mask, is_causal=is_causal, scale=scale)[..., :width]
        if mask is not None and mask.dtype is torch.float16 and length > 1:
            out = _even(out, mask, v)
        return out.transpose(1, 2).reshape(batch, length, heads * width)

    def packs(self, x: Tensor) -> bool:
        """Whether `attend_packed` runs where x is."""
        return x.device.type == "cpu"

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, packed: Texts, scale: float) -> Tensor:
        """Attention of every token to those of its own text; q [1, heads, T, d], k and v [1, kv_heads, T, d].

        Returns [1, T, heads * d].
        """
        starts = packed.bounds()
        # rows beyond the last text belong to none
        spans = [*itertools.pairwise(starts), (starts[-1], q.shape[2])]
        parts = [
            self.attend(q[:, :, one:end], k[:, :, one:end], v[:, :, one:end], None, packed.causal, scale)
            for one, end in spans
            if end > one
        ]
        return torch.cat(parts, dim=1)

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float | None = None,
        filled: Tensor | None = None,
    ) -> Tensor:
        """Attention of one new position a row.

        q is [B, heads, 1, d], k and v are [B, kv_heads, T, d], of T the first `filled` (int64 [], on the device) where
        that is given; returns [B, heads * d].
        """
        if filled is not None:
            live = (torch.arange(k.shape[2], device=k.device) < filled)[None, None, None]
            if mask is not None and mask.dtype is not torch.bool:
                mask = mask.masked_fill(~live, float("-inf"))
            else:
                mask = live if mask is None else live & mask
        return self.attend(q, k, v, mask, False, scale, softcap).view(q.shape[0], -1)


def _even(out: Tensor, mask: Tensor, v: Tensor) -> Tensor:
    """Attention, with rows that an additive fp16 mask shuts out wholly made the mean of all values.

    That is what they are in other dtypes, whose least number swallows every score that is added to it; fp16's does not.
    """
    shut = mask.amax(-1, keepdim=True) < torch.finfo(torch.float16).min / 2
    return torch.where(shut, v.mean(2, keepdim=True), out)


# positions at which bf16 attention without a mask is the faster in the open than as torch's one operation: 350 us
# against 405 us at 12 heads of 64 and 128 positions, as much at 64, and three times as slow at 160 (2-core Zen 5)
OPEN_LENGTHS = range(96, 129)


# a head size below which torch's CPU attention is faster over heads that are filled up with zeros, and the positions
# from which: 12.3 ms against 8.9 ms at 2 x 8 heads of 4 and 1024 positions, fp32 (2-core Zen 5)
NARROW, WIDENED_FROM = 16, 256


def _widened(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads filled up with zeros where attention is faster over those."""
    missing = NARROW - q.shape[3]
    if missing <= 0 or q.device.type != "cpu" or q.shape[2] < WIDENED_FROM:
        return q, k, v
    return F.pad(q, (0, missing)), F.pad(k, (0, missing)), F.pad(v, (0, missing))


def _opens(q: Tensor, k: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype is torch.bfloat16 and k.shape == q.shape and has_bf16()


def _open(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention with scores and softmax in fp32 and the weights rounded to v's dtype."""
    batch, heads, length, width = q.shape
    scores = torch.matmul(q.float().mul_(scale), k.float().transpose(-1, -2))
    # each row is read before it is written
    weights = torch.softmax(scores, dim=-1, out=scores).to(v.dtype)
    return torch.matmul(weights, v).transpose(1, 2).reshape(batch, length, heads * width)


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float) -> Tensor:
    """Attention with capped scores, in the open; a row that may attend to nothing gives 0."""
    batch, heads, length, width = q.shape
    group = heads // k.shape[1]
    k, v = (repeat_heads(k, group), repeat_heads(v, group)) if group > 1 else (k, v)
    scores = (q @ k.transpose(-1, -2) * scale / softcap).tanh() * softcap
    if mask is None and causal and length > 1:
        mask = torch.ones(length, k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).nan_to_num(0.0).to(q.dtype)
    return (weights @ v).transpose(1, 2).reshape(batch, length, heads * width)


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """Every head of x [B, heads, S, d] that many times in a row."""
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, times, length, width).reshape(batch, heads * times, length, width)
