"""One weight that an embedding and a head share, held in oneDNN's packed layout alone.

A head's product reads packed weights faster than plain ones, but a tied head's weight is the embedding's too, and a
packed copy beside it would be a second copy of the largest matrix of a small model. So only the packed form is held,
and the embedding reads its rows out of the packed bytes:

    packed   [N / b, K / v, b, v], v elements of a row to each 4 bytes, b rows to a block, the last filled with zeros
    row i    words[i // b, :, i % b]

The layout is oneDNN's own affair and may be another with another version or processor. So b is never assumed: the one
under which every row of the real weight comes back bit for bit is taken, and where there is none the weight stays
plain.

Whoever asks a module for its `weight` gets the stock parameter, filled again, and both modules are stock's from then
on: what resizes, ties or edits embeddings finds what it expects. `state_dict`, loading, casts, copies and pickles work
as they do on stock modules, and leave the weight packed.

Measured on a 2-core AMD Zen 5, 50257 x 768, one row: bf16 plain 3.1 ms, packed 1.0; a row of the embedding 5 us packed,
2 us plain; 1024 rows at once 4.4 ms.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsi.containers.base import NoGradients, parked
from dsi.containers.linear import PACK_PADDING, choose_form

logger = logging.getLogger(__name__)

# rows to a block, as oneDNN has them, the widest processors' first
BLOCKS = (64, 48, 32, 24, 16, 8)
# rows that are compared at a time: their copy is small beside the weight
COMPARED = 1 << 12


class Packed(NamedTuple):
    """A weight in oneDNN's layout.

    Args:
        weight: [N, K], opaque.
        words: int32 [N / block, K / v, block], the same memory, which it keeps alive.
    """

    weight: nn.Parameter
    words: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Packed | None:
        """A weight [N, K] packed; None where it is better held plain, or its rows do not come back bit for bit."""
        if not packs_table(weight.device, weight.dtype, weight.shape) or not weight.is_contiguous():
            return None
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        size = torch.ops.mkldnn._nbytes(packed)
        row = weight.shape[1] * weight.itemsize
        if size > weight.nbytes * PACK_PADDING or row % 4 or size % row:
            return None
        memory: Any = (ctypes.c_char * size).from_address(torch.ops.mkldnn.data_ptr(packed))
        # a view of the memory holds the object that it was made of, and that whoever frees the memory
        memory.owner = packed
        flat, plain = torch.frombuffer(memory, dtype=torch.int32), weight.detach().view(torch.int32)
        for block in BLOCKS:
            if size % (row * block):
                continue
            words = flat.view(-1, row // 4, block)
            if _holds(words, plain):
                return cls(nn.Parameter(packed, requires_grad=False), words)
        return None

    def rows(self, ids: Tensor) -> Tensor:
        """Rows [..., K] of ids [...], int64 or int32.

        Raises:
            IndexError: an id is not in 0..N - 1.
        """
        block, count = self.words.shape[2], self.weight.shape[0]
        if ids.numel() == 1:
            one = int(ids)
            _check(one, one, count)
            found = self.words[one // block, :, one % block].contiguous()
        else:
            flat = ids.reshape(-1)
            low, high = flat.aminmax()
            _check(int(low), int(high), count)
            found = self.words[flat // block, :, flat % block]
        return found.view(self.weight.dtype).view(*ids.shape, -1)


def _check(low: int, high: int, count: int) -> None:
    if low < 0 or high >= count:
        # torch's words, which people search for
        raise IndexError(f"index out of range in self: {low if low < 0 else high} is not in 0..{count - 1}")


def _holds(words: Tensor, plain: Tensor) -> bool:
    """Whether the words are those of `plain`, int32 [N, K / v], row for row."""
    block, step = words.shape[2], max(1, COMPARED // words.shape[2])
    for start in range(0, words.shape[0], step):
        rows = plain[start * block : (start + step) * block]
        found = words[start : start + step].transpose(1, 2).reshape(-1, plain.shape[1])
        if not torch.equal(found[: rows.shape[0]], rows):
            return False
    return True


def packs_table(device: torch.device, dtype: torch.dtype, shape: torch.Size) -> bool:
    """Whether a weight of that kind is held packed, if its layout turns out to be readable.

    At one row an fp32 product waits for memory in any layout: 12.2 ms a token packed, 12.0 plain (124 M parameters,
    2-core Zen 5).
    """
    return dtype is torch.bfloat16 and len(shape) == 2 and choose_form(device, dtype, *shape) == "packed"


def may_join(module: nn.Module) -> bool:
    """Whether a module is stock's embedding or linear layer as it is, with a weight as it is."""
    weight: Any = module._parameters.get("weight")
    if type(module) not in _CLASSES or type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return False
    # an embedding with a largest norm writes to its weight
    renormed = getattr(module, "max_norm", None) is not None or getattr(module, "sparse", False)
    return not renormed and not {"forward", "_hf_hook"} & module.__dict__.keys()


