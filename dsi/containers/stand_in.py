"""What every container is: it stands for a stock layer, owns its weights in fused form, and can still be that layer.

The original layer is kept beside the container, outside the module tree, with its parameters *parked*: the `Parameter`
objects stay, their memory is gone. Whenever the stock computation is needed (an argument the fused path does not know,
attentions wanted, training mode, autocast) the parameters are put back for the length of one call. `state_dict` speaks
the stock names, so checkpoints do not change.

What a call means is the subclasses' business: `dsi.containers.base` has layers of hidden states [B, S, H],
`dsi.containers.map_base` layers of maps [B, C, H, W].
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dsi.containers.conv import FusedConv
from dsi.containers.linear import FusedLinear
from dsi.containers.ops import AtenOps
from dsi.containers.tables import TABLES, choose_ops
from dsi.errors import PolicyError, UnsupportedModelError
from dsi.policy import ABSENT, Call, Refusal, Slot

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # pragma: no cover - transformers without the collector records through layer outputs alone
    _active_collector = None

_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


# modules that hold absorbed weights
FUSED = (FusedLinear, FusedConv)

# stands for "no such attribute, or one whose weights are fused away"
_FUSED = object()


def parked(parameter: nn.Parameter) -> Tensor:
    """An empty tensor of the parameter's dtype and device, to stand for its memory."""
    return torch.empty(0, dtype=parameter.dtype, device=parameter.device)


