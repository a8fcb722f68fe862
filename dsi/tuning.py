"""The launch settings of a decode step's products, found by measuring on this device, and where they are kept.

Each candidate multiplies a ring of matrices, more than the L2 cache holds, inside one CUDA graph; what counts is the
median of its replays. A candidate whose result is not the reference's is refused. All of a shape's candidates are
compiled at once.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsi.errors import DsiError
from dsi.policy import Norm

if TYPE_CHECKING:
    from dsi.plans import BlockPlan, Plan

Settings = dict[str, int]

# rows that settings are kept for
MATVEC_ROWS, SKINNY_ROWS = (1, 2), (4, 8, 16, 32)
RING_BYTES = 320 << 20
# relative to the reference, in the norm; a few roundings of bf16 among thousands of products are far below
TOLERANCE = 1e-2

MATVEC: tuple[Settings, ...] = tuple(
    {"block_n": n, "block_k": k, "num_warps": warps}
    for n, k, warps in (
        (4, 512, 2), (8, 512, 4), (1, 1024, 4), (2, 1024, 2), (4, 1024, 4), (8, 1024, 4), (2, 2048, 2), (2, 2048, 4),
        (2, 2048, 8), (4, 2048, 2), (4, 2048, 4), (4, 2048, 8), (8, 2048, 4), (8, 2048, 8), (16, 2048, 8), (2, 4096, 4),
        (4, 4096, 4), (4, 4096, 8), (8, 4096, 8), (1, 8192, 8),
    )
)  # fmt: skip
SKINNY: tuple[Settings, ...] = tuple(
    {"block_n": n, "block_k": k, "splits": splits, "stages": stages, "num_warps": 4, "dependent": dependent}
    for n, k, splits, stages in (
        (64, 128, 1, 4), (64, 128, 1, 3), (64, 64, 1, 6), (64, 64, 1, 5), (32, 128, 1, 3), (128, 64, 1, 4),
        (64, 128, 2, 4), (64, 128, 4, 3), (64, 64, 2, 6), (32, 128, 2, 4),
    )
    for dependent in (1, 2)
)  # fmt: skip


@attrs.frozen(kw_only=True)
class Product:
    """A product of a decode step: a matrix [rows, columns], whether half of the rows gate the others, and the norm
    before it, "" for none.
    """

    rows: int
    columns: int
    gated: bool = False
    norm: str = ""


@attrs.frozen(kw_only=True)
class Found:
    """The best settings of one shape: of which op, the microseconds of ours, and of a product those of cuBLAS."""

    op: str
    shape: str
    settings: Settings
    time: float
    library: float | None = None


def products_of(plan: Plan, model: nn.Module) -> tuple[Product, ...]:
    """The products of a model's decode step, each once: its layers' matrices and the head's."""
    found: dict[Product, None] = {}
    for block in plan.blocks:
        for slot in block.slots:
            if len(slot.shape) == 2:
                rows, columns = slot.shape
                norm = _norm(block, slot.place)
                found[Product(rows=rows, columns=columns, gated=slot.place == "gate_up", norm=norm)] = None
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        # the last norm is as the layers'
        kinds = [kind for block in plan.blocks if (kind := _norm(block, "qkv"))]
        found[Product(rows=head.weight.shape[0], columns=head.weight.shape[1], norm=kinds[0] if kinds else "")] = None
    return tuple(found)


def _norm(block: BlockPlan, place: str) -> str:
    """The norm before a layer's product, "" for none."""
    before = {"qkv": "norm_attn", "up": "norm_mlp", "gate_up": "norm_mlp"}
    norm = block.block.slots.get(before.get(place, ""))
    return norm.kind if isinstance(norm, Norm) else ""


def tune(product: Product, rows: int, dtype: torch.dtype) -> Found | None:
    """The best settings for a product and so many rows on the current device; None where no candidate runs.

    Raises:
        DsiError: there is no CUDA device.
    """
    require_device()
    from dsi_kernels.matvec import MAX_ROWS, shape_key
    from dsi_kernels.matvec import matvec as one
    from dsi_kernels.skinny import skinny as few

    op, kernel, candidates = ("matvec", one, MATVEC) if rows <= MAX_ROWS else ("skinny", few, SKINNY)
    # the norm before a few rows is a launch of its own, with cuBLAS as without
    weights, given = _operands(product if op == "matvec" else attrs.evolve(product, norm=""), rows, dtype)
    fitting = tuple(one for one in candidates if fits(one, product))
    timed = _timed(kernel, fitting, weights, given)
    library = graph_time(lambda i: F.linear(given["x"], weights[i]), len(weights))
    if not timed:
        return None
    time, best = min(timed, key=lambda pair: pair[0])
    if op == "skinny":
        best = {**best, "library": 1 if time < library else 2}
    shape = shape_key(rows, product.rows, product.columns, dtype.itemsize, product.norm if op == "matvec" else "")
    return Found(op=op, shape=shape, settings=best, time=time, library=library)


