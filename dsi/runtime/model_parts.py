"""What of a model a CUDA graph was captured from, held so that a change shows before the graph's result is used."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dsi.containers.ops import NormOp
from dsi.containers.stand_in import FUSED, StandIn

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
        self._flagged = [module.__dict__ for module in modules if not isinstance(module, (*FUSED, NormOp))]
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


class Choices:
    """Plain attributes by which the stock code around and behind containers decides what it computes.

    Watched where containers say that there are such: processors of attentions, sizes of chunks, scales of adapters,
    switches that a user may set. A replayed graph would not ask them.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        containers = [module for module in model.modules() if isinstance(module, StandIn)]
        asking = any(container.neutral for container in containers)
        watched: dict[int, nn.Module] = {}
        for root in (model, *(container.original for container in containers)) if asking else ():
            watched.update((id(module), module) for module in root.modules() if _has_choices(module))
        self._own = [module.__dict__ for module in watched.values()]
        self._names = [[name for name in own if name not in _STANDARD] for own in self._own]
        self._take()

    def _take(self) -> None:
        self._sizes = list(map(len, self._own))
        pairs = list(zip(self._own, self._names, strict=True))
        # of two names, an itemgetter gives a tuple
        self._reads: list[Callable[[], tuple[Any, ...]]] = [
            partial(operator.itemgetter("training", "training", *names), own) for own, names in pairs
        ]
        self._known = self._values()
        # tables and lists, which may be written to: of submodules too, where no tree of modules has them
        found = [own[name] for own, names in pairs for name in (*names, "_modules")]
        self._written = [(value, _entries(value)) for value in found if type(value) in (list, dict)]

    def _values(self) -> list[Any]:
        return list(chain.from_iterable([read() for read in self._reads]))

    def changed(self) -> str:
        """What is another than it was, or ""."""
        if list(map(len, self._own)) == self._sizes:
            try:
                same = all(map(operator.is_, self._values(), self._known))
            except KeyError:
                same = False
            if same and all([_same(value, entries) for value, entries in self._written]):  # noqa: C419 - the faster
                return ""
        return "an attribute of a layer was set"

    def settle(self) -> None:
        """A forward ran, and nobody else did anything: what is another now is none of a user's choices."""
        if not self.changed():
            return
        known = iter(self._known)
        written = {id(value) for value, entries in self._written if not _same(value, entries)}
        for own, names in zip(self._own, self._names, strict=True):
            before = dict(zip(("training", "training", *names), known, strict=False))
            names[:] = [n for n in names if n in own and own[n] is before[n] and id(own[n]) not in written]
        self._take()


def _entries(value: Any) -> tuple[Any, ...]:
    return tuple(value) if type(value) is list else (*value, *value.values())


def _same(value: Any, entries: tuple[Any, ...]) -> bool:
    now = value if type(value) is list else (*value, *value.values())
    return len(now) == len(entries) and all(map(operator.is_, now, entries))


_STANDARD = frozenset({*nn.Module().__dict__, "_dsi", "forward", "_apply"})


def _has_choices(module: nn.Module) -> bool:
    """Stock modules that are none of torch's own."""
    return not isinstance(module, StandIn) and not type(module).__module__.startswith(("torch.nn.", "dsi."))


def _tensors(tables: list[dict[str, Any]]) -> Iterator[Tensor]:
    """Those that have an address; packed weights of a CPU have none."""
    for table in tables:
        for value in table.values():
            if isinstance(value, Tensor) and value.layout is torch.strided:
                yield value


def _configs(modules: list[nn.Module]) -> list[dict[str, Any]]:
    found = [config for module in modules if hasattr(config := module.__dict__.get("config"), "__dict__")]
    return list({id(config): config.__dict__ for config in found}.values())
