"""One decode step of a language model without the model's own forward: embedding, layers, norm, head.

    h = embed(ids) [-> project_in] [-> embed_norm] [+ positions]
    h = layer.decode(h) for each layer
    logits = head([project_out] [norm] h) [, capped]

A model's own forward spends, beside its layers, 0.2 to 0.4 ms of CPU a token on reading its config, building masks and
collecting outputs. A step does none of that: what it needs is looked up once a `generate` call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsi.containers.base import Container
from dsi.containers.linear import has_avx512
from dsi.containers.ops import Biased, NormOp, Rope
from dsi.containers.transformer import DecoderLayer
from dsi.errors import PolicyError
from dsi.parallel import ShardedContainer
from dsi.policy import CausalLM, Config, Const, Norm, Positions, Rotary
from dsi.runtime.alibi import biases_of
from dsi.runtime.rope_table import RopeTable, identity, rope_rows

# weights of the head from which oneDNN reads them faster than MKL, at one row as at sixteen: 2-core Zen 3 (AVX2) and
# 2-core Zen 5 (AVX-512: 98 us against 309 us at 4096 x 256, 32 us against 54 us at 768 x 256), fp32
HEAD_FROM = {False: 1 << 23, True: 1 << 17}
# hooks that a decode step may pass by: ours, and transformers' recorders, which sleep unless outputs are wanted
_HARMLESS = ("dsi.", "transformers.utils.output_capturing")

Op = Callable[[Tensor], Tensor]


class Step:
    """The parts of a model, looked up: calling it takes one decode step. Good for one `generate` call, not longer.

    Args:
        decoders: the layers' `decode`, in order.
        embed: what comes before the positions, in order, from ids [B, 1] to [B, 1, H].
        positions: the position embedding [N, H], or None.
        rope: (hidden states, positions) -> rotary terms, or None.
        tail: what comes after the layers, in order; the last gives logits [B, 1, vocab].
        biases: of the scores, or None.
    """

    def __init__(
        self,
        *,
        decoders: list[Callable[..., Tensor]],
        embed: list[Op],
        positions: Tensor | None,
        rope: Callable[[Tensor, Tensor | int], Rope] | None,
        tail: list[Op],
        biases: Biased | None,
    ) -> None:
        self.decoders, self.embed, self.positions = decoders, embed, positions
        self.rope, self.tail, self.biases = rope, tail, biases

    def __call__(self, token_ids: Tensor, positions: Tensor | int, cache: Iterable[Any], mask: Tensor | None) -> Tensor:
        """`logits`, as float32."""
        return self.logits(token_ids, positions, cache, mask).float()

    def logits(
        self, token_ids: Tensor, positions: Tensor | int, cache: Iterable[Any], mask: Tensor | Biased | None
    ) -> Tensor:
        """Logits of the next token, [B, vocab].

        Args:
            token_ids: int64 [B, 1].
            positions: int64 [B, 1], or an int where all rows stand at the same position: that saves the gathers.
            cache: the cache's layers, in order; each grows by one position.
            mask: of the layers' `decode`; where there are biases, with them.
        """
        hidden = token_ids
        for op in self.embed:
            hidden = op(hidden)
        if self.positions is not None:
            hidden = hidden + _rows(self.positions, positions)
        rope = None if self.rope is None else self.rope(hidden, positions)
        hidden = hidden.squeeze(1)
        for decode, kv in zip(self.decoders, cache, strict=True):
            hidden = decode(hidden, kv, rope, kv.seen(mask) if isinstance(mask, Tensor) else mask)
        for op in self.tail:
            hidden = op(hidden)
        return hidden


class DecodeRunner:
    """Takes decode steps of one injected model: `build` it once, `bind` it for each `generate` call.

    Args:
        model: the language model.
        parts: where its parts are.
    """

    def __init__(self, model: nn.Module, parts: CausalLM) -> None:
        self.model, self.parts = model, parts
        self._forget()

    def _forget(self) -> None:
        self.table = RopeTable()
        # the layers' rotary tables that were last compared, and whether they are equal
        self.compared: tuple[tuple[Any, ...], bool] = ((), True)

    @classmethod
    def build(cls, model: nn.Module, causal_lm: CausalLM) -> DecodeRunner:
        """A runner of `model`, whose parts are where `causal_lm` says.

        Raises:
            PolicyError: a path leads nowhere, the config has no such attribute, or a norm is of another class than the
                policy names.
        """
        runner = cls(model, causal_lm)
        for path in runner._paths():
            runner._at(path)
        for slot in (causal_lm.norm, causal_lm.embed_norm):
            if slot is not None and (norm := runner._at(slot.path)) is not None:
                _check_norm(slot, norm)
        for fact in (causal_lm.logit_cap, *causal_lm.overrides.values()):
            if fact is not None:
                _setting(fact, model)
        return runner

    @property
    def layers(self) -> int:
        """Number of layers, each with its own layer of the cache."""
        return len(self._at(self.parts.layers))

    def containers(self) -> list[Any]:
        """The layers, in order."""
        return list(self._at(self.parts.layers))

    @property
    def learned_positions(self) -> int | None:
        """How many positions the position embedding, or the layers' rotary table, holds; None where there is none."""
        positions, rows = self.parts.positions, self._own_rows()
        if positions is None:
            return None if rows is None else rows.shape[0]
        return self._at(positions.path).weight.shape[0] - positions.offset

    @property
    def placed(self) -> bool:
        """Whether a step needs to know at which positions its tokens stand."""
        return self.parts.positions is not None or self.parts.rotary is not None or self._own_rows() is not None

    @property
    def static_rope(self) -> bool:
        """Whether rotary terms, where there are any, depend on the position alone."""
        rotary = self.parts.rotary
        return rotary is None or getattr(self._at(rotary.path), "rope_type", None) in rotary.static_when

    @property
    def windows(self) -> tuple[int | None, ...]:
        """For each layer how many positions one sees, itself included; None for all before it."""
        return tuple(layer.facts.get("window") for layer in self._at(self.parts.layers))

    def own_methods(self) -> dict[str, int | None]:
        """Generation's methods that the model's class may have of its own, and up to how many positions."""
        return {name: _setting(fact, self.model) for name, fact in self.parts.overrides.items()}

    def obstacle(self) -> str:
        """Why steps would not do what the model's own forward does, as the model is now; "" where they do."""
        return _context_obstacle() or self._module_obstacle() or self._table_obstacle()

    def biases(self) -> Biased | None:
        """Position biases of the scores, of a text without padding; None where the model has none."""
        alibi = self.parts.alibi
        if alibi is None:
            return None
        layer = self._at(self.parts.layers)[0]
        return biases_of(alibi, layer, next(layer.parameters()).device)

    def parts_identity(self) -> tuple[Any, ...]:
        """Differs once a layer or a part around them is another module, or a number that it computes with changed."""
        modules = [module for path in self._paths() for module in self._walk(path)] + list(self._at(self.parts.layers))
        rotary = self.parts.rotary
        buffers = () if rotary is None else self._frequencies(rotary)
        cap = None if self.parts.logit_cap is None else _setting(self.parts.logit_cap, self.model)
        return (*map(id, modules), *buffers, cap)

    def reads_whole_buffers(self) -> bool:
        """Whether the attention of a graph's step reads a cache's buffers beyond what is filled."""
        return any(layer.ops_name != "triton" or layer.softcap is not None for layer in self._at(self.parts.layers))

    def graph_obstacle(self) -> str:
        """Why a step is not tried as a CUDA graph, whatever it is given; "" where it is."""
        for index, layer in enumerate(self._at(self.parts.layers)):
            if not layer.ops_name.startswith("triton"):
                return f"{self.parts.layers}.{index}: its operations are {layer.ops_name}"
            if layer.kept_mlp and (reason := _kept_obstacle(layer.mlp)):
                return f"{self.parts.layers}.{index}.mlp: {reason}"
            if isinstance(layer, ShardedContainer):
                return f"{self.parts.layers}.{index}: it is split over ranks"
        return ""

    def bind(self, reach: int) -> Step:
        """The parts as they are now: weights may have been moved, cast, tied or resized, and modules exchanged.

        Args:
            reach: the steps to come stay below this position.
        """
        parts = self.parts
        embed = (_embedding(self._at(parts.embed)), self._linear(parts.project_in), self._norm(parts.embed_norm))
        last = self._norm_op(parts.norm)
        tail = (*self._tail(last), self._cap())
        return Step(
            decoders=self._decoders(last),
            embed=[op for op in embed if op is not None],
            positions=None if parts.positions is None else self._position_rows(parts.positions),
            rope=self._own_rope(reach) if parts.rotary is None else self._rope(parts.rotary, reach),
            tail=[op for op in tail if op is not None],
            biases=self.biases(),
        )

    # --- looking up -------------------------------------------------------------------------------------------

    def _paths(self) -> Iterator[str]:
        parts = self.parts
        yield from (parts.embed, parts.layers, parts.head)
        yield from (path for path in (parts.project_in, parts.project_out) if path)
        places = (parts.norm, parts.embed_norm, parts.positions, parts.rotary)
        yield from (part.path for part in places if part is not None)

    def _at(self, path: str) -> Any:
        """The submodule at `path`; None where the model sets it to None."""
        return self._walk(path)[-1]

    def _walk(self, path: str) -> list[Any]:
        """The model and every submodule on the way to `path`."""
        found: list[Any] = [self.model]
        for name in path.split("."):
            try:
                found.append(getattr(found[-1], name))
            except AttributeError:
                raise PolicyError(
                    f"{type(self.model).__name__} has no {path!r}: {name!r} is missing on {type(found[-1]).__name__}; "
                    "correct the paths of CausalLM in the policy"
                ) from None
        return found

    def _module_obstacle(self) -> str:
        on_the_way = {id(module): (path, module) for path in self._paths() for module in self._walk(path)}
        for path, module in on_the_way.values():
            if module is not None and (reason := _module_obstacle(module)):
                return f"{path}: {reason}"
        for index, layer in enumerate(self._at(self.parts.layers)):
            if reason := _layer_obstacle(layer):
                return f"{self.parts.layers}.{index}: {reason}"
        return ""

    def _linear(self, path: str) -> Op | None:
        module = self._at(path) if path else None
        return None if module is None else _linear(module)

    def _norm_op(self, slot: Norm | None) -> NormOp | None:
        module = None if slot is None else self._at(slot.path)
        if slot is None or module is None:
            return None
        return NormOp(slot.kind, module.weight, getattr(module, "bias", None), getattr(module, slot.eps), slot.offset)

    def _norm(self, slot: Norm | None) -> Op | None:
        norm = self._norm_op(slot)
        # the layers' own table of operations: on CUDA it has kernels
        ops = self._at(self.parts.layers)[0].ops
        return None if norm is None else lambda x: ops.norm(norm, x)

    def _decoders(self, last: NormOp | None) -> list[Callable[..., Tensor]]:
        """Each layer's step; one that takes the same norm as the next begins with knows it."""
        layers = list(self._at(self.parts.layers))
        found: list[Callable[..., Tensor]] = []
        for layer, after in zip(layers, [*layers[1:], None], strict=True):
            following = last if after is None else after.norm_attn if getattr(after, "chained", False) else None
            knows = following is not None and type(layer).decode is DecoderLayer.decode
            found.append(partial(layer.decode, following=following) if knows else layer.decode)
        return found

    def _tail(self, norm: NormOp | None) -> tuple[Op | None, ...]:
        """The last norm, the projection and the head."""
        project = self._linear(self.parts.project_out)
        head = self._at(self.parts.head)
        if norm is not None and project is None and type(head) is nn.Linear and head.weight.is_cuda:
            ops, weight, bias = self._at(self.parts.layers)[0].ops, head.weight, head.bias
            return (lambda x: ops.norm_product(norm, x, weight, bias),)
        return self._norm(self.parts.norm), project, _head(head)

    def _cap(self) -> Op | None:
        cap: float | None = None if self.parts.logit_cap is None else _setting(self.parts.logit_cap, self.model)
        return None if cap is None else lambda logits: torch.tanh(logits / cap) * cap

    def _position_rows(self, positions: Positions) -> Tensor:
        rows: Tensor = self._at(positions.path).weight[positions.offset :]
        return rows

    def _rope(self, rotary: Rotary, reach: int) -> Callable[[Tensor, Tensor | int], Rope]:
        module, pairs = self._at(rotary.path), self._at(self.parts.layers)[0].rope_pairs
        if self.static_rope:
            return self.table.bind(module, reach, pairs)
        return lambda hidden, positions: _computed(module, hidden, positions, pairs=pairs)

    # a rotary table that every layer has for itself

    def _frequencies(self, rotary: Rotary) -> Iterator[tuple[Any, ...]]:
        """What tells whether the rotary terms are others."""
        module = self._at(rotary.path)
        for buffer in module.buffers():
            # a module that computes them at each step may write to its buffers then, and a graph has it write too
            yield identity(buffer) if self.static_rope else (buffer.data_ptr(), buffer.dtype)

    def _own_rows(self) -> Tensor | None:
        layer = next(iter(self._at(self.parts.layers)), None)
        return layer.rope_rows() if isinstance(layer, Container) else None

    def _own_rope(self, reach: int) -> Callable[[Tensor, Tensor | int], Rope] | None:
        rows = self._own_rows()
        if rows is None:
            return None
        positions = torch.arange(min(reach, rows.shape[0]), device=rows.device)
        table = self._at(self.parts.layers)[0].rope_at(positions[None])
        return lambda _hidden, positions: rope_rows(table, positions)

    def _table_obstacle(self) -> str:
        tables = [rows for layer in self._at(self.parts.layers) if (rows := layer.rope_rows()) is not None]
        key = tuple(map(identity, tables))
        if key != self.compared[0]:
            self.compared = key, all(torch.equal(rows, tables[0]) for rows in tables)
        return "" if self.compared[1] else "the layers' rotary tables differ"

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def _computed(rotary: nn.Module, hidden: Tensor, positions: Tensor | int, *, pairs: bool) -> Rope:
    """Rotary terms as the model itself has them computed at each step."""
    if isinstance(positions, int):
        positions = torch.full((1, 1), positions, dtype=torch.long, device=hidden.device)
    cos, sin = rotary(hidden, positions)
    return Rope.of(cos, sin, pairs)