class NoGradients(torch.autograd.Function):
    """The identity of `output`, and an error on the way back.

    Fused weights have no gradients, and to stop here without a word would train a part of the model.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, output: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise UnsupportedModelError(
            "no gradients flow through the fused layers of an optimized model",
            hint="call restore() on its engine before training, or run it under torch.no_grad()",
        )


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def shape_error(container: StandIn, found: Any, given: Any) -> PolicyError:
    """A container gave something of a shape that the stock layer would not give."""
    cls = type(container).container_class
    return PolicyError(
        f"{cls.__module__}:{cls.__qualname__} gave {_shape(found)} for {_shape(given)}",
        hint="engine.restore() brings the stock layers back; report it to the policy's author",
    )


class StandIn(nn.Module):
    """Base of all containers.

    Subclasses name their places (`SLOTS`: place -> required), their facts (`FACTS`, and `OPTIONAL_FACTS` with what an
    absent one means), say what a call means (`_understand`), and compute it (`_run`).

    Args:
        original: the stock layer; its weights are absorbed afterwards, slot by slot, by `dsi.inject`.
        facts: numbers and choices that the policy read from the config and the layer.
        call: the call convention of the stock layer.
        use_triton: as in the configuration.
    """

    SLOTS: ClassVar[Mapping[str, bool]] = {}
    FACTS: ClassVar[frozenset[str]] = frozenset()
    OPTIONAL_FACTS: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    # place -> what tensor parallelism cuts: "qkv", output rows of query, key and value heads; "heads", input columns of
    # query heads; "units", output rows of hidden units; "units_in", input columns of hidden units
    SHARDING: ClassVar[Mapping[str, str]] = MappingProxyType({})

    # its linear layers always see many rows at a time
    MANY_ROWS: ClassVar[bool] = False

    original: nn.Module

    def __init__(self, original: nn.Module, facts: Mapping[str, Any], call: Call, use_triton: bool | None) -> None:
        nn.Module.__init__(self)
        # past nn.Module.__setattr__: registered as a child it would double every name in the tree
        self.__dict__["original"] = original
        # the config of the model around the layer, where it has one: the attention implementation may be changed later
        self.model_config: Any = None
        self.facts = {**self.OPTIONAL_FACTS, **facts}
        self.call = call
        self.use_triton = use_triton
        self.ops_name = "aten"
        self.positional = tuple(inspect.signature(original.forward).parameters)
        self.fused_calls = self.stock_calls = 0
        # stock names of the parameters that have been overwritten since the injection
        self.loaded: set[str] = set()
        self.training = original.training
        for table in _HOOK_TABLES:
            self.__dict__[table] = original.__dict__[table]
        # what must stay as it was on the stock layer: module, path of an attribute of it, value
        self.neutral: tuple[tuple[nn.Module, tuple[str, ...], Any], ...] = ()
        self._lock = threading.RLock()

    # --- what a policy must bring -----------------------------------------------------------------------------

    @classmethod
    def check(cls, facts: Mapping[str, Any], slots: Mapping[str, Slot]) -> Refusal | None:
        """A refusal where these facts or slots name a variant that the container does not compute."""
        return None

    def finish(self) -> None:
        """All slots are in: choose the table of operations for the device they are on."""
        weight = next(self.parameters())
        self.weights_dtype = weight.dtype
        self.ops_name = self.operations(choose_ops(weight.device, self.use_triton), self.facts)

    @classmethod
    def operations(cls, table: str, facts: Mapping[str, Any]) -> str:
        """The table of operations for a layer of these facts, on a device whose table is `table`."""
        return table

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights. Stock classes may have a property of that name, without a setter."""
        found: torch.dtype = self.__dict__["weights_dtype"]
        return found

    @property
    def ops(self) -> AtenOps:
        """The table of operations in use."""
        return TABLES[self.ops_name]

    # --- calls ------------------------------------------------------------------------------------------------

    def _understand(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call in the container's terms, its `hidden` a tensor; None where only the original knows its meaning."""
        raise NotImplementedError

    def _run(self, call: Any) -> Tensor:
        """The fused computation."""
        raise NotImplementedError

    def _expected(self, call: Any) -> tuple[int, ...]:
        """The shape of what `_run` gives."""
        shape: tuple[int, ...] = call.hidden.shape
        return shape

    def _returned(self, output: Any) -> Any:
        """The output as the stock layer returns it."""
        return output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original layer's signature, return type and meaning."""
        call = self._understand(args, kwargs)
        if call is None:
            return self._run_original(args, kwargs)
        # past torch's own way of setting attributes, which is slow
        self.__dict__["fused_calls"] += 1
        if torch.is_grad_enabled():
            with torch.no_grad():
                output = self._run(call)
            self._check_shape(call, output)
            output = self._without_gradients(call.hidden, output)
        else:
            output = self._run(call)
            self._check_shape(call, output)
        return self._returned(output)

    def _check_shape(self, call: Any, output: Any) -> None:
        found = getattr(output, "shape", None)
        if found != self._expected(call):
            raise shape_error(self, output, call.hidden)

    def _without_gradients(self, source: Any, output: Any) -> Any:
        """`output`, which requires gradients where stock's would, and refuses to give any."""
        if isinstance(output, tuple):
            return (self._without_gradients(source, output[0]), *output[1:])
        if not (isinstance(source, Tensor) and source.requires_grad):
            source = next((p for p in self.parameters() if p.requires_grad), None)
        return output if source is None else NoGradients.apply(source, output)

    def watch(self, neutral: Mapping[str, Any]) -> None:
        """Run the stock layer from now on while one of these attributes of it is not as it is said to be.

        Args:
            neutral: dotted attribute -> its value, see `dsi.policy.Block`.
        """
        found = []
        for path, value in neutral.items():
            owner, names = self.original, path.split(".")
            while len(names) > 1 and isinstance(child := owner._modules.get(names[0]), nn.Module):
                owner, names = child, names[1:]
            found.append((owner, tuple(names), value))
        self.neutral = tuple(found)

    def changed(self) -> str:
        """The attribute that is no longer what the fused path stands for; "" where all are."""
        for owner, names, value in self.neutral:
            if not holds(owner, names, value):
                return ".".join(names)
        return ""

    def _plain_context(self) -> bool:
        """No autocast, and nobody records anything but hidden states."""
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            return False
        collector = None if _active_collector is None else _active_collector.get()
        return collector is None or all(key == "hidden_states" or key.startswith("_") for key in collector)

    def _run_original(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._lock, self.weights_in_original(), torch.no_grad():
            self.stock_calls += 1
            output = self.original.forward(*args, **kwargs)
        if not torch.is_grad_enabled():
            return output
        return self._without_gradients(args[0] if args else kwargs.get(self.positional[0]), output)

    @contextmanager
    def weights_in_original(self) -> Iterator[nn.Module]:
        """The original layer with its weights put back, for the length of the context."""
        weights = self.export()
        parameters = dict(self.original.named_parameters(remove_duplicate=False))
        try:
            for name, tensor in weights.items():
                parameters[name].data = tensor
            yield self.original
        finally:
            for name in weights:
                parameters[name].data = parked(parameters[name])

    # --- weights ----------------------------------------------------------------------------------------------

    def export(self) -> dict[str, Tensor]:
        """The absorbed parameters under their stock names, relative to the layer; views where the layout allows."""
        result: dict[str, Tensor] = {}
        for module in self.children():
            if isinstance(module, FUSED):
                result.update(module.export())
        return result

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        absorbed = self.export()
        for name, value in self.original.state_dict(keep_vars=True).items():
            # contiguous, as stock's are: whoever saves them may view them flat
            tensor = absorbed[name].contiguous() if name in absorbed else value
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # what is kept is read by itself
        kept = tuple(f"{name}." for name, child in self._modules.items() if self.original._modules.get(name) is child)
        stock = {name: value for name, value in self.original.state_dict().items() if not name.startswith(kept)}
        given = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        given = {name: value for name, value in given.items() if not name.startswith(kept)}
        missing_keys.extend(prefix + name for name in stock if name not in given)
        if strict:
            unexpected_keys.extend(prefix + name for name in given if name not in stock)
        absorbed = self.export()
        shapes = {name: absorbed.get(name, value).shape for name, value in stock.items()}
        # stock would let another dtype in; a fused weight is one tensor of one dtype
        if local_metadata.get("assign_to_params_buffers"):
            retyped = [name for name in absorbed.keys() & given.keys() if given[name].dtype is not self.dtype]
            error_msgs.extend(f"{prefix}{name}: assign=True changes the dtype; restore() first" for name in retyped)
        wrong = {name for name in stock.keys() & given.keys() if given[name].shape != shapes[name]}
        # in torch's words, which people search for
        error_msgs.extend(
            f"size mismatch for {prefix}{name}: copying a param with shape {given[name].shape} from checkpoint, "
            f"the shape in current model is {shapes[name]}."
            for name in sorted(wrong)
        )
        known = stock.keys() & given.keys() - wrong
        self._take({**absorbed, **{name: given[name] for name in known}})
        self.loaded |= known

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for module in self.children():
                if isinstance(module, FUSED):
                    module.load({name: tensors[name] for name in module.export()})
            absorbed = self.export().keys()
            own = dict(self.original.named_parameters()) | dict(self.original.named_buffers())
            for name, tensor in tensors.items():
                if name not in absorbed:
                    own[name].copy_(tensor)

    # --- torch's own machinery --------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("original")
            value = _FUSED if original is None else getattr(original, name, _FUSED)
            if value is _FUSED or isinstance(value, nn.Module | Tensor):
                raise AttributeError(
                    f"{self._get_name()} has no {name!r}: its weights are fused; engine.restore() brings the stock "
                    "layer back, and state_dict() reads them under their stock names"
                ) from None
            return value

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The container's places, then the original's children.

        Walks that look for classes (transformers' capture of attentions) must find the modules that the stock
        computation runs; `train`, `apply` and moves reach them this way too. `named_modules`, `parameters` and
        `state_dict` do not.
        """
        own = dict(super().named_children())
        yield from own.items()
        # a module that is kept stands in both
        yield from ((name, child) for name, child in self.original.named_children() if own.get(name) is not child)

    def train(self, mode: bool = True) -> StandIn:
        """Training mode runs the original layer, which knows dropout."""
        self.original.training = mode
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> StandIn:
        super()._apply(fn, recurse)
        self.original._apply(fn, recurse=False)
        self.finish()
        return self

    def _get_name(self) -> str:
        return f"{type(self).__name__}[dsi {type(self).container_class.__name__}]"

    def extra_repr(self) -> str:
        return f"ops={self.ops_name}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.RLock()
        # the copies of the hook tables are shared with the copy of the original, as the tables themselves were
        for table in _HOOK_TABLES:
            self.__dict__[table] = self.original.__dict__[table]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (type(self).container_class, type(self).original_class), self.__getstate__()

    container_class: ClassVar[type[StandIn]]
    original_class: ClassVar[type[nn.Module]]


def fused_class(container: type[StandIn], original: type[nn.Module]) -> type[StandIn]:
    """The class of a container that is also an instance of the stock layer's class, under the stock name."""
    return _fused_class(container, original)  # type: ignore[arg-type]  # torch's modules hash, whatever mypy reads


@functools.cache
def _fused_class(container: type[StandIn], original: type[nn.Module]) -> type[StandIn]:
    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "container_class": container,
        "original_class": original,
    }
    cls: Any = type(original.__name__, (container, original), namespace)
    # stock base classes wrap `forward` of every subclass for gradient checkpointing, which is the original's business
    cls.forward = container.forward
    result: type[StandIn] = cls
    return result


def _blank(container: type[StandIn], original: type[nn.Module]) -> StandIn:
    """An instance without state, for copy and pickle."""
    cls = fused_class(container, original)
    return cls.__new__(cls)


def holds(owner: Any, names: tuple[str, ...], value: Any) -> bool:
    """Whether the attribute at a path is this value; `ABSENT`: whether there is none.

    Also where the path leads through None, which has no such attribute.
    """
    found = owner
    for name in names:
        above, found = found, getattr(found, name, ABSENT)
        if above is None and found is ABSENT:
            return True
    # of one type too: 1 is no True here
    return found is value or (type(found) is type(value) and bool(found == value))


__all__ = ["NoGradients", "StandIn", "fused_class", "holds", "parked", "shape_error"]
