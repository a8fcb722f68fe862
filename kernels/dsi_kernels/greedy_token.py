"""The most likely token of each row, and the state of a decode loop moved on by one, for decoding in a CUDA graph.

    chosen[b]   = argmax(logits[b]), the first of equals; pad where finished[b]
    finished[b] = finished[b] or chosen[b] in ends
    tokens[b] = chosen[b], history[b, slot] = chosen[b], positions[b] += 1, start += 1, filled += 1, slot += 1

Two kernels: one program per block of the vocabulary finds its largest logit, then one program for all rows does the
rest. Reads the logits once: B * V * itemsize bytes, launch bound. torch's argmax gives a row one block of threads:
27 us at 128256 (H200).

Everything the next step reads lies on the device, so steps chain without the host. A NaN counts as infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsi_kernels._pdl import begin, launch_options
from dsi_kernels._triton import tl, triton
from dsi_kernels.operands import check_contiguous, check_devices, check_dtypes, shapes

BLOCK_V = 2048
# the second kernel holds the figures of every block of every row at once: of more rows than FEW there are fewer blocks
FEW, MAX_ROWS = 64, 256


def greedy_token_reference(
    logits: Tensor,
    tokens: Tensor,
    history: Tensor,
    positions: Tensor,
    counters: Tensor,
    finished: Tensor | None = None,
    ends: Tensor | None = None,
    pad: Tensor | None = None,
) -> None:
    """What the kernels must do, in plain torch. The tests' oracle and the CPU path."""
    advance_state(logits.argmax(-1), tokens, history, positions, counters, finished, ends, pad)


def advance_state(
    chosen: Tensor,
    tokens: Tensor,
    history: Tensor,
    positions: Tensor,
    counters: Tensor,
    finished: Tensor | None,
    ends: Tensor | None,
    pad: Tensor | None,
) -> None:
    """The state of the loop after the choice, int64 [B], however it was made."""
    if finished is not None and ends is not None and pad is not None:
        chosen = torch.where(finished, pad, chosen)
        finished |= (chosen[:, None] == ends).any(1)
    tokens.copy_(chosen[:, None])
    history[:, int(counters[2])] = chosen
    positions += 1
    counters += 1