def _setting(fact: Config | Const, model: Any) -> Any:
    if not isinstance(fact, Config):
        return fact.value
    try:
        return getattr(model.config, fact.name)
    except AttributeError:
        raise PolicyError(
            f"the config of {type(model).__name__} has no {fact.name!r}; correct CausalLM in the policy"
        ) from None


def _check_norm(slot: Norm, module: nn.Module) -> None:
    found = f"{type(module).__module__}:{type(module).__qualname__}"
    if found != slot.cls or not hasattr(module, slot.eps):
        raise PolicyError(
            f"{slot.path}: the policy expects {slot.cls} with an attribute {slot.eps!r} and the model has {found}; "
            "correct the norm of CausalLM in the policy"
        )


# --- obstacles ----------------------------------------------------------------------------------------------------


def _context_obstacle() -> str:
    module = nn.modules.module
    if module._global_forward_hooks or module._global_forward_pre_hooks:
        return "forward hooks are registered for all modules"
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return "autocast is on"
    return ""


def _module_obstacle(module: nn.Module) -> str:
    """Why calling this module would do more than its weights say, or ""."""
    if module.training and not isinstance(module, nn.ModuleList):
        return "the model is in training mode"
    if not all(map(_harmless, (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))):
        return "it has forward hooks"
    patched = module.__dict__.get("forward")
    if patched is not None and not _harmless(patched):
        return "its forward is replaced"
    return ""


