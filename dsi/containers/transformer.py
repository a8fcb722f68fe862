"""The transformer layer: attention and MLP with residuals, in the forms that architectures give them.

    pre-norm     h += out(attend(qkv(norm_attn(h))));  h += mlp(norm_mlp(h))
    post-norm    h = norm_attn(h + out(attend(qkv(h))));  h = norm_mlp(h + mlp(h))
    sandwich     as pre-norm, with norm_attn_out and norm_mlp_out over what is added
    parallel     h += out(attend(qkv(norm_attn(h)))) + mlp(norm_mlp(h)); without norm_mlp both read norm_attn(h)
    normed sum   as pre-norm, with norm_attn(h) and norm_mlp(h) in the place of h as what is added to

The MLP is down(act(up)), or down(act(gate) * up) with a `gate_up` slot, or a `mlp` module that is kept as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from dsi.containers.activations import KIND_OF_NAME
from dsi.containers.base import Container, LayerCall
from dsi.containers.first_positions import FirstPositions
from dsi.containers.ops import HeadNorms, Heads, NormOp, Rope, repeat_heads, with_bias
from dsi.containers.triton_step import kernels_take
from dsi.policy import Refusal, Slot

_SLOTS = MappingProxyType(
    {
        "norm_attn": True,
        "qkv": True,
        "q_norm": False,
        "k_norm": False,
        "out": True,
        "norm_attn_out": False,
        "norm_mlp": False,
        "up": False,
        "gate_up": False,
        "down": False,
        "mlp": False,
        "norm_mlp_out": False,
    }
)
# tokens that go through an MLP at once: 4,096 fill the device, and at 7B's size hold 270 MB between the products
CHUNK = 4096
# the slots that make an MLP
_MLPS = ({"up", "down"}, {"gate_up", "down"}, {"mlp"})


class TransformerLayer(Container):
    """The computation that encoder and decoder layers share.

    Facts: `heads`, `kv_heads`, `head_dim`; `scale`, what q.k is multiplied by; `activation`, a config name;
    `pre_norm`; `causal`, what a missing mask means. May be left out: `parallel`, attention and MLP read the same
    hidden states (False); `softcap`, the cap c of scores c * tanh(s / c), or None; `rope_pairs`, the rotary embedding
    turns dimensions 2i and 2i + 1 together, not i and i + rotary_dim / 2 (False); `biased`, the scores have position
    biases, so that masks are additive (False); `repeat_kv`, keys and values are repeated for every query head before
    they go to the cache (False); `add_to_normed`, the residual connections start from the normed hidden states (False).
    """

    SLOTS: ClassVar[Mapping[str, bool]] = _SLOTS
    FACTS: ClassVar[frozenset[str]] = frozenset(
        {"heads", "kv_heads", "head_dim", "scale", "activation", "pre_norm", "causal"}
    )
    OPTIONAL_FACTS: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "parallel": False,
            "softcap": None,
            "rope_pairs": False,
            "biased": False,
            "repeat_kv": False,
            "add_to_normed": False,
        }
    )

    SHARDING: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"qkv": "qkv", "out": "heads", "up": "units", "gate_up": "units", "down": "units_in"}
    )

    @classmethod
    def check(cls, facts: Mapping[str, Any], slots: Mapping[str, Slot]) -> Refusal | None:
        activation = facts["activation"]
        if "mlp" not in slots and activation not in KIND_OF_NAME:
            return Refusal(
                reason=f"activation {activation!r} has no fused form", hint=f"known: {', '.join(sorted(KIND_OF_NAME))}"
            )
        if facts["heads"] % facts["kv_heads"]:
            return Refusal(reason=f"{facts['heads']} heads do not divide into {facts['kv_heads']} kv heads")
        wrong = _wrong_slots(facts, set(slots))
        return Refusal(reason=f"the policy's slots make no layer: {wrong}") if wrong else None

    def finish(self) -> None:
        super().finish()
        facts, places = self.facts, self._modules
        self.shape = Heads(facts["heads"], facts["kv_heads"], facts["head_dim"])
        self.scale = float(facts["scale"])
        self.softcap = facts["softcap"]
        self.kind = KIND_OF_NAME.get(facts["activation"], "")
        self.pre_norm = bool(facts["pre_norm"])
        self.parallel = bool(facts["parallel"])
        # of a parallel layer that is split over ranks: both halves are summed at once
        self.one_sum = False
        self.repeat = self.shape.heads // self.shape.kv_heads if facts["repeat_kv"] else 1
        self.add_to_normed = bool(facts["add_to_normed"])
        self.sandwich = "norm_attn_out" in places
        self.kept_mlp = "mlp" in places
        self.gated = "gate_up" in places
        # norm, attention, residual, norm, MLP, residual, one after the other
        self.chained = self.pre_norm and not (self.parallel or self.sandwich or self.kept_mlp or self.add_to_normed)

    @classmethod
    def operations(cls, table: str, facts: Mapping[str, Any]) -> str:
        """The device's table, or where its kernels do not know this attention, one that takes torch's for it."""
        if table != "triton":
            return table
        strange = facts["rope_pairs"] or facts["biased"] or facts["repeat_kv"]
        known = not strange and kernels_take(Heads(facts["heads"], facts["kv_heads"], facts["head_dim"]))
        return table if known else "triton, attention aten"

    def _takes_bias(self, hidden: Tensor, bias: Any) -> bool:
        rows = hidden.shape[0] * self.shape.heads
        return isinstance(bias, Tensor) and bias.dtype is hidden.dtype and bias.shape[:-1] == (rows, 1)

    @property
    def all_heads(self) -> int:
        """Query heads of the layer, those of other ranks included where it is split."""
        return self.shape.heads

    @property
    def head_norms(self) -> HeadNorms:
        """The norms over the heads of q and k, where the layer has them."""
        places: dict[str, Any] = self._modules
        return (places["q_norm"], places["k_norm"]) if "q_norm" in places else None

    def run(self, call: LayerCall) -> Tensor:
        places: dict[str, Any] = self._modules
        ops, hidden = self.ops, call.hidden
        normed = ops.norm(places["norm_attn"], hidden) if self.pre_norm else hidden
        q, k, v = self._heads(normed, call)
        if call.packed is not None:
            attended = ops.attend_packed(q, k, v, call.packed, self.scale)
        else:
            attended = ops.attend(q, k, v, self._mask(call), call.causal, self.scale, self.softcap)
        return self._after(attended, hidden, normed)

    def packs(self, call: LayerCall) -> bool:
        if call.cache is not None or call.bias is not None or call.causal or self.softcap is not None:
            return False
        return self.ops.packs(call.hidden)

    def _heads(self, normed: Tensor, call: LayerCall) -> tuple[Tensor, Tensor, Tensor]:
        """The queries, and all keys and values that there are, in the cache too where one is given."""
        places: dict[str, Any] = self._modules
        ops, norms, linear = self.ops, self.head_norms, places["qkv"]
        apart = call.packed if call.cache is not None else None
        kv = self._open_layer(call.cache) if self.repeat == 1 and apart is None else None
        qkv = ops.project(linear, normed)
        if kv is not None and (found := ops.split_into(qkv, self.shape, call.rope, norms, kv)) is not None:
            return found
        q, k, v = ops.split(qkv, self.shape, call.rope, norms)
        if self.repeat > 1:
            k, v = repeat_heads(k, self.repeat), repeat_heads(v, self.repeat)
        if apart is not None:
            apart.keep(call.cache.layers[self.facts["layer_idx"]], k, v)
        elif call.cache is not None:
            k, v = call.cache.update(k, v, self.facts["layer_idx"])
        return q, k, v

    def _open_layer(self, cache: Any) -> Any:
        """The cache's layer of this layer where whoever computes keys and values may write them to it, else None."""
        layers, index = getattr(cache, "layers", ()), self.facts.get("layer_idx", 0)
        if index >= len(layers) or getattr(cache, "offloading", False):
            return None
        layer = layers[index]
        if type(layer) is DynamicLayer:
            return None if layer.is_initialized else FirstPositions(layer)
        # one with a window keeps the end alone of what is written
        return layer if hasattr(layer, "reserve") and not getattr(layer, "is_sliding", False) else None

    def _mask(self, call: LayerCall) -> Tensor | None:
        if call.bias is None:
            return call.mask
        bias = call.bias.view(call.hidden.shape[0], self.shape.heads, 1, -1)
        return with_bias(call.mask, bias, call.hidden.shape[1], causal=call.causal)

    # places are read from their dict, and linear layers called by `forward`: through torch's own attribute look-up and
    # call a decode step of one layer took 26 us more (2-core Zen 5)

    def _after(self, attended: Tensor, hidden: Tensor, normed: Tensor) -> Tensor:
        """Output projection, residuals, norms and MLP.

        Args:
            attended: [..., heads * head_dim].
            hidden: the layer's input, [..., H].
            normed: what the attention read, [..., H].
        """
        places: dict[str, Any] = self._modules
        ops, out = self.ops, places["out"]
        if self.parallel:
            normed = ops.norm(places["norm_mlp"], hidden) if "norm_mlp" in places else normed
            if self.one_sum:
                return places["down"].add_summands(self._expand(normed), out.summand(attended)).add_(hidden)
            return self._mlp_add(normed, out.add(attended, hidden))
        if self.sandwich:
            hidden = ops.norm(places["norm_attn_out"], out.forward(attended)).add_(hidden)
            return ops.norm(places["norm_mlp_out"], self._mlp(ops.norm(places["norm_mlp"], hidden))).add_(hidden)
        if self.add_to_normed:
            normed = ops.project_normed(out, attended, normed, places["norm_mlp"])
            return self._mlp_add(normed, normed)
        if self.pre_norm:
            normed, hidden = ops.project_norm(out, attended, hidden, places["norm_mlp"])
            return self._mlp_add(normed, hidden)
        return self._mlp_normed(ops.project_normed(out, attended, hidden, places["norm_attn"]))

    def _mlp_normed(self, hidden: Tensor) -> Tensor:
        """norm(mlp(hidden) + hidden), a post-norm layer's end."""
        places: dict[str, Any] = self._modules
        return self.ops.project_normed(places["down"], self._expand(hidden), hidden, places["norm_mlp"])

    def _mlp_add(self, x: Tensor, residual: Tensor) -> Tensor:
        """mlp(x) + residual, which is the layer's own to overwrite, and may be x."""
        if self.kept_mlp:
            return self._mlp(x) + residual
        down: Any = self._modules["down"]
        if x.numel() <= CHUNK * x.shape[-1]:
            return self.ops.project_add_(down, self._expand(x), residual)
        # row by row the same, so that what the MLP holds between its products does not grow with the text
        rows = residual.view(-1, residual.shape[-1])
        for part, into in zip(x.reshape(-1, x.shape[-1]).split(CHUNK), rows.split(CHUNK), strict=True):
            total = self.ops.project_add_(down, self._expand(part[None]), added := into[None])
            if total is not added:
                added.copy_(total)
        return residual

    def _mlp(self, x: Tensor) -> Tensor:
        if self.kept_mlp:
            # a stock module knows three dimensions alone
            result = self.mlp(x if x.dim() == 3 else x.unsqueeze(1))
            return (result[0] if isinstance(result, tuple) else result).view(x.shape)
        down: Any = self._modules["down"]
        return down.forward(self._expand(x))

    def _expand(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.ops.gate(self._modules["gate_up"], x, self.kind)
        return self.ops.activate(self._modules["up"], x, self.kind)


def _wrong_slots(facts: Mapping[str, Any], slots: set[str]) -> str:
    """What is wrong with a set of slots, or ""."""
    if slots & {"up", "gate_up", "down", "mlp"} not in _MLPS:
        return "the MLP is 'up' and 'down', 'gate_up' and 'down', or 'mlp'"
    for pair in ({"q_norm", "k_norm"}, {"norm_attn_out", "norm_mlp_out"}):
        if len(slots & pair) == 1:
            return f"{' and '.join(sorted(pair))} come together"
    if "norm_mlp" not in slots and not facts["parallel"]:
        return "only a parallel layer can do without 'norm_mlp'"
    if not facts["pre_norm"] and (facts["parallel"] or "mlp" in slots or "norm_attn_out" in slots):
        return "a post-norm layer is neither parallel nor sandwiched, and has an MLP of its own"
    if facts["add_to_normed"] and (not facts["pre_norm"] or facts["parallel"] or "norm_attn_out" in slots):
        return "a layer that adds to the normed hidden states is pre-norm, and neither parallel nor sandwiched"
    return ""


class EncoderLayer(TransformerLayer):
    """A layer without a cache."""


class DecoderLayer(TransformerLayer):
    """A layer with a KV cache, and a step of its own for the decode loop.

    Facts beside the shared ones: `layer_idx`, the layer's place in the cache. May be left out: `window`, how many
    positions one sees, itself included; None for all before it. The model's masks say so too: this is for a decode
    step, which has none.
    """

    FACTS: ClassVar[frozenset[str]] = TransformerLayer.FACTS | {"layer_idx"}
    OPTIONAL_FACTS: ClassVar[Mapping[str, Any]] = MappingProxyType({**TransformerLayer.OPTIONAL_FACTS, "window": None})

    def finish(self) -> None:
        super().finish()
        self.window: int | None = self.facts["window"]

    def _takes_cache(self, cache: Any) -> bool:
        # a cache of two halves belongs to cross attention
        return hasattr(cache, "update") and not hasattr(cache, "cross_attention_cache")

    def decode(
        self, hidden: Tensor, kv: Any, rope: Rope | None, mask: Tensor | None, following: NormOp | None = None
    ) -> Tensor:
        """One new position a row; call it where gradients are off.

        Two dimensions on purpose: a linear layer on [B, 1, H] costs two more operations, 14 of 55 us at 1408 x 256 on
        one core of a Zen 3.

        Args:
            hidden: [B, H].
            kv: a preallocated cache layer; grows by one.
            rope: terms of the position, each [1 or B, 1, rotary_dim], or None.
            mask: None, or bool [B, 1, 1, T], True = attend, or additive [1 or B, heads, 1, T]; T counts the new
                position.
            following: the norm that is taken over the result next, if one is.

        Returns:
            [B, H].
        """
        own = self.__dict__
        own["fused_calls"] += 1
        ops, places = self.ops, own["_modules"]
        if self.chained:
            return self._decode_chain(ops, places, hidden, kv, rope, mask, following)
        normed = ops.norm(places["norm_attn"], hidden) if self.pre_norm else hidden
        qkv = places["qkv"].forward(normed)
        options = (self.scale, self.softcap, self.head_norms, self.repeat, self.window)
        attended = ops.step_attention(qkv, self.shape, rope, kv, mask, *options)
        return self._after(attended, hidden, normed)

    def _decode_chain(
        self,
        ops: Any,
        places: dict[str, Any],
        hidden: Tensor,
        kv: Any,
        rope: Rope | None,
        mask: Tensor | None,
        following: NormOp | None,
    ) -> Tensor:
        qkv = ops.norm_project(places["norm_attn"], places["qkv"], hidden)
        options = (self.scale, self.softcap, self.head_norms, self.repeat, self.window)
        attended = ops.step_attention(qkv, self.shape, rope, kv, mask, *options)
        hidden = ops.project_add(places["out"], attended, hidden, places["norm_mlp"])
        up = places["gate_up" if self.gated else "up"]
        expanded = ops.norm_expand(places["norm_mlp"], up, hidden, self.kind, self.gated)
        return ops.project_add(places["down"], expanded, hidden, following)
