"""The launch settings of a decode step's attention, found by measuring it in its place on this device.

What it takes in a step is not what it takes alone: it begins while the projection before it ends, and the one after it
begins while it ends. So it is measured between two products, as many layers as hold a ring of caches that no L2 does,
in one CUDA graph; what counts is the median of that graph less the one without attention. A candidate whose result is
not the reference's, or not the same at every launch, is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from dsi.containers.launches import graph_kernels
from dsi.containers.triton_products import product_of
from dsi.tuning import TOLERANCE, Found, Settings, graph_time, require_device

if TYPE_CHECKING:
    from dsi.plans import Plan

# what is attended to in a cache of so many positions
FILLED: Mapping[int, int] = {256: 200, 1024: 1000, 8192: 8000, 32768: 32000}
ROWS = (1, 8, 32)
RING_BYTES, MOST_LAYERS = 320 << 20, 16
# of one layer's cache: beyond it there is nothing to learn that a smaller one does not tell
MOST_BYTES = 6 << 30
# (warps, bytes of a tile) for one query head to a KV head, and for several
ONE_HEAD = (
    (1, 4096), (1, 8192), (2, 4096), (2, 8192), (2, 16384), (4, 8192), (4, 16384), (4, 32768), (8, 32768), (8, 65536),
)  # fmt: skip
SOME_HEADS = (
    (1, 4096), (1, 8192), (2, 4096), (2, 8192), (2, 16384), (4, 8192), (4, 16384), (4, 32768), (8, 16384), (8, 32768),
    (8, 65536),
)  # fmt: skip
# rows * positions that the reference is computed for, scores and values in fp32
MOST_CHECKED = 1 << 16


@attrs.frozen(kw_only=True)
class Heads:
    """The heads of a model's attention."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


def heads_of(plan: Plan) -> tuple[Heads, ...]:
    """The heads of a model's decoder layers, each kind once."""
    names = ("heads", "kv_heads", "head_dim")
    facts = [block.fit.facts for block in plan.blocks]
    return tuple(dict.fromkeys(Heads(**{name: one[name] for name in names}) for one in facts if set(names) <= set(one)))


def candidates(heads: Heads, itemsize: int, rows: int, reach: int) -> Iterator[Settings]:
    """Tiles and warps, and how a context of up to `reach` positions is split among programs.

    A program begins the sooner beside what still runs the smaller it is: most have one or two warps.
    """
    token = max(16, 1 << (heads.head_dim - 1).bit_length()) * itemsize
    for warps, tile in ONE_HEAD if heads.group == 1 else SOME_HEADS:
        one = {"tile_bytes": tile, "num_warps": warps, "stages": 2, "ahead": 1}
        tokens = tile // token
        if not 16 <= tokens <= min(reach, 256):
            continue
        if reach > 256:
            yield from _spread(one, tokens)
            continue
        yield one | {"min_split": tokens, "programs_per_sm": 4}
        if rows > 1 and tile <= 16384:
            yield from _whole(one, tokens, reach)


