"""Which objects a model is made of, so that whoever changes them can be caught, and the change taken back.

    before = Structure.of(model)
    ...                             # somebody else's code, which may read the model and nothing more
    before.changes()                # ["training of model.norm", ...]
    before.put_back_()

It holds references, no copies: what is written into a tensor in place can be seen (by its version) and not be undone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs
from torch import Tensor, nn

# dicts of a module whose entries are objects of their own
_TABLES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


@attrs.frozen(eq=False)
class _Module:
    """One module: its path, its class, its instance attributes, the entries of its tables and its tensors' versions."""

    path: str
    module: nn.Module
    cls: type
    attributes: Mapping[str, Any]
    tables: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, int]


@attrs.frozen(eq=False)
class Structure:
    """The modules of a model as they were."""

    modules: tuple[_Module, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Structure:
        """The structure of a model and of everything below it, now."""
        return cls(tuple(_seen(path, module) for path, module in model.named_modules()))

    def changes(self) -> list[str]:
        """What has changed since, in words, in module order."""
        return [f"{what} of {one.path or 'the model'}" for one in self.modules for what in _changes(one)]

    def put_back_(self) -> None:
        """Give every module its class, attributes and entries again; the values of tensors are not known."""
        for one in self.modules:
            if type(one.module) is not one.cls:
                one.module.__class__ = one.cls
            _refill_(one.module.__dict__, one.attributes)
            for name, table in one.tables.items():
                _refill_(one.module.__dict__[name], table)


def _refill_(mapping: dict[str, Any], entries: Mapping[str, Any]) -> None:
    # in place and only where it differs: others hold the dict, and hooks keep their order
    if not _same(mapping, entries):
        mapping.clear()
        mapping.update(entries)


def _same(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    return list(now) == list(before) and all(now[name] is value for name, value in before.items())


def _seen(path: str, module: nn.Module) -> _Module:
    own = module.__dict__
    tables = {name: dict(own[name]) for name in _TABLES if isinstance(own.get(name), dict)}
    return _Module(path, module, type(module), dict(own), tables, dict(_versions(module)))


def _versions(module: nn.Module) -> Iterator[tuple[str, int]]:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        # inference tensors count nothing
        if isinstance(tensor, Tensor) and not tensor.is_inference():
            yield name, tensor._version


def _changes(one: _Module) -> Iterator[str]:
    now = one.module.__dict__
    if type(one.module) is not one.cls:
        yield "the class"
    names = (*one.attributes, *(name for name in now if name not in one.attributes))
    for name in names:
        if name in one.tables and name in now:
            if not _same(now[name], one.tables[name]):
                yield name
        elif now.get(name, one) is not one.attributes.get(name, one):
            yield name
    versions = dict(_versions(one.module))
    yield from (f"the values of {name}" for name, version in one.versions.items() if versions.get(name) != version)