class PackedTable:
    """The shared weight, and the modules that have it.

    Args:
        stock: the modules' own parameter; its memory is given up while the weight is packed.
    """

    def __init__(self, stock: nn.Parameter) -> None:
        self.stock = stock
        self.held: Packed | None = None
        self.members: list[nn.Module] = []
        self._copy: weakref.ReferenceType[Tensor] | None = None

    def pack_(self, held: Packed, modules: list[nn.Module]) -> None:
        """Hold the stock parameter's values packed alone, for modules that have it; by assignments."""
        empty = parked(self.stock)
        # who freezes a model asks its parameters, and finds this one
        held.weight.requires_grad_(self.stock.requires_grad)
        self.held, self.members, self._copy = held, modules, None
        for module in modules:
            _join(module, self, held)
        self.stock.data = empty

    def sharing(self) -> list[nn.Module]:
        """The modules that have the packed weight; others may have been given one of their own."""
        return [] if self.held is None else [m for m in self.members if m._parameters.get("weight") is self.held.weight]

    def unpack_(self) -> None:
        """Give the modules their stock parameter, filled, and their own class."""
        if self.held is None:
            return
        packed = self.held.weight
        if self.stock.numel() != packed.numel():
            self.stock.data = packed.detach().to_dense()
        self.stock.requires_grad_(packed.requires_grad)
        # in this order another thread's forward finds what its class computes with at any moment
        for module in self.sharing():
            module._parameters["weight"] = self.stock
        for module in self.members:
            _leave(module, self)
        self.held, self.members = None, []

    def dense(self) -> Tensor:
        """A strided copy; the one made before, as long as somebody has it and nobody wrote to it."""
        copy = None if self._copy is None else self._copy()
        if copy is not None and copy._version == 0:
            return copy
        held = self.held
        if held is None:
            return self.stock.data
        with torch.inference_mode(False), torch.no_grad():
            copy = held.weight.to_dense()
        self._copy = weakref.ref(copy)
        return copy

    def __getstate__(self) -> dict[str, Any]:
        """Plain, and without the modules, which come back by themselves."""
        dense = self.stock.data if self.held is None else self.dense()
        own = self.stock if self.held is None else self.held.weight
        return {"dense": dense, "requires_grad": own.requires_grad}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(nn.Parameter(state["dense"], requires_grad=state["requires_grad"]))  # type: ignore[misc]
        self.held = Packed.of(self.stock.data)
        if self.held is not None:
            self.held.weight.requires_grad_(self.stock.requires_grad)
            self.stock.data = parked(self.stock)


# --- modules ----------------------------------------------------------------------------------------------------------