def _whole(one: Settings, tokens: int, reach: int) -> Iterator[Settings]:
    """A context in one program or two, as rows fill the device; its tiles asked for at once, or as they come."""
    whole = one | {"min_split": reach, "programs_per_sm": 4}
    yield whole
    yield whole | {"stages": 3, "ahead": reach // tokens}
    if one["tile_bytes"] <= 8192:
        yield whole | {"stages": 4, "ahead": reach // tokens}
        yield whole | {"stages": 3, "ahead": max(2, reach // tokens // 2), "min_split": reach // 2}


def _spread(one: Settings, tokens: int) -> Iterator[Settings]:
    """Over programs that have 64 KiB of tiles or more on a multiprocessor, in one go or two."""
    programs = (32 << 10) // one["tile_bytes"]
    if programs:
        split = one | {"min_split": max(64, tokens), "programs_per_sm": programs}
        yield split
        yield split | {"ahead": 4}
        yield split | {"programs_per_sm": max(1, programs // 2), "stages": 3, "ahead": 4}


class Layers:
    """A few layers of [projection, attention, projection] whose caches are all filled to one place."""

    def __init__(self, heads: Heads, rows: int, reach: int, dtype: torch.dtype) -> None:
        self.heads = heads
        self.config: Settings | None = None
        options: dict[str, Any] = {"device": "cuda", "dtype": dtype}
        count, kv_heads, size = heads.heads, heads.kv_heads, heads.head_dim
        hidden, wide = count * size, (count + 2 * kv_heads) * size
        cache = 2 * rows * kv_heads * reach * size * dtype.itemsize
        self.count = max(2, min(MOST_LAYERS, RING_BYTES // cache))
        self.weights = [
            (torch.randn(wide, hidden, **options) / hidden**0.5, torch.randn(hidden, hidden, **options) / hidden**0.5)
            for _ in range(self.count)
        ]
        self.caches = [torch.randn(2, rows, kv_heads, reach, size, **options) for _ in range(self.count)]
        self.x, self.attended = torch.randn(2, rows, hidden, **options)
        at = torch.full((rows, 1), FILLED[reach], device="cuda")
        self.at, self.start, self.table = at, at[0, 0].clone(), torch.randn(2, 1, reach, size, **options)
        self.tickets = torch.zeros(rows * kv_heads, dtype=torch.int32, device="cuda")
        self.bytes = cache * FILLED[reach] // reach

    def attend(self, qkv: Tensor, index: int, **more: Any) -> Tensor:
        """Of one layer."""
        import dsi_kernels
        from dsi_kernels.step_attention import StepRope

        k, v = self.caches[index]
        rope = StepRope(self.table[0], self.table[1], False, self.at)
        return dsi_kernels.step_attention(
            qkv, k, v, self.start, self.heads.heads, self.heads.kv_heads, rope=rope, tickets=self.tickets,
            config=self.config, **more,
        )  # fmt: skip

    def reference(self, qkv: Tensor) -> Tensor:
        """Of the first layer; its cache is written."""
        import dsi_kernels
        from dsi_kernels.step_attention import StepRope

        k, v = self.caches[0]
        rope = StepRope(self.table[0], self.table[1], False, self.at)
        return dsi_kernels.step_attention_reference(
            qkv, k, v, self.start, self.heads.heads, self.heads.kv_heads, rope=rope
        )

    def layer(self, index: int) -> Tensor:
        """One layer as a step has it."""
        first, second = self.weights[index]
        return _product(self.attend(_product(self.x, first), index), second)

    def bare(self, index: int) -> Tensor:
        """The same without attention."""
        first, second = self.weights[index]
        _product(self.x, first)
        return _product(self.attended, second)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """As a step takes it: beside a kernel that begins early attention costs less than between two of cuBLAS's."""
    with graph_kernels():
        product = product_of(x, weight)
    return torch.nn.functional.linear(x, weight) if product is None else product(x, weight)


def tune_attention(heads: Heads, rows: int, reach: int, dtype: torch.dtype) -> Found | None:
    """The best settings for heads, rows and a cache of `reach` positions; None where no candidate runs.

    Raises:
        DsiError: there is no CUDA device.
    """
    require_device()
    from dsi_kernels import compile_ahead
    from dsi_kernels._pdl import dependent_launches
    from dsi_kernels.step_attention import settings_key

    layers, timed = Layers(heads, rows, reach, dtype), []
    qkv = _product(layers.x, layers.weights[0][0])
    wanted = layers.reference(qkv).float() if rows * FILLED[reach] <= MOST_CHECKED else None
    every = list(candidates(heads, dtype.itemsize, rows, reach))
    with dependent_launches(True):
        compile_ahead(lambda: [_attempt(layers, qkv, one) for one in every], qkv.device)
        before = graph_time(layers.bare, layers.count)
        for one in every:
            if _right(layers, qkv, one, wanted):
                timed.append((graph_time(layers.layer, layers.count), one))
        bare = (before + graph_time(layers.bare, layers.count)) / 2
    if not timed:
        return None
    took, best = min(timed, key=lambda pair: pair[0])
    key = settings_key(heads.head_dim, heads.group, dtype.itemsize, rows, reach)
    return Found(op="step_attention", shape=key, settings=best, time=took - bare)


def _attempt(layers: Layers, qkv: Tensor, config: Settings) -> Tensor | None:
    """The first layer's attention, or None where the device has no room for the candidate."""
    from triton.runtime.errors import OutOfResources

    layers.config = config
    try:
        return layers.attend(qkv, 0)
    except OutOfResources:
        return None


def _right(layers: Layers, qkv: Tensor, config: Settings, wanted: Tensor | None) -> bool:
    """Whether a candidate runs, computes what it should and the same every time; it is the layers' from here on."""
    found = _attempt(layers, qkv, config)
    if found is None or not all(torch.equal(found, layers.attend(qkv, 0)) for _ in range(10)):
        return False
    return wanted is None or bool((found.float() - wanted).norm() / wanted.norm() < TOLERANCE)


def tune_attentions(
    every: tuple[Heads, ...],
    rows: tuple[int, ...],
    dtype: torch.dtype,
    *,
    reaches: tuple[int, ...] = tuple(FILLED),
    budget: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Found]:
    """What `tune_attention` finds for all heads, rows and reaches, in the order of the reaches.

    Args:
        rows: measured are those of `ROWS` that settings for so many are kept under, each once.
        budget: seconds after which no other case is begun; None for no end.
    """
    started = clock()
    kept = dict.fromkeys(next((one for one in ROWS if count <= one), ROWS[-1]) for count in rows)
    for reach in reaches:
        for heads in every:
            for count in kept:
                cache = 2 * count * heads.kv_heads * reach * heads.head_dim * dtype.itemsize
                late = budget is not None and clock() - started > budget
                if late or cache > MOST_BYTES:
                    continue
                found = tune_attention(heads, count, reach, dtype)
                if found is not None:
                    yield found
