"""How the rows of the projections into attention belong to heads: measured by moving one row and watching the rest.

Attention mixes positions, so a change of one position's row shows in the others where it is a key's or a value's; and
it shows in the heads that read it. Where projections are fused, this tells the layout row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import attrs
import torch
from torch import Tensor

from dsi.containers.layouts import row_permutation
from dsi.drafting.replay import Replay
from dsi.errors import UnsupportedModelError

LAYOUTS: tuple[Literal["thirds", "head_interleaved", "kv_grouped"], ...] = ("thirds", "head_interleaved", "kv_grouped")
# a change below this share of the largest value is rounding
_FELT = 1e-6


@attrs.frozen(kw_only=True)
class HeadCount:
    """The sizes of an attention."""

    heads: int
    kv_heads: int
    head_dim: int


@attrs.frozen
class Attention:
    """A layer's attention, to be asked what a change does to what its output projection reads.

    Args:
        replay: of a call of the layer.
        out: path of the output projection.
    """

    replay: Replay
    out: str

    def read(self, path: str, change: Callable[[Tensor], Tensor]) -> Tensor:
        """What the output projection reads once the output of `path` is changed, [B, S, heads * head_dim]."""
        return self.replay.run({path: change}).inputs[self.out]

    @property
    def before(self) -> Tensor:
        """What it reads as things are."""
        return self.replay.base.inputs[self.out]

    def felt(self, path: str, change: Callable[[Tensor], Tensor]) -> Tensor:
        """bool [S, heads * head_dim]: where a change shows, in any row."""
        before = self.before
        return (self.read(path, change) - before).abs().amax(0) > _FELT * before.abs().max()


def moved(position: int | None = None, row: int | None = None) -> Callable[[Tensor], Tensor]:
    """A change of one position, one row, or both, of [B, S, rows]."""

    def change(x: Tensor) -> Tensor:
        part = x[:, slice(None) if position is None else slice(position, position + 1)]
        part = part if row is None else part[..., row : row + 1]
        # not the same at each position, which a softmax over keys would not see
        part.add_(1.0 + torch.arange(part.shape[1])[None, :, None])
        return x

    return change


def tell_apart(attention: Attention, paths: tuple[str, ...]) -> tuple[str, str, str]:
    """(q, k, v) of three separate projections.

    Raises:
        UnsupportedModelError: they do not behave like an attention's.
    """
    before = attention.before
    scale = before.abs().max()
    values = [p for p in paths if float((attention.read(p, torch.neg) + before).abs().max()) < 1e-4 * float(scale)]
    rest = [p for p in paths if p not in values]
    keys = [p for p in rest if bool(attention.felt(p, moved(position=0))[1:].any())]
    queries = [p for p in rest if p not in keys]
    if not len(values) == len(keys) == len(queries) == 1:
        raise UnsupportedModelError(
            f"of {', '.join(paths)} {len(queries)} act like queries, {len(keys)} like keys and {len(values)} like "
            "values; an attention has one of each"
        )
    return queries[0], keys[0], values[0]


def count_separate(attention: Attention, key: str, value: str) -> HeadCount:
    """The sizes of an attention with separate projections.

    Raises:
        UnsupportedModelError: a row of k or v does not belong to one group of heads.
    """
    reads = int(attention.felt(key, moved(row=0)).any(0).sum())
    group = int(attention.felt(value, moved(row=0)).any(0).sum())
    width = attention.before.shape[-1]
    values = attention.replay.base.outputs[value].shape[-1]
    if not group or reads % group or width % max(1, reads // group) or values % max(1, reads // group):
        raise UnsupportedModelError(
            f"one row of {key} is felt in {reads} columns of {attention.out} and one row of {value} in {group}: heads "
            "are not separate (a norm over all of them?)"
        )
    head_dim = reads // group
    return HeadCount(heads=width // head_dim, kv_heads=values // head_dim, head_dim=head_dim)


@attrs.frozen(kw_only=True)
class _Row:
    """What one row of a fused projection does: its role, and the first and number of columns that feel it."""

    role: str
    first: int
    columns: int


def read_fused(attention: Attention, path: str) -> tuple[HeadCount, tuple[str, ...]]:
    """The sizes of an attention with one projection, and the layouts that its rows have.

    Raises:
        UnsupportedModelError: no layout that dsi has words for.
    """
    rows = list(_rows(attention, path))
    others = [row.columns for row in rows if row.role != "q"]
    group = min(others, default=0)
    head_dim = max(others, default=0) // max(group, 1)
    rows = [attrs.evolve(r, role="v") if r.role != "q" and r.columns == group and head_dim > 1 else r for r in rows]
    roles = "".join(row.role for row in rows)
    if not head_dim:
        raise UnsupportedModelError(f"no row of {path} acts like a key or a value")
    count = HeadCount(heads=roles.count("q") // head_dim, kv_heads=roles.count("v") // head_dim, head_dim=head_dim)
    fitting = tuple(layout for layout in LAYOUTS if _fits(rows, layout, count))
    if not fitting:
        runs = "".join(f" {n} {role}," for role, n in _runs(roles))[:120].strip(" ,")
        raise UnsupportedModelError(
            f"the rows of {path} are {runs}, ...; of the layouts {', '.join(LAYOUTS)} none is like that"
        )
    return count, fitting


def _runs(roles: str) -> Iterator[tuple[str, int]]:
    start = 0
    for end in range(1, len(roles) + 1):
        if end == len(roles) or roles[end] != roles[start]:
            yield roles[start], end - start
            start = end


def _rows(attention: Attention, path: str) -> Iterator[_Row]:
    for row in range(attention.replay.base.outputs[path].shape[-1]):
        columns = attention.felt(path, moved(row=row)).any(0).nonzero().view(-1)
        elsewhere = bool(attention.felt(path, moved(position=0, row=row))[1:].any())
        first = int(columns[0]) if columns.numel() else -1
        yield _Row(role="k" if elsewhere else "q", first=first, columns=columns.numel())


def _fits(rows: list[_Row], layout: str, count: HeadCount) -> bool:
    """Whether the rows, put in order by a layout, are those of the heads one after the other."""
    sizes = {"heads": count.heads, "kv_heads": count.kv_heads, "head_dim": count.head_dim}
    if count.heads % max(count.kv_heads, 1) or len(rows) != (count.heads + 2 * count.kv_heads) * count.head_dim:
        return False
    if layout == "head_interleaved" and count.heads != count.kv_heads:
        return False
    order = row_permutation(layout, **sizes)
    ordered = rows if order is None else [rows[index] for index in order.tolist()]
    return all(_is(row, *wanted) for row, wanted in zip(ordered, _in_order(count), strict=True))


def _in_order(count: HeadCount) -> Iterator[tuple[str, int]]:
    """(role, first column that feels it) of each row that a container reads."""
    group = count.heads // count.kv_heads
    width = count.head_dim
    yield from (("q", head * width) for head in range(count.heads) for _ in range(width))
    yield from (("k", head * group * width) for head in range(count.kv_heads) for _ in range(width))
    yield from (("v", head * group * width + row) for head in range(count.kv_heads) for row in range(width))


def _is(row: _Row, role: str, first: int) -> bool:
    return row.role == role and row.first == first
