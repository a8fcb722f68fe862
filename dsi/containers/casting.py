"""Casts that can be taken back bit for bit.

Casting fp32 to fp16 or bf16 loses at most 16 bits a weight, so the difference of the two bit patterns, taken as
integers, fits int16 for nearly every weight; the few that do not (subnormals, overflow, NaN, exact ties) are kept
whole. So an injection with a cast
stays undoable until its last step without a second copy of the weights: cast plus residue take the bytes of the
    original.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
# elements that are compared at a time
PIECE = 1 << 18
_LOSSLESS = {
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float64),
    (torch.bfloat16, torch.float64),
    (torch.float32, torch.float64),
}


def is_lossless(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether every value of `source` survives a cast to `target` and back."""
    return source == target or (source, target) in _LOSSLESS


@attrs.frozen(eq=False, kw_only=True)
class Residue:
    """What a cast lost.

    Args:
        dtype: of the original.
        delta: int16 in the original's shape, original bits minus the bits of the cast value; None for a lossless cast.
        index, bits: flat int64 positions whose delta does not fit, and their original bit patterns; for a lossless cast
            those of
            the NaNs, whose payload a cast may change.
    """

    dtype: torch.dtype
    delta: Tensor | None = None
    index: Tensor | None = None
    bits: Tensor | None = None

    def join(self, cast: Tensor) -> Tensor:
        """The original tensor, bit for bit, from its cast value (any shape with as many elements, same order)."""
        back = cast.to(self.dtype)
        if self.delta is None and self.index is None:
            return back
        # of another dtype than `cast`, so this is memory of its own
        pattern = back.contiguous().view(_BITS[self.dtype])
        if self.delta is not None:
            pattern.view(-1).add_(self.delta.to(pattern.device).view(-1))
        if self.index is not None and self.bits is not None:
            pattern.view(-1)[self.index.to(pattern.device)] = self.bits.to(pattern.device)
        return pattern.view(self.dtype)

    def to_host(self) -> Residue:
        """The same residue in host memory."""
        return attrs.evolve(
            self, **{name: t.cpu() for name in ("delta", "index", "bits") if (t := getattr(self, name)) is not None}
        )


def cast_with_residue(original: Tensor, dtype: torch.dtype) -> tuple[Tensor, Residue]:
    """Cast, and keep what the cast loses.

    Args:
        original: any floating tensor.
        dtype: the floating dtype wanted.

    Returns:
        (cast, residue) with `residue.join(cast)` equal to `original` bit for bit.
    """
    cast = original.to(dtype)
    if original.dtype == dtype:
        return cast, Residue(dtype=dtype)
    kind, delta = _BITS[original.dtype], None
    bits = original.contiguous().view(kind).view(-1)
    if is_lossless(original.dtype, dtype):
        index = original.isnan().reshape(-1).nonzero().view(-1)
    else:
        delta, index = _difference(bits, cast.contiguous().view(-1), original.dtype)
        delta = delta.view(original.shape)
    if not index.numel():
        return cast, Residue(dtype=original.dtype, delta=delta)
    return cast, Residue(dtype=original.dtype, delta=delta, index=index, bits=bits[index])


def _difference(bits: Tensor, cast: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a cast lost, piece by piece, so that nothing wide of the tensor's size is ever alive.

    Args:
        bits: the original's patterns, flat.
        cast: the cast values, flat.
        dtype: of the original.

    Returns:
        (int16 differences, int64 positions where they do not fit)
    """
    delta = torch.empty(bits.shape, dtype=torch.int16, device=bits.device)
    misfits = []
    wide = torch.int64 if bits.dtype is torch.int64 else torch.int32
    for start in range(0, bits.numel(), PIECE):
        piece = slice(start, start + PIECE)
        # wrap-around subtraction: a difference out of range lands in the exceptions, and addition wraps back
        exact = bits[piece].to(wide) - cast[piece].to(dtype).view(bits.dtype).to(wide)
        delta[piece] = exact
        misfits.append((delta[piece] != exact).nonzero().view(-1) + start)
    return delta, torch.cat(misfits) if misfits else bits.new_empty(0, dtype=torch.int64)