@triton.jit
def _largest_kernel(logits_ptr, value_ptr, index_ptr, V, blocks, BLOCK_V: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    row, block = tl.program_id(0), tl.program_id(1)
    v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(logits_ptr + row.to(tl.int64) * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
    # NaN first: it is larger than all, and compares with none
    x = tl.where(x != x, float("inf"), x)
    top = tl.max(x, axis=0)
    first = tl.min(tl.where((x == top) & (v < V), v, V), axis=0)
    tl.store(value_ptr + row * blocks + block, top)
    tl.store(index_ptr + row * blocks + block, first)


@triton.jit
def _advance_kernel(
    value_ptr, index_ptr, tokens_ptr, history_ptr, positions_ptr, counters_ptr, finished_ptr, ends_ptr, pad_ptr,
    seen_ptr, rows, blocks, V, history_b, count, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    b, p = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_P)
    inside = (b < rows)[:, None] & (p < blocks)[None, :]
    at = b[:, None] * blocks + p[None, :]
    value = tl.load(value_ptr + at, mask=inside, other=float("-inf"))
    index = tl.load(index_ptr + at, mask=inside, other=V)
    top = tl.max(value, axis=1)
    chosen = tl.min(tl.where((value == top[:, None]) & inside, index, V), axis=1).to(tl.int64)
    # what a kernel that was not launched left (`ahead`) is no address
    chosen = tl.minimum(tl.maximum(chosen, 0), V - 1)
    if seen_ptr is not None:
        tl.store(seen_ptr + b.to(tl.int64) * V + chosen, tl.cast(1, tl.int8), mask=b < rows)
    if finished_ptr is not None:
        done = tl.load(finished_ptr + b, mask=b < rows, other=0) != 0
        chosen = tl.where(done, tl.load(pad_ptr), chosen)
        e = tl.arange(0, BLOCK_E)
        ends = tl.load(ends_ptr + e, mask=e < count, other=-1)
        hit = tl.max((chosen[:, None] == ends[None, :]).to(tl.int32), axis=1) != 0
        tl.store(finished_ptr + b, (done | hit).to(tl.int8), mask=b < rows)
    slot = tl.load(counters_ptr + 2)
    tl.store(tokens_ptr + b, chosen, mask=b < rows)
    tl.store(history_ptr + b.to(tl.int64) * history_b + slot, chosen, mask=b < rows)
    tl.store(positions_ptr + b, tl.load(positions_ptr + b, mask=b < rows, other=0) + 1, mask=b < rows)
    c = tl.arange(0, 4)
    tl.store(counters_ptr + c, tl.load(counters_ptr + c, mask=c < 3, other=0) + 1, mask=c < 3)


def check_state(op: str, logits: Tensor, tokens: Tensor, history: Tensor, positions: Tensor, counters: Tensor) -> None:
    """Raises ValueError, in the name of `op`, where a decode loop's state does not fit the logits."""
    if logits.ndim != 2 or not 1 <= logits.shape[0] <= MAX_ROWS or not logits.shape[1]:
        raise ValueError(f"{op}: {shapes(logits=logits)} must be [1 to {MAX_ROWS}, V]")
    rows = logits.shape[0]
    if tokens.shape != (rows, 1) or positions.shape != (rows, 1) or history.ndim != 2 or history.shape[0] != rows:
        raise ValueError(
            f"{op}: {shapes(tokens=tokens, positions=positions, history=history)} must be [{rows}, 1] twice "
            f"and [{rows}, T]"
        )
    if counters.shape != (3,):
        raise ValueError(f"{op}: counters have shape {tuple(counters.shape)}; (3,) is needed")
    for name, t in (("tokens", tokens), ("history", history), ("positions", positions), ("counters", counters)):
        if t.dtype != torch.int64:
            raise ValueError(f"{op}: {name} is {t.dtype}; int64 is needed")


def greedy_token(
    logits: Tensor,
    tokens: Tensor,
    history: Tensor,
    positions: Tensor,
    counters: Tensor,
    finished: Tensor | None = None,
    ends: Tensor | None = None,
    pad: Tensor | None = None,
) -> None:
    """Choose each row's next token and move the loop's state on; everything but the logits is written in place.

    Args:
        logits: [B, V], B up to 256, fp16, bf16 or fp32, contiguous.
        tokens: int64 [B, 1], gets the chosen tokens.
        history: int64 [B, T], gets them at column counters[2], which must be below T.
        positions: int64 [B, 1], one is added.
        counters: int64 [3], one is added to each: start, filled, slot.
        finished: bool [B], rows that have ended, or None where none ever does; with it come
        ends: int64 [E], the tokens that end a row, and
        pad: int64 [], what a row that has ended gets.

    Raises:
        ValueError: shapes, dtypes, layout or devices do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    check_state("greedy_token", logits, tokens, history, positions, counters)
    if finished is not None and (ends is None or pad is None or finished.shape != (logits.shape[0],)):
        raise ValueError(f"greedy_token: finished [{logits.shape[0]}] comes with ends and pad")
    check_dtypes("greedy_token", logits=logits)
    state = {"tokens": tokens, "history": history, "positions": positions, "counters": counters}
    check_contiguous("greedy_token", logits=logits, **state)
    check_devices("greedy_token", logits=logits, **state, finished=finished, ends=ends, pad=pad)

    rows, V = logits.shape
    block = BLOCK_V if rows <= FEW else 4 * BLOCK_V
    blocks = triton.cdiv(V, block)
    value = torch.empty((rows, blocks), dtype=torch.float32, device=logits.device)
    index = torch.empty((rows, blocks), dtype=torch.int32, device=logits.device)
    count = 0 if ends is None else ends.numel()
    options = launch_options(logits.device)
    with torch.cuda.device_of(logits):
        _largest_kernel[(rows, blocks)](logits, value, index, V, blocks, BLOCK_V=block, num_warps=4, **options)
        _advance_kernel[(1,)](
            value, index, tokens, history, positions, counters,
            None if finished is None else finished.view(torch.int8), ends, pad, None, rows, blocks, V,
            history.stride(0), count, BLOCK_B=triton.next_power_of_2(rows), BLOCK_P=triton.next_power_of_2(blocks),
            BLOCK_E=triton.next_power_of_2(max(count, 1)), num_warps=4, **options,
        )  # fmt: skip