class _Member(nn.Module):
    """What the two have in common; made of a stock module in its place, and made into it again."""

    table: PackedTable

    @property
    def weight(self) -> Any:
        """The stock parameter: from here on both modules are stock's."""
        own: Any = self._parameters.get("weight", self)
        if own is self:
            # torch's own words follow
            raise AttributeError("weight")
        if self.held is None:
            return own
        logger.warning("the weight of a %s was asked for: it is held plain from now on", self._get_name())
        with torch.inference_mode(False), torch.no_grad():
            self.table.unpack_()
        return self._parameters["weight"]

    @property
    def held(self) -> Packed | None:
        """The packed weight; None where this module has been given another one."""
        table: PackedTable | None = self.__dict__.get("table")
        held = None if table is None else table.held
        return held if held is not None and self._parameters.get("weight") is held.weight else None

    def _plain(self) -> Tensor:
        """The weight as stock's computation takes it."""
        table, own = self.__dict__.get("table"), self._parameters["weight"]
        if table is not None and self.held is not None:
            plain: Tensor = table.dense()
            return plain
        assert own is not None
        # another tensor with the packed bytes, as torch.func.functional_call puts in the parameter's place
        return own.to_dense() if own.is_mkldnn else own

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.held is not None:
            destination[prefix + "weight"] = self.table.dense()

    def _load_from_state_dict(self, *args: Any) -> None:
        table, modules = self.table, self.table.sharing()
        table.unpack_()
        # stock's class again, so past super()
        nn.Module._load_from_state_dict(self, *args)
        _pack_again_(table, modules)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        table, modules = self.table, self.table.sharing()
        table.unpack_()
        nn.Module._apply(self, fn, recurse)
        _pack_again_(table, modules)
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.held is not None:
            state["_parameters"] = {name: one for name, one in self._parameters.items() if name != "weight"}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "weight" in self._parameters:
            return
        table, rest = self.table, self._parameters
        self._parameters = {"weight": table.stock if table.held is None else table.held.weight, **rest}
        if table.held is None:
            _leave(self, table)
        else:
            table.members.append(self)


class PackedEmbedding(_Member, nn.Embedding):  # type: ignore[override]
    """Rows of the packed weight."""

    def forward(self, input: Tensor) -> Tensor:
        """[...] -> [..., K]."""
        held = self.held
        if held is None or input.dtype not in (torch.int64, torch.int32) or not input.numel() or not input.is_cpu:
            return F.embedding(input, self._plain(), self.padding_idx)
        return _without_gradients(held.rows(input), held.weight)


class PackedHead(_Member, nn.Linear):  # type: ignore[override]
    """The product with the packed weight."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        held, bias = self.held, self._parameters["bias"]
        # autocast and mixed dtypes are torch's own affair
        if held is None or input.dtype is not held.weight.dtype or not input.is_cpu or not _usual(input):
            return F.linear(input, self._plain(), bias)
        if not torch.is_grad_enabled():
            return _product(input, held.weight, bias)
        with torch.no_grad():
            logits = _product(input, held.weight, bias)
        return _without_gradients(logits, input, held.weight)


def _usual(x: Tensor) -> bool:
    return x.numel() > 0 and not torch.is_autocast_enabled("cpu")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return product


def _without_gradients(output: Tensor, *sources: Tensor) -> Tensor:
    """`output`, which requires gradients where stock's would, and refuses to give any."""
    source = next((one for one in sources if one.requires_grad), None) if torch.is_grad_enabled() else None
    return output if source is None else NoGradients.apply(source, output)


_CLASSES: dict[type, type[_Member]] = {nn.Embedding: PackedEmbedding, nn.Linear: PackedHead}


def _join(module: Any, table: PackedTable, held: Packed) -> None:
    module.__dict__["table"] = table
    module.__class__ = _CLASSES[type(module)]
    module._parameters["weight"] = held.weight


def _leave(module: Any, table: PackedTable) -> None:
    if module.__dict__.get("table") is table:
        del module.__dict__["table"]
    stock = next((stock for stock, ours in _CLASSES.items() if type(module) is ours), None)
    if stock is not None:
        module.__class__ = stock


def _pack_again_(table: PackedTable, modules: list[nn.Module]) -> None:
    """After a load, move or cast of one of them: packed as before, if all have the stock parameter still."""
    if not modules or any(module._parameters.get("weight") is not table.stock for module in modules):
        return
    with torch.inference_mode(False), torch.no_grad():
        held = Packed.of(table.stock.data)
    if held is None:
        logger.info("a shared weight is held plain from now on: %s on %s", table.stock.dtype, table.stock.device)
        return
    table.pack_(held, modules)


__all__ = ["Packed", "PackedEmbedding", "PackedHead", "PackedTable", "may_join", "packs_table"]
