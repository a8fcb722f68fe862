"""Containers that are broken around their operations, each in one way: residuals, caches, weights, manners."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from dsi.containers import DecoderLayer
from dsi.containers.ops import Rope, rotate
from dsi.containers.stand_in import _HOOK_TABLES

# --- residuals and slots ----------------------------------------------------------------------------------------------


class ResidualFromNormed(DecoderLayer):
    def _after(self, attended, hidden, normed):
        return super()._after(attended, normed, normed)


class ResidualLost(DecoderLayer):
    def _after(self, attended, hidden, normed):
        return super()._after(attended, torch.zeros_like(hidden), normed)


class ResidualTwice(DecoderLayer):
    def _after(self, attended, hidden, normed):
        return super()._after(attended, hidden, normed) + hidden


class MlpResidualLost(DecoderLayer):
    def _mlp_add(self, x, residual):
        return super()._mlp_add(x, torch.zeros_like(residual))


class MlpResidualNormed(DecoderLayer):
    def _mlp_add(self, x, residual):
        return super()._mlp_add(x, x)


class PostNormOrder(DecoderLayer):
    """Attention reads what is not normalized."""

    def run(self, call):
        self.pre_norm = False
        try:
            return super().run(call)
        finally:
            self.pre_norm = True


class _Reweighed(DecoderLayer):
    """Changes a slot once it is filled."""

    def finish(self):
        super().finish()
        if not self.__dict__.get("changed"):
            self.changed = True
            with torch.no_grad():
                self.change()

    def change(self):
        raise NotImplementedError


class LostBias(_Reweighed):
    def change(self):
        self.out.bias.zero_()


class LostKeyBias(_Reweighed):
    def change(self):
        heads = self.facts["heads"] * self.facts["head_dim"]
        self.qkv.bias[heads : heads + self.facts["kv_heads"] * self.facts["head_dim"]] = 0


class TransposedWeight(_Reweighed):
    def change(self):
        weight = self.down.weight
        weight.copy_(weight.t().clone().reshape(weight.shape))


class RowsReversed(_Reweighed):
    def change(self):
        self.qkv.weight.copy_(self.qkv.weight.flip(0).clone())


# --- caches -----------------------------------------------------------------------------------------------------------


def _filled(call: Any, layer: int) -> bool:
    return call.cache is not None and call.cache.get_seq_length(layer) > 0


class CacheNotUpdated(DecoderLayer):
    """A new token sees itself alone."""

    def run(self, call):
        filled = _filled(call, self.facts["layer_idx"]) and call.hidden.shape[1] == 1
        return super().run(call._replace(cache=None, mask=None) if filled else call)


class CacheOfOneRowNotUpdated(DecoderLayer):
    """As `CacheNotUpdated`, in a batch of one."""

    def run(self, call):
        filled = _filled(call, self.facts["layer_idx"]) and call.hidden.shape[:2] == (1, 1)
        return super().run(call._replace(cache=None, mask=None) if filled else call)


class _Through:
    """A cache seen through something."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def get_seq_length(self, layer: int = 0) -> int:
        return self.cache.get_seq_length(layer)


class _TurnedLate(_Through):
    def __init__(self, cache: Any, rope: Rope) -> None:
        super().__init__(cache)
        self.rope = rope

    def update(self, k, v, layer, *rest):
        back = Rope.of(self.rope.cos, -self.rope.sin)
        k, v = self.cache.update(rotate(k, back, heads_at=1), v, layer, *rest)
        terms = self.rope
        if k.shape[2] != terms.cos.shape[1]:
            terms = Rope.of(terms.cos[:, -1:], terms.sin[:, -1:])
        return rotate(k, terms, heads_at=1), v


class RopeAfterCache(DecoderLayer):
    """Keys are cached as they are, and turned by the position at hand when they are read."""

    def run(self, call):
        if call.cache is None:
            return super().run(call)
        return super().run(call._replace(cache=_TurnedLate(call.cache, call.rope)))


class _OwnKeys(_Through):
    def __init__(self, cache: Any, kept: dict[str, Any]) -> None:
        super().__init__(cache)
        self.kept = kept

    def update(self, k, v, layer, *rest):
        first = self.get_seq_length(layer) == 0
        self.cache.update(k, v, layer, *rest)
        if not first:
            k, v = torch.cat((self.kept["k"], k), 2), torch.cat((self.kept["v"], v), 2)
        self.kept.update(k=k, v=v)
        return k, v


