"""Where a model's repeated layers are."""

from __future__ import annotations

from typing import Any

import attrs
from torch import nn

from dsi.errors import UnsupportedModelError
from dsi.fit import class_name


@attrs.frozen(kw_only=True)
class Stack:
    """A list of layers of one class.

    Args:
        path: of the list, e.g. "model.layers".
        layer: the class, "module:Class".
        owner: path of the nearest module with a config of its own; "" for the model.
    """

    path: str
    layer: str
    owner: str

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The layers in a model."""
        return list(model.get_submodule(self.path).children())

    def config(self, model: nn.Module) -> Any:
        """The config that the layers stand under."""
        return getattr(model.get_submodule(self.owner), "config")  # noqa: B009


def find_stacks(model: nn.Module) -> list[Stack]:
    """The lists of layers of the class that holds most of the model's parameters, outermost lists alone.

    Raises:
        UnsupportedModelError: the model repeats nothing.
    """
    found: dict[str, list[tuple[str, int]]] = {}
    taken: list[str] = []
    for path, module in model.named_modules():
        classes = {class_name(child) for child in module.children()}
        inner = path.startswith(tuple(f"{one}." for one in taken))
        if not isinstance(module, nn.ModuleList) or len(classes) != 1 or len(module) < 2 or inner:
            continue
        taken.append(path)
        found.setdefault(classes.pop(), []).append((path, sum(p.numel() for p in module.parameters())))
    if not found:
        raise UnsupportedModelError("the model repeats no layer class")
    layer = max(found, key=lambda one: sum(size for _, size in found[one]))
    return [Stack(path=path, layer=layer, owner=_owner(model, path)) for path, _ in found[layer]]


def _owner(model: nn.Module, path: str) -> str:
    while path:
        path = path.rpartition(".")[0]
        if "config" in vars(model.get_submodule(path)):
            return path
    return ""
