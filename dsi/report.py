"""A plan as text for people."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsi.plans import BlockPlan, LeftPlan, Plan, TablePlan


def size(count: int) -> str:
    """Bytes with a unit, e.g. "28.4 MB" (10^6)."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def plan_table(plan: Plan) -> str:
    """Every block and everything left alone, like neighbours folded into one entry."""
    dtypes = str(plan.dtype_before).removeprefix("torch.")
    if plan.dtype_after != plan.dtype_before:
        dtypes += f" -> {str(plan.dtype_after).removeprefix('torch.')}"
    lines = [f"plan for {_short(plan.model)} on {plan.device}, {dtypes}: {len(plan.blocks)} layers replaced"]
    for _, group in groupby(plan.blocks, key=_signature):
        lines += _block_lines(list(group))
    lines += [_table_line(table) for table in plan.tables]
    if plan.left:
        lines.append("left alone:")
        lines += [_left_line(entry) for entry in plan.left]
    for layer, entries in plan.rejected.items():
        lines += [f"not chosen for {_short(layer)}: {r.full_name} ({r.stage}): {r.reason}" for r in entries]
    before = sum(b.bytes_before for b in plan.blocks)
    after = sum(b.bytes_after for b in plan.blocks)
    lines.append(f"weights in replaced layers: {size(before)} -> {size(after)}")
    if plan.entries:
        lines.append(f"run part by part: {', '.join(plan.entries)}")
    lines.append(f"generate: {plan.decode_text}")
    lines.append(f"restore: {'bit for bit' if plan.restorable else 'refused'}")
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)


def _signature(block: BlockPlan) -> tuple[object, ...]:
    return (block.original, block.container, block.policy, block.ops, block.slots)


def _block_lines(blocks: list[BlockPlan]) -> list[str]:
    first, last = blocks[0], blocks[-1]
    where = first.path if len(blocks) == 1 else f"{first.path} .. {last.path}"
    lines = [
        f"{where}: {_short(first.original)} -> {_short(first.container)}, policy {first.policy}, "
        f"operations {first.ops}, {size(first.bytes_before)} -> {size(first.bytes_after)} each"
    ]
    for slot in first.slots:
        shape = " x ".join(str(n) for n in slot.shape)
        lines.append(
            f"    {slot.place:9} {slot.form:7} {shape:13} {size(slot.bytes_before):>8} -> {size(slot.bytes_after):>8}  "
            f"{' + '.join(slot.sources)}"
        )
    return lines


def _table_line(table: TablePlan) -> str:
    shape = " x ".join(str(n) for n in table.shape)
    where, sizes = " + ".join(table.paths), f"{size(table.bytes_before)} -> {size(table.bytes_after)}"
    return f"{where}: one weight, held packed, {shape}, {sizes}"


def _left_line(entry: LeftPlan) -> str:
    return f"    {entry.path} ({_short(entry.original)}, {size(entry.bytes)}): {entry.reason.code}: {entry.reason.text}"


def _short(name: str) -> str:
    return name.rpartition(":")[2]