class BeamsNotReordered(DecoderLayer):
    """Keeps keys of its own beside the cache: who reorders the cache does not reorder them."""

    def run(self, call):
        # six rows: two texts of three beams
        if call.cache is None or call.hidden.shape[0] != 6:
            return super().run(call)
        kept = self.__dict__.setdefault("kept", {})
        return super().run(call._replace(cache=_OwnKeys(call.cache, kept)))


class NewestKeyNotSeen(DecoderLayer):
    """Reads the cache before it is updated."""

    class Late(_Through):
        def update(self, k, v, layer, *rest):
            had = self.get_seq_length(layer)
            keys, values = self.cache.update(k, v, layer, *rest)
            return (keys, values) if not had else (keys[:, :, :had], values[:, :, :had])

    def run(self, call):
        if not _filled(call, self.facts["layer_idx"]) or call.hidden.shape[1] > 1:
            return super().run(call)
        mask = None if call.mask is None else call.mask[..., :-1]
        return super().run(call._replace(cache=self.Late(call.cache), mask=mask))


class StepWithoutBias(DecoderLayer):
    """The step of the decode loop forgets a bias."""

    def decode(self, hidden, kv, rope, mask, *rest):
        bias, self.out.bias.data = self.out.bias.data, torch.zeros_like(self.out.bias)
        try:
            return super().decode(hidden, kv, rope, mask, *rest)
        finally:
            self.out.bias.data = bias


class StepIgnoresMask(DecoderLayer):
    """The step of the decode loop attends to padding."""

    def decode(self, hidden, kv, rope, mask, *rest):
        return super().decode(hidden, kv, rope, None, *rest)


# --- what a container is ----------------------------------------------------------------------------------------------


class AlwaysStock(DecoderLayer):
    def _understand(self, args, kwargs):
        return None


class StockIn16Bits(DecoderLayer):
    def _understand(self, args, kwargs):
        return None if self.dtype is torch.bfloat16 else super()._understand(args, kwargs)


class StockOverACache(DecoderLayer):
    """Knows only a cache that is empty."""

    def _understand(self, args, kwargs):
        call = super()._understand(args, kwargs)
        return None if call is None or _filled(call, self.facts["layer_idx"]) else call


class OtherForm(DecoderLayer):
    """Holds a weight in another form than planned."""

    def finish(self):
        super().finish()
        linear = self.out
        linear._hold(linear.dense_weight(), "columns" if linear.form == "aten" else "aten")


class OneMorePlace(DecoderLayer):
    """Holds a module that nobody planned."""

    def finish(self):
        super().finish()
        if "more" not in self._modules:
            self.more = nn.Identity()


class InputOverwritten(DecoderLayer):
    def run(self, call):
        return call.hidden.copy_(super().run(call))


class HooksLost(DecoderLayer):
    def finish(self):
        super().finish()
        for table in _HOOK_TABLES:
            self.__dict__[table] = OrderedDict()


class RecordersNotSeen(DecoderLayer):
    """Nobody asks whether attentions are recorded."""

    def _plain_context(self):
        return True


class AttentionsForgotten(DecoderLayer):
    """Takes no notice of `output_attentions`, by whichever way."""

    def _plain_context(self):
        return True

    def _free(self, name, value):
        return True


class ReturnsATuple(DecoderLayer):
    def forward(self, *args, **kwargs):
        return (super().forward(*args, **kwargs),)


# --- weights in and out -----------------------------------------------------------------------------------------------


