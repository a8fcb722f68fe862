"""The calls that a model really makes of its layers, and one of them made again with something changed.

What changes then tells what depends on what: that is how roles are found, whatever things are called.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from dsi.errors import UnsupportedModelError

Change = Callable[[Tensor], Tensor]


@attrs.frozen(eq=False, kw_only=True)
class LayerCalled:
    """One call of a layer, by the names of its arguments, with what it gave; the caches are as they were before."""

    layer: nn.Module
    arguments: dict[str, Any]
    output: Any

    @property
    def hidden(self) -> Tensor:
        """The first argument."""
        found: Tensor = next(iter(self.arguments.values()))
        return found


def first_tensor(value: Any) -> Any:
    """The tensor, or the first item of a tuple."""
    return value[0] if isinstance(value, tuple | list) and value else value


@torch.no_grad()
def record(model: nn.Module, layers: Sequence[nn.Module], run: Callable[[], Any]) -> list[LayerCalled]:
    """Every call that `run` makes of the layers, in order."""
    calls: list[LayerCalled] = []
    pending: list[dict[str, Any]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(module.forward).parameters)
        pending.append(copy.deepcopy({**dict(zip(names, args, strict=False)), **kwargs}))

    def after(module: nn.Module, _args: Any, output: Any) -> None:
        calls.append(LayerCalled(layer=module, arguments=pending.pop(), output=output))

    handles = [one.register_forward_pre_hook(before, with_kwargs=True) for one in layers]
    handles += [one.register_forward_hook(after) for one in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


@attrs.frozen(eq=False, kw_only=True)
class Run:
    """What went into and out of each submodule that ran, by path; tensors alone, the last call of each."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    order: tuple[str, ...]
    output: Any

    @property
    def result(self) -> Tensor:
        """The hidden states that the layer gave."""
        found: Tensor = first_tensor(self.output)
        return found


class Replay:
    """One call of one layer, made again as often as one likes.

    Args:
        call: of a stock layer; its cache, if any, is copied each time.
    """

    def __init__(self, call: LayerCalled) -> None:
        self.call = call
        self.paths = {module: path for path, module in call.layer.named_modules() if path}
        self.base = self.run()

    @torch.no_grad()
    def run(
        self,
        change: Mapping[str, Change] = MappingProxyType({}),
        *,
        hidden: Tensor | None = None,
        without: Sequence[str] = (),
        other: Mapping[str, Any] = MappingProxyType({}),
    ) -> Run:
        """The call again.

        Args:
            change: path -> what to make of that submodule's output.
            hidden: other hidden states.
            without: arguments to leave out.
            other: arguments to give another value.
        """
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        order: list[str] = []

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            path = self.paths[module]
            given = first_tensor(args) if args else next(iter(kwargs.values()), None)
            made = first_tensor(output)
            if path in change and isinstance(made, Tensor):
                made = change[path](made.clone())
                output = made if isinstance(output, Tensor) else (made, *output[1:])
            if isinstance(given, Tensor) and isinstance(made, Tensor):
                # some models add to them in place
                inputs[path], outputs[path] = given.clone(), made.clone()
                order.append(path)
            return output

        handles = [one.register_forward_hook(after, with_kwargs=True) for one in self.paths]
        arguments = copy.deepcopy({k: v for k, v in self.call.arguments.items() if k not in without})
        arguments |= other
        if hidden is not None:
            arguments[next(iter(arguments))] = hidden
        try:
            output = self._call(arguments)
        finally:
            for handle in handles:
                handle.remove()
        return Run(inputs=inputs, outputs=outputs, order=tuple(order), output=output)

    def _call(self, arguments: dict[str, Any]) -> Any:
        name = next(iter(arguments))
        try:
            return self.call.layer(arguments.pop(name), **arguments)
        # whatever a layer raises that is called in another way than by its parent
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(self.call.layer).__name__} does not run alone: {type(error).__name__}: {error}"
            ) from error


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors hold the same numbers, but for rounding; positions may be in one dimension or in two."""
    if one is None or other is None or one.numel() != other.numel() or one.shape[-1:] != other.shape[-1:]:
        return False
    if one.shape != other.shape:
        one, other = one.reshape(-1, one.shape[-1]), other.reshape(-1, other.shape[-1])
    return bool(torch.allclose(one, other, rtol=1e-4, atol=1e-5))


def noise(like: Tensor) -> Tensor:
    """The same noise every time."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(7)).to(like)
