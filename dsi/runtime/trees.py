"""Arguments and results of a forward as trees: what they are besides their tensors' values, and the same with others.

Containers are tuples, lists and dicts, outputs (ordered dicts that are dataclasses, as transformers and diffusers have
them), and transformers' growing cache, which a result may hold.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

_PLAIN = (int, float, bool, str, type(None))
# objects that are their attributes
_OBJECTS = (DynamicCache, DynamicLayer, DynamicSlidingWindowLayer)


class NoTree(TypeError):
    """A value that is no tensor, no plain value and no container of such; the message says what it is."""


def _is_output(kind: type) -> bool:
    return issubclass(kind, OrderedDict) and dataclasses.is_dataclass(kind)


def leaves(value: Any) -> Iterator[Any]:
    """Tensors and plain values, in order.

    Raises:
        NoTree: there is something else.
    """
    kind = type(value)
    if kind is Tensor or kind is nn.Parameter or kind in _PLAIN:
        yield value
    elif kind is tuple or kind is list:
        for item in value:
            yield from leaves(item)
    elif kind is dict or _is_output(kind):
        for item in value.values():
            yield from leaves(item)
    elif kind in _OBJECTS:
        yield from leaves(_attributes(value))
    else:
        yield _no_tensor(value)


def _no_tensor(value: Any) -> Any:
    """A value that may stay what it is, such as a dtype, a device or a class."""
    known = isinstance(value, type) or not hasattr(value, "__dict__")
    if isinstance(value, Tensor) or not getattr(type(value), "__hash__", None) or not known:
        raise NoTree(f"a {type(value).__name__}")
    return value


def signature(value: Any) -> Any:
    """What a value is besides its tensors' values; hashable, equal for equal structures.

    Raises:
        NoTree: as `leaves`.
    """
    kind = type(value)
    if kind is Tensor or kind is nn.Parameter:
        return (value.shape, value.dtype, value.device)
    if kind in _PLAIN:
        # True is 1
        return (kind, value)
    if kind is tuple or kind is list:
        return (kind, *map(signature, value))
    if kind is dict:
        return (kind, *((name, signature(item)) for name, item in value.items()))
    raise NoTree(f"a {kind.__name__}")


def rebuilt(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with `change(tensor)` for every tensor. A tensor that stands in two places is changed once.

    Raises:
        NoTree: as `leaves`.
    """
    return _rebuilt(value, change, {})


def _rebuilt(value: Any, change: Callable[[Tensor], Tensor], done: dict[int, Tensor]) -> Any:
    kind = type(value)
    if kind is Tensor or kind is nn.Parameter:
        found = done.get(id(value))
        if found is None:
            found = done[id(value)] = change(value)
        return found
    if kind in _PLAIN:
        return value
    if kind is tuple or kind is list:
        return kind([_rebuilt(item, change, done) for item in value])
    if kind is dict:
        return {name: _rebuilt(item, change, done) for name, item in value.items()}
    if _is_output(kind):
        return kind(**{name: _rebuilt(item, change, done) for name, item in value.items()})
    if kind in _OBJECTS:
        made = object.__new__(kind)
        made.__dict__.update(_rebuilt(_attributes(value), change, done))
        return made
    return _no_tensor(value)


def _attributes(value: Any) -> dict[str, Any]:
    """An object's own attributes; classes among them, which say what it makes more of, stay what they are."""
    return dict(value.__dict__)


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a tree, in order."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def without_numbers(key: Any) -> Any:
    """A signature, or a tuple of such, without the values of its ints and floats."""
    if not isinstance(key, tuple) or isinstance(key, torch.Size):
        return key
    if len(key) == 2 and key[0] in (int, float):
        return key[0]
    return tuple(map(without_numbers, key))


def named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name.

    Raises:
        NoTree: some have no name, or one has two values; the model words the error.
    """
    if len(args) > len(names):
        raise NoTree("more arguments than names")
    given = dict(zip(names, args, strict=False))
    if given.keys() & kwargs.keys():
        raise NoTree("an argument twice")
    given.update(kwargs)
    return given