class _Saves(DecoderLayer):
    """Writes a state of its own."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        found: dict[str, Any] = {}
        super()._save_to_state_dict(found, prefix, keep_vars)
        destination.update(self.saved(found, prefix))

    def saved(self, found, prefix):
        raise NotImplementedError


class NamesInAnotherOrder(_Saves):
    def saved(self, found, prefix):
        return dict(reversed(found.items()))


class NameLost(_Saves):
    def saved(self, found, prefix):
        return {name: tensor for name, tensor in found.items() if not name.endswith("k_proj.bias")}


class NameRenamed(_Saves):
    def saved(self, found, prefix):
        return {name.replace("o_proj", "out_proj"): tensor for name, tensor in found.items()}


class SavedTransposed(_Saves):
    def saved(self, found, prefix):
        name = prefix + "mlp.down_proj.weight"
        return {**found, name: found[name].t().reshape(found[name].shape)}


class SavedThroughMemory(_Saves):
    """Two names share one memory, as they do nowhere in stock."""

    def saved(self, found, prefix):
        names = [prefix + name for name in ("self_attn.k_proj.weight", "self_attn.v_proj.weight")]
        both = torch.stack([found[name] for name in names], dim=-1)
        return {**found, **{name: both[..., index] for index, name in enumerate(names)}}


class LoadForgotten(DecoderLayer):
    """Takes no new weights."""

    def _take(self, tensors):
        pass


class DerivedKept(DecoderLayer):
    """Keeps what it made of a weight, and does not see another one."""

    def finish(self):
        super().finish()
        if "shift" not in self._buffers:
            self.register_buffer("shift", self.out.bias.detach().clone(), persistent=False)

    def _after(self, attended, hidden, normed):
        return super()._after(attended, hidden + self.shift - self.out.bias, normed)


class SecondCopy(DecoderLayer):
    def finish(self):
        super().finish()
        if "spare" not in self.__dict__:
            self.__dict__["spare"] = [p.detach().clone() for p in self.parameters()]


class OriginalsKept(DecoderLayer):
    """Keeps the stock weights alive through views taken before they were parked."""

    def __init__(self, original, *rest):
        super().__init__(original, *rest)
        self.__dict__["before"] = [p.data.view(p.shape) for p in original.parameters()]


# --- manners ----------------------------------------------------------------------------------------------------------


class MarksTheOriginal(DecoderLayer):
    def finish(self):
        super().finish()
        self.original.seen_by_dsi = True


class ChangesTheOriginal(DecoderLayer):
    def finish(self):
        super().finish()
        self.original.mlp.act_fn = nn.SiLU()


def _nothing(module: Any, args: Any) -> None:
    """A hook."""


class HookLeft(DecoderLayer):
    def finish(self):
        super().finish()
        if not self.original._forward_pre_hooks:
            self.original.register_forward_pre_hook(_nothing)


class ConfigChanged(DecoderLayer):
    def finish(self):
        super().finish()
        if self.model_config is not None:
            self.model_config.fused_by = "dsi"


class MarksTheClass(DecoderLayer):
    def finish(self):
        super().finish()
        type(self).original_class.fused_by = "dsi"


class PatchesTheClass(DecoderLayer):
    """Every model of the class runs another forward."""

    def finish(self):
        super().finish()
        cls = type(self).original_class
        stock = cls.forward
        if not hasattr(stock, "patched"):

            def forward(self, *args, **kwargs):
                return stock(self, *args, **kwargs)

            forward.patched = True
            cls.forward = forward


class PatchesTheModule(DecoderLayer):
    def finish(self):
        super().finish()
        import transformers.models.llama.modeling_llama as module

        stock = module.rotate_half
        if not hasattr(stock, "patched"):

            def rotate_half(x):
                return stock(x)

            rotate_half.patched = True
            module.rotate_half = rotate_half


class CopyIsTheSame(DecoderLayer):
    def __deepcopy__(self, memo):
        return self


class NotPicklable(DecoderLayer):
    def finish(self):
        super().finish()
        self.__dict__["later"] = lambda: None


class StaleDtype(DecoderLayer):
    """Keeps a tensor of the first dtype."""

    def finish(self):
        super().finish()
        if "zero" not in self.__dict__:
            self.__dict__["zero"] = torch.zeros((), dtype=self.dtype).view(1)

    def run(self, call):
        return super().run(call) + self.zero


class StaleDevice(DecoderLayer):
    """Keeps a tensor on the device where the layer was last, but for the host."""

    def finish(self):
        super().finish()
        weight = next(self.parameters())
        if weight.is_cuda:
            self.__dict__["zero"] = torch.zeros(1, device=weight.device)

    def run(self, call):
        zero = self.__dict__.get("zero")
        return super().run(call) if zero is None else super().run(call) + zero.to(call.hidden.dtype)


class ReadsBack(DecoderLayer):
    """Waits for the device within a call."""

    def run(self, call):
        if float(call.hidden.sum()) != float("inf"):
            return super().run(call)
        return call.hidden


# --- ranks ------------------------------------------------------------------------------------------------------------


class PartExportedWrong(DecoderLayer):
    """Gives a part's rows back in another order."""

    def export(self):
        found = super().export()
        if hasattr(self, "shard"):
            found["self_attn.q_proj.weight"] = found["self_attn.q_proj.weight"].flip(0)
        return found


class WrongAmongProcesses(DecoderLayer):
    def run(self, call):
        result = super().run(call)
        return result * 1.01 if dist.is_available() and dist.is_initialized() else result


class PartOfTheWholeScale(DecoderLayer):
    """Reckons with the heads of one rank where those of all are meant."""

    def finish(self):
        super().finish()
        if hasattr(self, "shard"):
            self.scale = self.scale * self.shard.size


class SaysNoSharding(DecoderLayer):
    SHARDING: ClassVar[Mapping[str, str]] = MappingProxyType({"qkv": "qkv", "out": "heads"})
