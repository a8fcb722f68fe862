"""What every container is: it stands for a stock layer, owns its weights in fused form, and can still be that layer.

The original layer is kept beside the container, outside the module tree, with its parameters *parked*: the `Parameter`
objects stay, their memory is gone. Whenever the stock computation is needed (an argument the fused path does not know,
attentions wanted, training mode, autocast) the parameters are put back for the length of one call. `state_dict` speaks
the stock names, so checkpoints do not change.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dsi.containers.linear import FusedLinear
from dsi.containers.ops import AtenOps, NormOp, Rope
from dsi.containers.packing import AROUND, Texts
from dsi.containers.tables import TABLES, choose_ops
from dsi.errors import PolicyError, UnsupportedModelError
from dsi.policy import Call, Refusal, RotaryTable, Slot

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


# stands for "no such attribute, or one whose weights are fused away"
_FUSED = object()


class LayerCall(NamedTuple):
    """One call of a layer, understood.

    Args:
        hidden: [B, S, H].
        mask: what to attend to: None, or bool or additive [B, 1 or heads, S, T].
        cache: what keys and values go through, or None.
        rope: rotary terms of the positions, or None.
        causal: what a missing mask means.
        bias: added to the scaled scores, [B * heads, 1, T], or None.
        packed: hidden is [1, tokens, H] of texts without their padding, which this tells apart; or None.
    """

    hidden: Tensor
    mask: Tensor | None
    cache: Any
    rope: Rope | None
    causal: bool
    bias: Tensor | None = None
    packed: Texts | None = None


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


class Container(nn.Module):
    """Base of the containers.

    Subclasses name their places (`SLOTS`: place -> required), their facts (`FACTS`, and `OPTIONAL_FACTS` with what an
    absent one means), and implement `run`.

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
        self._lock = threading.RLock()

    # --- what a policy must bring -----------------------------------------------------------------------------

    @classmethod
    def check(cls, facts: Mapping[str, Any], slots: Mapping[str, Slot]) -> Refusal | None:
        """A refusal where these facts or slots name a variant that the container does not compute."""
        return None

    def finish(self) -> None:
        """All slots are in: choose the table of operations for the device they are on."""
        weight = next(self.parameters())
        self.dtype = weight.dtype
        self.ops_name = self.operations(choose_ops(weight.device, self.use_triton), self.facts)

    @classmethod
    def operations(cls, table: str, facts: Mapping[str, Any]) -> str:
        """The table of operations for a layer of these facts, on a device whose table is `table`."""
        return table

    @property
    def ops(self) -> AtenOps:
        """The table of operations in use."""
        return TABLES[self.ops_name]

    # --- calls ------------------------------------------------------------------------------------------------

    def run(self, call: LayerCall) -> Tensor:
        """The fused computation: hidden states [B, S, H] after the layer."""
        raise NotImplementedError

    def packs(self, call: LayerCall) -> bool:
        """Whether `run` could take this call without its padding, whatever its mask."""
        return False

    def _run(self, call: LayerCall) -> Tensor:
        who = AROUND.get()
        return self.run(call) if who is None else who.run(self, call)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original layer's signature, return type and meaning."""
        call = self._understand(args, kwargs)
        if call is None:
            return self._run_original(args, kwargs)
        # past torch's own way of setting attributes, which is slow
        self.__dict__["fused_calls"] += 1
        if torch.is_grad_enabled():
            with torch.no_grad():
                hidden = self._run(call)
            self._check_shape(call.hidden, hidden)
            hidden = self._without_gradients(call.hidden, hidden)
        else:
            hidden = self._run(call)
            self._check_shape(call.hidden, hidden)
        return (hidden, None) if self.call.returns == "tuple" else hidden

    def _check_shape(self, hidden: Tensor, output: Any) -> None:
        found = getattr(output, "shape", None)
        if found != hidden.shape:
            cls = type(self).container_class
            raise PolicyError(
                f"{cls.__module__}:{cls.__qualname__} gave {_shape(output)} for {_shape(hidden)}",
                hint="engine.restore() brings the stock layers back; report it to the policy's author",
            )

    def _without_gradients(self, source: Any, output: Any) -> Any:
        """`output`, which requires gradients where stock's would, and refuses to give any."""
        if isinstance(output, tuple):
            return (self._without_gradients(source, output[0]), *output[1:])
        if not (isinstance(source, Tensor) and source.requires_grad):
            source = next((p for p in self.parameters() if p.requires_grad), None)
        return output if source is None else NoGradients.apply(source, output)

    def _understand(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall | None:
        """The call in the container's terms, or None where only the original knows what it means."""
        if self.training or len(args) > len(self.positional) or not self._plain_context() or self.foreign_attention():
            return None
        given = dict(zip(self.positional, args, strict=False))
        given.update(kwargs)
        call = self.call
        rope_name = call.rope.positions if isinstance(call.rope, RotaryTable) else call.rope
        hidden = given.pop(self.positional[0], None)
        mask, cache, rope, bias = (given.pop(name, None) for name in (call.mask, call.cache, rope_name, call.bias))
        causal = given.pop("is_causal", None)
        if any(value is not None for name, value in given.items() if not self._free(name, value)):
            return None
        if not (self._fits(hidden, mask, cache) and self._fits_positions(hidden, rope, bias)):
            return None
        causal = self.facts["causal"] if causal is None else bool(causal)
        return LayerCall(hidden, mask, cache, self._terms(rope), causal, bias)

    def _terms(self, rope: Any) -> Rope | None:
        """Rotary terms of what the call gave: (cos, sin), or positions."""
        if rope is None:
            return None
        if isinstance(self.call.rope, RotaryTable):
            return self.rope_at(rope)
        cos, sin = rope
        return Rope.of(cos, sin, self.rope_pairs)

    @property
    def rope_pairs(self) -> bool:
        """Whether neighbouring dimensions turn together."""
        return bool(self.facts.get("rope_pairs", False))

    def rope_rows(self) -> Tensor | None:
        """The stock layer's own rotary table, [positions, rotary_dim]; None where it has none."""
        if not isinstance(self.call.rope, RotaryTable):
            return None
        found: Any = self.original
        for name in self.call.rope.path.split("."):
            found = getattr(found, name)
        rows: Tensor = found
        return rows

    def rope_at(self, positions: Tensor) -> Rope:
        """Terms from the layer's own table, at positions [1 or B, S]."""
        rows = self.rope_rows()
        assert rows is not None, "the layer has no rotary table"
        return Rope.from_rows(torch.nn.functional.embedding(positions, rows).to(self.dtype), self.rope_pairs)

    def foreign_attention(self) -> str:
        """The model's attention implementation where it is none that the fused path stands for, else ""."""
        name = getattr(self.model_config, "_attn_implementation", None)
        return "" if name is None or name in self.call.attention else str(name)

    def _free(self, name: str, value: Any) -> bool:
        # hidden states are recorded by hooks on the layer, whoever computes them
        return name in self.call.free or name == "output_hidden_states" or (name == "output_attentions" and not value)

    def _fits(self, hidden: Any, mask: Any, cache: Any) -> bool:
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.dtype is not self.dtype or not hidden.numel():
            return False
        if mask is not None and not (
            isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype in (torch.bool, hidden.dtype)
        ):
            return False
        return cache is None or self._takes_cache(cache)

    def _fits_positions(self, hidden: Tensor, rope: Any, bias: Any) -> bool:
        """The layer learns the positions the way that the policy says."""
        if (rope is not None) != bool(self.call.rope) or (bias is not None) != bool(self.call.bias):
            return False
        if isinstance(self.call.rope, RotaryTable):
            rows, length = hidden.shape[:2]
            if not isinstance(rope, Tensor) or rope.shape not in ((1, length), (rows, length)):
                return False
        return bias is None or self._takes_bias(hidden, bias)

    def _takes_bias(self, hidden: Tensor, bias: Any) -> bool:
        return False

    def _takes_cache(self, cache: Any) -> bool:
        return False

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
            if isinstance(module, FusedLinear):
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
        stock = self.original.state_dict()
        given = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
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
                if isinstance(module, FusedLinear):
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

    def train(self, mode: bool = True) -> Container:
        """Training mode runs the original layer, which knows dropout."""
        self.original.training = mode
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Container:
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

    container_class: ClassVar[type[Container]]
    original_class: ClassVar[type[nn.Module]]


def fused_class(container: type[Container], original: type[nn.Module]) -> type[Container]:
    """The class of a container that is also an instance of the stock layer's class, under the stock name."""
    return _fused_class(container, original)  # type: ignore[arg-type]  # torch's modules hash, whatever mypy reads


@functools.cache
def _fused_class(container: type[Container], original: type[nn.Module]) -> type[Container]:
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
    result: type[Container] = cls
    return result


def _blank(container: type[Container], original: type[nn.Module]) -> Container:
    """An instance without state, for copy and pickle."""
    cls = fused_class(container, original)
    return cls.__new__(cls)


__all__ = ["Container", "LayerCall", "NoGradients", "NormOp", "fused_class", "parked"]
