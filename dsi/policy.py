"""The public vocabulary of plugin authors: what a policy, a quantizer or a check is made of, and the hooks.

Everything here is frozen data that names classes by string ("package.module:Class"), so that loading a plugin imports
nothing heavy. This module imports attrs and pluggy alone. Past 500 lines: an author reads the vocabulary in one place.

    Policy                 one architecture family
    |-- Block              one layer class: its container, slots, facts and call convention
    |   |-- Slot           Linear, Concat, Packed, Conv, Norm, Keep: which weights of the layer feed which place of the
    |   |                  container
    |   |-- Fact           Config, Attr, Const, Inverse: where a number that the container needs is read
    |   `-- Call           how the parent calls the layer, and what the layer returns
    |-- CausalLM           the parts around the layers, so that decoding can run without the model's own forward
    `-- Context            the longest input, where positions are learned
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import attrs
import pluggy

API_VERSION: tuple[int, int] = (1, 2)
"""(major, minor) of this vocabulary. A plugin loads iff its `DSI_API` has this major and no higher minor."""

hookspec = pluggy.HookspecMarker("dsi")
hookimpl = pluggy.HookimplMarker("dsi")

Split = Literal["column", "row", "none"]


class _ReadOnly(Mapping[str, Any]):
    """A mapping that nobody changes; unlike a proxy it can be copied and pickled with what has it."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._items = dict(given)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return repr(self._items)


