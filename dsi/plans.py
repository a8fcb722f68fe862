"""What becomes of a model, as data: the plan of each layer, of what is left alone, and of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import attrs
import torch

from dsi.fit import Fit, Reason
from dsi.policy import Block, CausalLM
from dsi.registry import Rejected


def _read_only(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(dict(mapping))


@attrs.frozen(kw_only=True)
class SlotPlan:
    """One place of a container.

    Args:
        place: its name.
        sources: stock submodules that feed it.
        shape: of the fused weight.
        form: how the weight will be held, see `dsi.containers.linear` and `dsi.containers.conv`; "shared" for norms,
            "kept" for modules that stay.
        bytes_before, bytes_after: of weights and biases.
        product: the name of the shared product that its rows are part of, or "".
        bias: it has a bias.
    """

    place: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    form: str
    bytes_before: int
    bytes_after: int
    product: str = ""
    bias: bool = False


@attrs.frozen(eq=False, kw_only=True)
class BlockPlan:
    """One layer that will be replaced.

    Args:
        path: of the layer in the model.
        original: its class, "module:Class".
        container: "module:Class" or the registered name.
        policy: full name.
        ops: table of operations between the linear layers, "aten" or "triton".
        block, fit: what the stage step builds from.
    """

    path: str
    original: str
    container: str
    policy: str
    ops: str
    slots: tuple[SlotPlan, ...]
    block: Block
    fit: Fit

    @property
    def bytes_before(self) -> int:
        """Of the layer's weights, now."""
        return sum(slot.bytes_before for slot in self.slots)

    @property
    def bytes_after(self) -> int:
        """Of the container's weights."""
        return sum(slot.bytes_after for slot in self.slots)


@attrs.frozen(kw_only=True)
class LeftPlan:
    """Something that stays as it is, and why."""

    path: str
    original: str
    bytes: int
    reason: Reason


@attrs.frozen(kw_only=True)
class TablePlan:
    """A weight that an embedding and a head share, and that will be held packed; see `dsi.containers.packed_table`.

    Args:
        paths: of the two modules.
        shape: [rows, columns].
        bytes_before, bytes_after: of the weight.
    """

    paths: tuple[str, ...]
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int


@attrs.frozen(eq=False, kw_only=True)
class Plan:
    """What `init_inference` would do to one model.

    Args:
        model: class of the model, "module:Class".
        device: where its weights are.
        dtype_before, dtype_after: of its floating parameters; in a model of several dtypes, of the one that the cast
            harms most.
        cast: the dtype that every floating parameter gets, or None where each keeps its own.
        blocks: layers that are replaced, in module order.
        tables: weights shared by an embedding and a head that are held packed.
        entries: paths of the parts through which the model is run; empty where that is its own forward.
        left: everything else that has parameters.
        decode: the language model's parts for dsi's decode loop, or None.
        input_limit: the most positions one forward takes, or None where any length runs.
        decode_text: which loop `generate` runs, in words.
        rejected: layer class -> policies that were not chosen, with their reasons.
        restorable: whether `restore()` can give the original back bit for bit.
        notes: what else the user should know.
    """

    model: str
    device: str
    dtype_before: torch.dtype
    dtype_after: torch.dtype
    cast: torch.dtype | None
    blocks: tuple[BlockPlan, ...]
    left: tuple[LeftPlan, ...]
    decode: CausalLM | None
    decode_text: str
    input_limit: int | None
    rejected: Mapping[str, tuple[Rejected, ...]] = attrs.field(converter=_read_only)
    restorable: bool
    notes: tuple[str, ...]
    tables: tuple[TablePlan, ...] = ()
    entries: tuple[str, ...] = ()

    @property
    def why_nothing(self) -> str:
        """The reasons, where no block is replaced; "" otherwise."""
        if self.blocks:
            return ""
        reasons = {f"{left.reason.code}: {left.reason.text}" for left in self.left}
        telling = {f"{left.reason.code}: {left.reason.text}" for left in self.left if left.reason.code != "no_policy"}
        return "; ".join(sorted(telling or reasons)) or "the model has no parameters"

    def table(self) -> str:
        """The plan as text; see `dsi.report`."""
        from dsi.report import plan_table

        return plan_table(self)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able data."""
        return {
            "model": self.model,
            "device": self.device,
            "dtype_before": str(self.dtype_before).removeprefix("torch."),
            "dtype_after": str(self.dtype_after).removeprefix("torch."),
            "blocks": [_block_dict(block) for block in self.blocks],
            "tables": [attrs.asdict(table) for table in self.tables],
            "left": [
                {"path": x.path, "original": x.original, "bytes": x.bytes, "code": x.reason.code, "text": x.reason.text}
                for x in self.left
            ],
            "entries": list(self.entries),
            "generate": self.decode_text,
            "rejected": {layer: [attrs.asdict(entry) for entry in entries] for layer, entries in self.rejected.items()},
            "restorable": self.restorable,
            "notes": list(self.notes),
        }


def _block_dict(block: BlockPlan) -> dict[str, Any]:
    return {
        "path": block.path,
        "original": block.original,
        "container": block.container,
        "policy": block.policy,
        "ops": block.ops,
        "bytes_before": block.bytes_before,
        "bytes_after": block.bytes_after,
        "facts": {name: value for name, value in block.fit.facts.items() if isinstance(value, int | float | str)},
        "slots": [attrs.asdict(slot) for slot in block.slots],
    }
