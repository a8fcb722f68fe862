"""What of a model a CUDA graph was captured from, held so that a change shows before the graph's result is used."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dsi.containers.linear import FusedLinear
from dsi.containers.ops import NormOp

_TABLES = ("_modules", "_parameters", "_buffers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# hooks of these are silent until somebody asks a call for hidden states or attentions, and such a call has no graph
_SILENT = ("transformers.utils.output_capturing",)
_VALUES: Any = dict.values
_ADDRESS = torch._C.TensorBase.data_ptr


class ModelParts:
    """The modules, tensors, addresses and configs of a model at one time.

    The tensors are kept alive: a graph that is replayed before a change was seen must not read memory that is gone.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._own = [module.__dict__ for module in modules]
        # what containers are made of has a flag that nobody reads
        self._flagged = [module.__dict__ for module in modules if not isinstance(module, FusedLinear | NormOp)]
        self._tables = [table for own in self._own for name in _TABLES if (table := own[name])]
        # the root's own hooks run around its forward, not in it
        self._hooks = [own[name] for own in self._own[1:] for name in _HOOKS]
        self._tensors = list(_tensors(self._tables))
        self._kept = [tensor.detach() for tensor in self._tensors]
        self._addresses = list(map(_ADDRESS, self._tensors))
        self._sizes = list(map(len, self._tables))
        self._values = [value for table in self._tables for value in table.values()]
        self._configs = [(config, dict(config)) for config in _configs(modules)]

    def changed(self) -> str:
        """What is another than it was, or ""."""
        # without a line of python for each value: 16 us for 12 layers (2-core Zen 5), while the device is at work
        values = chain.from_iterable(map(_VALUES, self._tables))
        if list(map(len, self._tables)) != self._sizes or not all(map(operator.is_, values, self._values)):
            return "a module, parameter or buffer was exchanged"
        if list(map(_ADDRESS, self._tensors)) != self._addresses:
            return "weights were moved"
        if any(config != known for config, known in self._configs):
            return "the model's config was changed"
        return ""

    def busy(self) -> str:
        """Why the host must take part in a forward as the model is now, or ""."""
        if any(self._hooks) and (hook := self._loud_hook()):
            return f"a hook on a layer: {hook}"
        if any([own["training"] for own in self._flagged]):  # noqa: C419 - a list is the faster of the two
            return "a module is in training mode"
        return ""

    def _loud_hook(self) -> str:
        for table in self._hooks:
            for hook in table.values():
                if getattr(hook, "__module__", "") not in _SILENT:
                    return getattr(hook, "__qualname__", None) or type(hook).__qualname__
        return ""


def _tensors(tables: list[dict[str, Any]]) -> Iterator[Tensor]:
    """Those that have an address; packed weights of a CPU have none."""
    for table in tables:
        for value in table.values():
            if isinstance(value, Tensor) and value.layout is torch.strided:
                yield value


def _configs(modules: list[nn.Module]) -> list[dict[str, Any]]:
    found = [config for module in modules if hasattr(config := module.__dict__.get("config"), "__dict__")]
    return list({id(config): config.__dict__ for config in found}.values())
