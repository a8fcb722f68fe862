"""What the host must know of a call's ids and mask, in one word, and the ids made safe to look up.

    safe[i]  = min(max(ids[i], 0), vocab - 1)
    number  += 1
    word     = number mod 2**22 << 40 | visible << 2 | hidden << 1 | bad

with visible, how many mask entries are not 0; hidden, whether any row's first entry is 0; bad, whether any id is
outside of 0..vocab - 1. One program reads everything once, launch bound: 12,288 ids take a few microseconds.

The word is one aligned store of 8 bytes and may lie in pinned host memory: the host sees all of it or none, and knows
by the number whose call it tells of.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsi_kernels._triton import tl, triton
from dsi_kernels.operands import check_contiguous, check_devices, shapes

# of the word: bits of the number, and where the number and the count begin
NUMBER_BITS = 22
NUMBER_AT = 40
COUNT_AT = 2
BLOCK = 2048


def input_flags_reference(
    ids: Tensor | None, safe: Tensor | None, mask: Tensor | None, number: Tensor, word: Tensor, vocab: int
) -> None:
    """What the kernel must do, in plain torch. The tests' oracle and the CPU path."""
    bad = visible = hidden = 0
    if ids is not None and safe is not None:
        safe.copy_(ids.clamp(0, vocab - 1))
        bad = int((safe != ids).any())
    if mask is not None:
        visible = int((mask != 0).sum())
        hidden = int((mask[:, 0] == 0).any())
    number += 1
    word.copy_((number % 2**NUMBER_BITS << NUMBER_AT) + (visible << COUNT_AT) + (hidden << 1) + bad)


@triton.jit
def _input_flags_kernel(
    ids_ptr, safe_ptr, mask_ptr, number_ptr, word_ptr, count, spots, length, vocab,
    NUMBER_BITS: tl.constexpr, NUMBER_AT: tl.constexpr, COUNT_AT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    bad = tl.zeros((BLOCK,), dtype=tl.int32)
    if ids_ptr is not None:
        for start in range(0, count, BLOCK):
            inside = start + at < count
            ids = tl.load(ids_ptr + start + at, mask=inside, other=0)
            safe = tl.minimum(tl.maximum(ids, 0), vocab - 1)
            tl.store(safe_ptr + start + at, safe.to(safe_ptr.dtype.element_ty), mask=inside)
            bad |= ((safe != ids) & inside).to(tl.int32)
    visible = tl.zeros((BLOCK,), dtype=tl.int32)
    hidden = tl.zeros((BLOCK,), dtype=tl.int32)
    if mask_ptr is not None:
        for start in range(0, spots, BLOCK):
            inside = start + at < spots
            shown = tl.load(mask_ptr + start + at, mask=inside, other=0) != 0
            visible += (shown & inside).to(tl.int32)
            hidden |= (inside & (shown == 0) & ((start + at) % length == 0)).to(tl.int32)
    number = tl.load(number_ptr) + 1
    tl.store(number_ptr, number)
    word = (number & ((1 << NUMBER_BITS) - 1)) << NUMBER_AT
    word += tl.sum(visible, axis=0).to(tl.int64) << COUNT_AT
    word += (tl.max(hidden, axis=0) * 2 + tl.max(bad, axis=0)).to(tl.int64)
    tl.store(word_ptr, word)


def input_flags(
    ids: Tensor | None, safe: Tensor | None, mask: Tensor | None, number: Tensor, word: Tensor, vocab: int
) -> None:
    """Write what the host must know of a call; see the module for the word.

    Args:
        ids: int64 or int32, any shape, contiguous, or None.
        safe: gets the ids, each moved into 0..vocab - 1; as ids.
        mask: [B, S], bool, int or float, contiguous, or None; 0 hides.
        number: int64 [1], one is added.
        word: int64 [1], on the device or in pinned host memory.
        vocab: ids must be below.

    Raises:
        ValueError: shapes, dtypes, layout or devices do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    if (ids is None) != (safe is None) or (ids is not None and safe is not None and ids.shape != safe.shape):
        raise ValueError(f"input_flags: {shapes(ids=ids, safe=safe)} must be of one shape")
    if mask is not None and (mask.ndim != 2 or not mask.numel()):
        raise ValueError(f"input_flags: {shapes(mask=mask)} must be [B, S]")
    for name, t in (("ids", ids), ("safe", safe)):
        if t is not None and t.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_flags: {name} is {t.dtype}; int64 or int32 is needed")
    for name, t in (("number", number), ("word", word)):
        if t.dtype != torch.int64 or t.numel() != 1:
            raise ValueError(f"input_flags: {name} is {t.dtype} of {t.numel()}; one int64 is needed")
    given = {name: t for name, t in (("ids", ids), ("safe", safe), ("mask", mask)) if t is not None}
    check_contiguous("input_flags", **given, number=number, word=word)
    check_devices("input_flags", number=number, **given)

    if mask is not None and mask.dtype is torch.bool:
        mask = mask.view(torch.int8)
    with torch.cuda.device_of(number):
        _input_flags_kernel[(1,)](
            ids, safe, mask, number, word, 0 if ids is None else ids.numel(), 0 if mask is None else mask.numel(),
            1 if mask is None else mask.shape[1], vocab, NUMBER_BITS=NUMBER_BITS, NUMBER_AT=NUMBER_AT,
            COUNT_AT=COUNT_AT, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