def _kept_obstacle(module: nn.Module) -> str:
    """Why a graph would not do what calling the model's own module does, or "".

    One that waits for the device cannot be captured: that shows when it is tried.
    """
    for path, part in module.named_modules():
        if reason := _module_obstacle(part):
            return f"{path}: {reason}" if path else reason
    return ""


def _harmless(function: Any) -> bool:
    owner = getattr(function, "func", function)
    return str(getattr(owner, "__module__", "")).startswith(_HARMLESS)


def _layer_obstacle(layer: nn.Module) -> str:
    if not isinstance(layer, Container) or not hasattr(layer, "decode"):
        return f"{type(layer).__name__} has no decode step"
    if attention := layer.foreign_attention():
        return f"the attention implementation is {attention!r} now"
    return _module_obstacle(layer)


# --- parts --------------------------------------------------------------------------------------------------------


def _embedding(module: nn.Module) -> Op:
    if type(module) is nn.Embedding and module.max_norm is None:
        weight = module.weight
        return lambda ids: F.embedding(ids, weight)
    return module


def _linear(module: nn.Module) -> Op:
    if type(module) is nn.Linear:
        weight, bias = module.weight, module.bias
        return lambda x: F.linear(x, weight, bias)
    return module


def _head(module: nn.Module) -> Op:
    if type(module) is not nn.Linear or not _for_onednn(module.weight):
        return _linear(module)
    weight, bias = module.weight, module.bias
    return lambda x: _onednn(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _for_onednn(weight: Tensor) -> bool:
    plain = weight.dtype is torch.float32 and weight.device.type == "cpu" and weight.is_contiguous()
    return plain and weight.numel() >= HEAD_FROM[has_avx512()] and torch.backends.mkldnn.is_available()


def _rows(table: Tensor, positions: Tensor | int) -> Tensor:
    """Rows of a [N, H] table: [1, 1, H] or [B, 1, H]."""
    if isinstance(positions, int):
        return table.narrow(0, positions, 1).unsqueeze(0)
    return F.embedding(positions, table)