def _read_only(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    return _ReadOnly(mapping)


class _Absent:
    """The type of `ABSENT`."""

    def __repr__(self) -> str:
        return "ABSENT"

    def __reduce__(self) -> str:
        return "ABSENT"


ABSENT = _Absent()
"""In `Block.neutral`: there is no such attribute."""


# typed on their own: a type checker cannot read the element type through `converter=tuple`
def _tuple(values: Iterable[Any]) -> tuple[Any, ...]:
    if isinstance(values, str):
        raise TypeError(f"a sequence is wanted, and {values!r} is one string: write ({values!r},)")
    return tuple(values)


def _names(values: Iterable[str]) -> frozenset[str]:
    return frozenset(_tuple(values))


@attrs.frozen(kw_only=True)
class Refusal:
    """Why a policy does not take a model, in words for its user.

    Args:
        reason: what was found, e.g. "add_cross_attention=True is not implemented by the decoder container".
        hint: what would do; may be empty.
    """

    reason: str
    hint: str = ""


# --- facts --------------------------------------------------------------------------------------------------------


@attrs.frozen
class Config:
    """A fact read from the model's config by exact attribute; an absent one is a refusal, never a default."""

    name: str


@attrs.frozen
class Attr:
    """A fact read from the layer itself by dotted attribute, e.g. `Attr("self_attn.scaling")`."""

    path: str


@attrs.frozen
class Const:
    """A fact that holds for the whole architecture."""

    value: Any


@attrs.frozen
class Inverse:
    """A fact that is 1 over another one, e.g. a scale where the layer holds the divisor."""

    of: Config | Attr | Const


Fact = Config | Attr | Const | Inverse


# --- slots --------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Slot:
    """Base of all slots."""

    def sources(self) -> tuple[str, ...]:
        """Paths of the layer's submodules whose parameters this slot consumes."""
        raise NotImplementedError


@attrs.frozen(init=False)
class Linear(Slot):
    """One linear layer.

    Args:
        path: the submodule, e.g. "self_attn.o_proj".
        split: how tensor parallelism cuts it: "column" (output rows), "row" (input columns) or "none".
        transposed: the weight is stored [in, out] (Conv1D).
        cls: the class the submodule must be ("module:Class") where it is a linear layer of the architecture's own that
            computes x @ W.T + b; "" for torch's Linear, or Conv1D where transposed; "linear or 1x1" for torch's Linear
            or a convolution of 1 x 1 in its place.
        shared: a name for products over an input that many layers of one model get: layers with that name and width
            are computed in one product by the first that sees the input, and the others read their rows of it. What
            came of an input is kept while the same tensor, unchanged, comes back.
    """

    path: str
    split: Split
    transposed: bool
    cls: str
    shared: str

    def __init__(
        self, path: str, *, split: Split = "none", transposed: bool = False, cls: str = "", shared: str = ""
    ) -> None:
        self.__attrs_init__(path=path, split=split, transposed=transposed, cls=cls, shared=shared)

    def sources(self) -> tuple[str, ...]:
        return (self.path,)


@attrs.frozen(init=False)
class Concat(Slot):
    """Several linear layers over one input, fused into one by stacking their output rows in the order given.

    Args:
        paths: the submodules, e.g. "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj".
        split: see `Linear`.
        transposed: the weights are stored [in, out].
        cls: see `Linear`.
        shared: see `Linear`.
    """

    paths: tuple[str, ...]
    split: Split
    transposed: bool
    cls: str
    shared: str

    def __init__(
        self, *paths: str, split: Split = "none", transposed: bool = False, cls: str = "", shared: str = ""
    ) -> None:
        if len(paths) < 2:
            raise ValueError(f"Concat needs two paths or more, got {paths}; use Linear for one")
        self.__attrs_init__(paths=paths, split=split, transposed=transposed, cls=cls, shared=shared)

    def sources(self) -> tuple[str, ...]:
        return self.paths


@attrs.frozen(init=False)
class Packed(Slot):
    """A linear layer whose output rows the checkpoint already holds fused.

    Args:
        path: the submodule, e.g. "attn.c_attn".
        layout: "thirds": all q rows, then all k rows, then all v rows;
            "head_interleaved": for each head its q, k and v rows;
            "kv_grouped": for each kv head its query heads' rows, then its k rows, then its v rows;
            "halves": all gate rows, then all up rows.
        split: see `Linear`.
        transposed: the weight is stored [in, out].
        cls: see `Linear`.
    """

    path: str
    layout: Literal["thirds", "head_interleaved", "kv_grouped", "halves"]
    split: Split
    transposed: bool
    cls: str

    def __init__(
        self,
        path: str,
        *,
        layout: Literal["thirds", "head_interleaved", "kv_grouped", "halves"],
        split: Split = "none",
        transposed: bool = False,
        cls: str = "",
    ) -> None:
        self.__attrs_init__(path=path, layout=layout, split=split, transposed=transposed, cls=cls)

    def sources(self) -> tuple[str, ...]:
        return (self.path,)


@attrs.frozen(init=False)
class Conv(Slot):
    """A convolution over maps [B, C, H, W]: torch's Conv2d, padded with zeros.

    Its weight is held channels-last, or as the device multiplies it fastest; `state_dict` and `restore` give it back
    as it was.

    Args:
        path: the submodule, e.g. "conv1"; "" where the layer itself is the convolution.
    """

    path: str

    def __init__(self, path: str) -> None:
        self.__attrs_init__(path=path)

    def sources(self) -> tuple[str, ...]:
        return (self.path,)


@attrs.frozen(init=False)
class Norm(Slot):
    """A normalization over the hidden dimension.

    Args:
        path: the submodule, e.g. "input_layernorm"; "" where the layer itself is the norm.
        kind: "layer" (mean and variance, weight and bias), "rms" (mean square, weight), or "group" (mean and variance
            of groups of channels of a map, weight and bias; how many is read from the submodule).
        eps: the attribute of the submodule that holds epsilon.
        cls: for "rms", the class the submodule must be ("module:Class"); "layer" needs `torch.nn.LayerNorm` and
            "group" `torch.nn.GroupNorm`.
        offset: for "rms", added to the weight; where it is not 0 the product is taken in fp32, before the cast back
            (Gemma: 1.0).
    """

    path: str
    kind: Literal["layer", "rms", "group"]
    eps: str
    cls: str
    offset: float

    def __init__(
        self,
        path: str,
        *,
        kind: Literal["layer", "rms", "group"] = "layer",
        eps: str = "eps",
        cls: str = "torch.nn.modules.normalization:LayerNorm",
        offset: float = 0.0,
    ) -> None:
        if kind == "group":
            cls = "torch.nn.modules.normalization:GroupNorm"
        self.__attrs_init__(path=path, kind=kind, eps=eps, cls=cls, offset=offset)

    def sources(self) -> tuple[str, ...]:
        return (self.path,)


@attrs.frozen(init=False)
class Keep(Slot):
    """A submodule that the container calls as it is: its weights stay where they are and as they are.

    Layers inside it that a policy claims are replaced on their own.

    Args:
        path: the submodule, e.g. "mlp" of a mixture of experts. The place it fills must have the same name.
    """

    path: str

    def __init__(self, path: str) -> None:
        self.__attrs_init__(path=path)

    def sources(self) -> tuple[str, ...]:
        return (self.path,)


# --- blocks and policies ------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class RotaryTable:
    """Rotary terms that each layer reads for itself, at the positions that it is given.

    Args:
        path: the layer's buffer, [positions, rotary_dim]: in each row the sines of all pairs, then their cosines.
        positions: name of the argument of position ids, [1 or B, S].
    """

    path: str
    positions: str = "position_ids"


@attrs.frozen(kw_only=True)
class Call:
    """How the parent calls a layer. The first positional argument is always the hidden states, [B, S, H], or the map,
    [B, C, H, W].

    Args:
        mask: name of the attention mask argument; "" where there is none.
        cache: name of the KV cache argument; "" where there is none.
        rope: name of the (cos, sin) argument, or the table that the layer has itself; "" for models without rotary
            embedding.
        bias: name of an argument of biases, [B * heads, 1, keys], which are added to the scaled scores; "" where there
            is none.
        inputs: what else the container takes -> name of its argument, for containers of maps.
        free: arguments that change nothing the container computes; any value is fine.
        returns: "tensor"; "tuple" for (hidden states, attention weights or None); "single" for (map,), under
            `return_dict=False`; "pair" for (context or None, hidden states), of containers of two sequences.
        attention: attention implementations under which the layer computes what the container does.
    """

    mask: str = "attention_mask"
    cache: str = "past_key_values"
    rope: str | RotaryTable = ""
    bias: str = ""
    inputs: Mapping[str, str] = attrs.field(converter=_read_only, factory=dict)
    free: frozenset[str] = attrs.field(
        default=frozenset({"position_ids", "use_cache", "output_router_logits"}), converter=_names
    )
    returns: Literal["tensor", "tuple", "single", "pair"] = "tensor"
    attention: frozenset[str] = attrs.field(default=frozenset({"sdpa", "eager"}), converter=_names)


@attrs.frozen(kw_only=True)
class Block:
    """One layer class and the container that stands in for it.

    Args:
        layer: the class that is replaced, "module:Class"; matched exactly, wherever it stands in the model.
        container: "module:Class", or the name of a registered container.
        slots: container place -> weights. A place that the container can do without is empty where an attribute on the
            way to its submodule is None.
        facts: container fact -> where it is read.
        call: the layer's call convention.
        ignore: submodule paths whose parameters are left out on purpose.
        inside: only layers that an instance of one of these classes ("module:Class") holds, directly or in lists and
            dictionaries of modules; () for wherever they stand. For classes that belong to no architecture.
        neutral: dotted attribute of the layer -> the one value, or `ABSENT`, under which it computes what the container
            does. Any other value leaves the layer stock, and a later change of it runs the stock computation. What is
            None on the layer is not asked for attributes of its own.
    """

    layer: str
    container: str
    slots: Mapping[str, Slot] = attrs.field(converter=_read_only)
    facts: Mapping[str, Fact] = attrs.field(converter=_read_only, factory=dict)
    call: Call = Call()
    ignore: tuple[str, ...] = attrs.field(converter=_tuple, default=())
    inside: tuple[str, ...] = attrs.field(converter=_tuple, default=())
    neutral: Mapping[str, Any] = attrs.field(converter=_read_only, factory=dict)


@attrs.frozen(kw_only=True)
class Positions:
    """A learned position embedding: `weight[position_ids + offset]` is added to the token embedding."""

    path: str
    offset: int = 0


@attrs.frozen(kw_only=True)
class Rotary:
    """The module that turns (hidden states, position_ids) into (cos, sin).

    Args:
        path: the submodule, e.g. "model.rotary_emb".
        static_when: values of its `rope_type` attribute under which (cos, sin) depend on the position alone, so that
            they may be read from a table.
    """

    path: str
    static_when: frozenset[str] = attrs.field(default=frozenset(), converter=_names)


@attrs.frozen(kw_only=True)
class Alibi:
    """Biases that the model makes of the attention mask: for each head its slope times the key's position.

    The position of a key is the number of unmasked keys before it, and 0 where it is masked itself. The slopes are the
    powers that Press et al. 2022 give, https://arxiv.org/abs/2108.12409.

    Args:
        rounded: the torch dtype that slopes and products are rounded to, e.g. "bfloat16"; "" for float32.
        scaled: the biases are multiplied by the layers' scale, as q.k is.
    """

    rounded: str = ""
    scaled: bool = False


@attrs.frozen(kw_only=True)
class CausalLM:
    """The parts of a language model around its layers, for decoding without the model's own forward.

    hidden = embed(ids) [-> project_in] [-> embed_norm] [+ positions]; layers; [norm]; [project_out]
    logits = head(hidden) [, capped]

    Args:
        model: the class this holds for, "module:Class"; matched exactly.
        embed, layers, head: submodule paths.
        norm: the norm after the layers; None, or an attribute that is None on the model, where there is none.
        project_in, project_out: submodule paths; "", or an attribute that is None on the model, where there is none.
        embed_norm: a norm over what is embedded.
        positions, rotary, alibi: how the model knows positions. A `RotaryTable` of the layers is found by itself.
        context: config attribute that holds the largest number of positions, prompt and new tokens together; "" where
            the model has no such limit.
        logit_cap: read from the config, the cap c of logits c * tanh(logits / c); None, also as the value read, for
            logits as they are.
        overrides: methods of generation that the model's class has of its own, by name, each with the number of
            positions, read from the config, up to which it does what transformers' own does; None for any number.
            Longer texts, and classes with a method that is not named here, take transformers' loop.
    """

    model: str
    embed: str
    layers: str
    head: str
    norm: Norm | None = None
    positions: Positions | None = None
    rotary: Rotary | None = None
    project_in: str = ""
    project_out: str = ""
    context: str = "max_position_embeddings"
    embed_norm: Norm | None = None
    alibi: Alibi | None = None
    logit_cap: Config | Const | None = None
    overrides: Mapping[str, Config | Const] = attrs.field(converter=_read_only, factory=dict)


@attrs.frozen(kw_only=True)
class Context:
    """The longest input that a model with learned positions takes; one more is an index out of range.

    Args:
        config: config attribute that holds the number of position embeddings.
        after: config attribute that holds the embedding row after which the tokens' rows begin (RoBERTa: the padding
            id); "" where they begin at the first.
    """

    config: str = "max_position_embeddings"
    after: str = ""


def _accepts_all(config: Any) -> Refusal | None:
    return None


@attrs.frozen(kw_only=True)
class Entries:
    """The parts of a model that its callers really run, where that is not the model's own forward.

    Each of them gets CUDA graphs of its own, and the model around them none: it may be called by other methods, or read
    back from the device.

    Args:
        model: the class this holds for, "module:Class"; matched exactly.
        parts: submodule paths.
    """

    model: str
    parts: tuple[str, ...] = attrs.field(converter=_tuple)


@attrs.frozen(kw_only=True)
class Policy:
    """Everything dsi knows of one architecture family.

    Args:
        name: unique in its plugin; users write "<plugin>:<name>".
        blocks: one per layer class.
        requires: PEP 508 requirements that must be met, e.g. "transformers>=5.6".
        supports: (config) -> Refusal where this config's variant is not implemented, else None.
        models: language models that decode with these layers.
        entries: models with these layers that are run part by part.
        context: the longest input, where positions are learned; None where any length runs.
        priority: among several applicable policies for one layer class the highest wins.
        replaces: full names of policies that this one may outrank, e.g. ("acme:decoder",).
    """

    name: str
    blocks: tuple[Block, ...] = attrs.field(converter=_tuple)
    requires: tuple[str, ...] = attrs.field(converter=_tuple, default=())
    supports: Callable[[Any], Refusal | None] = attrs.field(default=_accepts_all)
    models: tuple[CausalLM, ...] = attrs.field(converter=_tuple, default=())
    entries: tuple[Entries, ...] = attrs.field(converter=_tuple, default=())
    context: Context | None = None
    priority: int = 0
    replaces: tuple[str, ...] = attrs.field(converter=_tuple, default=())

    @blocks.validator
    def _at_least_one(self, _attribute: attrs.Attribute[Any], value: tuple[Block, ...]) -> None:
        if not value or not all(isinstance(block, Block) for block in value):
            raise ValueError(f"policy {self.name!r}: blocks must be one Block or more, got {value!r}")


@attrs.frozen(kw_only=True)
class Container:
    """A replacement layer that a plugin brings.

    Args:
        name: unique in its plugin; blocks write "<plugin>:<name>".
        impl: "module:Class", a `dsi.containers` container class.
    """

    name: str
    impl: str


@attrs.frozen(kw_only=True)
class Quantizer:
    """A weight format that a plugin brings; it works on slots, whatever the architecture.

    Args:
        name: unique in its plugin.
        impl: "module:Class".
        bits: stored bits a weight, scales included, as a float.
        schema: version of the stored form, saved with the weights.
    """

    name: str
    impl: str
    bits: float
    schema: int = 1


@attrs.frozen(kw_only=True)
class Check:
    """One more check of the conformance kit.

    Args:
        name: unique in its plugin.
        impl: "module:function".
    """

    name: str
    impl: str


# --- hooks --------------------------------------------------------------------------------------------------------


@hookspec
def dsi_register_policies(register: Callable[[Policy], None], api: tuple[int, int]) -> None:
    """Call `register` once for each policy of the plugin."""


@hookspec
def dsi_register_containers(register: Callable[[Container], None], api: tuple[int, int]) -> None:
    """Call `register` once for each container of the plugin."""


@hookspec
def dsi_register_quantizers(register: Callable[[Quantizer], None], api: tuple[int, int]) -> None:
    """Call `register` once for each quantizer of the plugin."""


@hookspec
def dsi_register_checks(register: Callable[[Check], None], api: tuple[int, int]) -> None:
    """Call `register` once for each conformance check of the plugin."""