def fits(settings: Settings, product: Product) -> bool:
    """Whether a candidate is another one than those with smaller tiles: a tile is no wider than twice the columns."""
    return settings["block_k"] < 2 * product.columns


def require_device() -> None:
    """Nothing where there is a CUDA device; a DsiError where there is none."""
    if not torch.cuda.is_available():
        raise DsiError("tune: there is no CUDA device here; settings are measured on the device they are for")


def _operands(product: Product, rows: int, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    N, K = product.rows, product.columns
    options: dict[str, Any] = {"device": "cuda", "dtype": dtype}
    count = max(2, -(-RING_BYTES // (N * K * dtype.itemsize)))
    weights = [torch.randn(N, K, **options) / K**0.5 for _ in range(count)]
    given: dict[str, Any] = {"x": torch.randn(rows, K, **options)}
    if product.norm:
        given |= {"norm": product.norm, "norm_weight": torch.rand(K, **options) + 0.5}
    if product.norm == "layer":
        given["norm_bias"] = torch.randn(K, **options)
    if product.gated:
        return weights, {**given, "kind": "silu", "gated": True}
    return weights, {**given, "residual": torch.randn(rows, N, **options)}


def _timed(
    kernel: Callable[..., Tensor], candidates: tuple[Settings, ...], weights: list[Tensor], given: Mapping[str, Any]
) -> list[tuple[float, Settings]]:
    from dsi_kernels import compile_ahead, matvec_reference
    from dsi_kernels._pdl import dependent_launches

    wanted = matvec_reference(weight=weights[0], **given).float()
    found = []
    with dependent_launches(True):
        device = weights[0].device
        compile_ahead(lambda: [_attempt(kernel, weights[0], given, one) for one in candidates], device)
        for one in candidates:
            result = _attempt(kernel, weights[0], given, one)
            if result is None or not _near(result.float(), wanted):
                continue
            time = graph_time(lambda i, c=one: kernel(weight=weights[i], **given, config=c), len(weights))  # type: ignore[misc]
            found.append((time, one))
    return found


def _attempt(
    kernel: Callable[..., Tensor], weight: Tensor, given: Mapping[str, Any], config: Settings
) -> Tensor | None:
    """The product, or None where the device has no room for the candidate."""
    from triton.runtime.errors import OutOfResources

    try:
        return kernel(weight=weight, **given, config=config)
    except OutOfResources:
        return None


def _near(found: Tensor, wanted: Tensor) -> bool:
    # NaN is not near
    return bool((found - wanted).norm() / wanted.norm() < TOLERANCE)


def graph_time(step: Callable[[int], object], count: int, *, replays: int = 12) -> float:
    """Microseconds of one of `count` steps, from replays of a graph that holds them all."""
    step(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            step(index)
    times = []
    for _ in range(replays + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    # the first ones warm up
    return statistics.median(times[3:])


def tune_all(products: tuple[Product, ...], rows: tuple[int, ...], dtype: torch.dtype) -> Iterator[Found]:
    """What `tune` finds for every product and number of rows that a kernel of ours takes."""
    for product in products:
        for count in rows:
            found = tune(product, count, dtype)
            if found is not None:
                yield found


def write(found: list[Found], folder: Path, device_name: str) -> list[Path]:
    """Put the settings in the folder's files, one an op, beside those of other shapes; returns the files.

    Raises:
        ValueError: a file that is there already cannot be used; nothing is written then.
    """
    from dsi_kernels.tuned import FOLDER, device_slug, read_settings

    tables: dict[Path, dict[str, Settings]] = {}
    for op in sorted({one.op for one in found}):
        path = folder / op / f"{device_slug(device_name)}.json"
        known = frozenset(read_settings(FOLDER / op / "default.json")["*"])
        table = read_settings(path, known)
        tables[path] = {**table, **{one.shape: one.settings for one in found if one.op == op}}
    for path, table in tables.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
    return list(tables)
