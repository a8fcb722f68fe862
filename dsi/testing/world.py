"""The classes and modules around a model, to be seen again later: what an injection may not touch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import nn

_MODULES = ("torch", "torch.nn", "torch.nn.functional", "transformers", "transformers.cache_utils")
# filled by Python and torch themselves as classes are used
_LAZY = frozenset({"__annotations__", "__doc__", "__warningregistry__", "_abc_impl", "__weakref__", "__dict__"})


@attrs.frozen(eq=False)
class World:
    """Attributes by owner, and the registries of transformers that anyone may write to."""

    attributes: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, model: nn.Module) -> World:
        """The classes of a model's modules with their bases, the modules that define them, torch and transformers."""
        return cls({name: dict(values) for name, values in _owners(model)})

    def changes(self, model: nn.Module) -> list[str]:
        """What is another object now, as "owner.attribute"; names that were added to a module are no change."""
        now = dict(_owners(model))
        return [
            f"{owner}.{name}"
            for owner, before in self.attributes.items()
            for name, value in before.items()
            if name not in _LAZY and now.get(owner, {}).get(name, None) is not value
        ] + [
            f"{owner}.{name}"
            for owner, values in now.items()
            if owner.startswith("class ")
            for name in values
            if name not in _LAZY and name not in self.attributes.get(owner, {})
        ]


def _owners(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    classes = {base for module in model.modules() for base in type(module).__mro__ if base is not object}
    for base in classes:
        yield f"class {base.__module__}:{base.__qualname__}", dict(vars(base))
    for name in sorted({*_MODULES, *(base.__module__ for base in classes)}):
        module = sys.modules.get(name)
        if module is not None:
            yield f"module {name}", {key: value for key, value in vars(module).items() if not key.startswith("__")}
    yield "module torch.Tensor", dict(vars(torch.Tensor))
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for kind, registry in (("attention", ALL_ATTENTION_FUNCTIONS), ("mask", ALL_MASK_ATTENTION_FUNCTIONS)):
        yield f"{kind} registry", {name: registry[name] for name in registry.valid_keys()}
