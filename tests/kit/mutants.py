"""Broken policies, containers and shard rules: what the kit must find.

Each says which checks must kill it. `alone` says that no other check may: the mutant proves that its check is needed.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import attrs
import torch

from dsi.policy import Attr, Block, Call, Concat, Config, Const, Linear, Norm, Packed, Policy, Positions, Refusal
from dsi.testing import Subject
from tests.kit import broken_maps as maps
from tests.kit import broken_rules as rules
from tests.kit.subjects import SUBJECTS


@attrs.frozen(kw_only=True)
class Mutant:
    """Something that is broken.

    Args:
        name: what is wrong.
        by: checks that must kill it.
        alone: these and no other may.
        family: of `SUBJECTS`.
        change: the whole policy -> the broken one.
        around: what is broken beside the policy while the checks run.
        plugin: module of `tests.kit.plugins` whose policy is the broken one.
        needs: "cuda", or "" for what any machine can find.
    """

    name: str
    by: tuple[str, ...]
    alone: bool = False
    family: str = "llama"
    change: Callable[[Policy], Policy] = lambda policy: policy
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    plugin: str = ""
    needs: str = ""

    @property
    def runs_here(self) -> bool:
        """Whether this machine can show it."""
        return not self.needs or torch.cuda.is_available()

    @contextlib.contextmanager
    def subject(self) -> Iterator[Subject]:
        """What the checks are given, while it is broken."""
        whole, config = SUBJECTS[self.family]
        module = f"tests.kit.plugins.{self.plugin}" if self.plugin else ""
        policy = importlib.import_module(module).POLICY if module else self.change(whole())
        with rules.classes_kept(), self.around():
            yield Subject(policy, config, module=module)


# --- ways to break a policy -------------------------------------------------------------------------------------------


def block(change: Callable[[Block], Block]) -> Callable[[Policy], Policy]:
    return lambda policy: attrs.evolve(policy, blocks=[change(policy.blocks[0])])


def with_slots(**slots: Any) -> Callable[[Policy], Policy]:
    """Other slots; None takes one out."""

    def change(one: Block) -> Block:
        merged = {place: slot for place, slot in {**one.slots, **slots}.items() if slot is not None}
        return attrs.evolve(one, slots=merged)

    return block(change)


def with_facts(**facts: Any) -> Callable[[Policy], Policy]:
    return block(lambda one: attrs.evolve(one, facts={**one.facts, **facts}))


def with_block(**fields: Any) -> Callable[[Policy], Policy]:
    return block(lambda one: attrs.evolve(one, **fields))


def with_parts(**fields: Any) -> Callable[[Policy], Policy]:
    return lambda policy: attrs.evolve(policy, models=[attrs.evolve(policy.models[0], **fields)])


def with_policy(**fields: Any) -> Callable[[Policy], Policy]:
    return lambda policy: attrs.evolve(policy, **fields)


def in_ops(name: str) -> Callable[[Policy], Policy]:
    return with_block(container=f"tests.kit.broken_ops:{name}")


def in_layer(name: str) -> Callable[[Policy], Policy]:
    return with_block(container=f"tests.kit.broken_layers:{name}")


def in_map(name: str, container: str) -> Callable[[Policy], Policy]:
    """The block that has this container of dsi's gets a broken one."""

    def change(policy: Policy) -> Policy:
        blocks = [
            attrs.evolve(one, container=f"tests.kit.broken_maps:{name}")
            if one.container.endswith(f":{container}")
            else one
            for one in policy.blocks
        ]
        return attrs.evolve(policy, blocks=blocks)

    return change


def with_map_slots(container: str, **slots: Any) -> Callable[[Policy], Policy]:
    """Other slots of the block that has this container."""

    def change(policy: Policy) -> Policy:
        blocks = [
            attrs.evolve(one, slots={**one.slots, **slots}) if one.container.endswith(f":{container}") else one
            for one in policy.blocks
        ]
        return attrs.evolve(policy, blocks=blocks)

    return change


def refuses(config: Any) -> Refusal:
    return Refusal(reason="nothing is implemented")


def wants_fp32(config: Any) -> Refusal | None:
    return None if config.dtype is torch.float32 else Refusal(reason=f"{config.dtype} is not implemented")


_LLAMA = "transformers.models.llama.modeling_llama:"
_RMS = {"kind": "rms", "eps": "variance_epsilon", "cls": _LLAMA + "LlamaRMSNorm"}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_NUMBERS = ("numerics_fp32",)
_CACHE = ("decode_equals_full",)
_SPLIT = ("tp_shards_reassemble", "tp_equals_single")
_TP = ("tp_equals_single",)

# --- the mapping ------------------------------------------------------------------------------------------------------

MAPPING = (
    Mutant(
        name="norms swapped",
        by=_NUMBERS,
        change=with_slots(norm_attn=Norm("post_attention_layernorm", **_RMS), norm_mlp=Norm("input_layernorm", **_RMS)),
    ),
    Mutant(
        name="encoder norms swapped",
        by=_NUMBERS,
        family="bert",
        change=with_slots(norm_attn=Norm("output.LayerNorm"), norm_mlp=Norm("attention.output.LayerNorm")),
    ),
    Mutant(
        name="k and v swapped", by=_NUMBERS, change=with_slots(qkv=Concat(_QKV[0], _QKV[2], _QKV[1], split="column"))
    ),
    Mutant(
        name="gate and up swapped",
        by=_NUMBERS,
        change=with_slots(gate_up=Concat("mlp.up_proj", "mlp.gate_proj", split="column")),
    ),
    Mutant(
        name="fused projection read head by head",
        by=_NUMBERS,
        family="gpt2",
        change=with_slots(qkv=Packed("attn.c_attn", layout="head_interleaved", split="column", transposed=True)),
    ),
    Mutant(
        name="norm weight with an offset",
        by=_NUMBERS,
        change=with_slots(norm_attn=Norm("input_layernorm", offset=1.0, **_RMS)),
    ),
    Mutant(name="gelu for silu", by=_NUMBERS, change=with_facts(activation=Const("gelu"))),
    Mutant(name="tanh gelu for erf gelu", by=_NUMBERS, family="bert", change=with_facts(activation=Const("gelu_new"))),
    Mutant(name="erf gelu for tanh gelu", by=_NUMBERS, family="gpt2", change=with_facts(activation=Const("gelu"))),
    Mutant(name="decoder that is not causal", by=_NUMBERS, change=with_facts(causal=Const(False))),
    Mutant(name="encoder that is causal", by=_NUMBERS, family="bert", change=with_facts(causal=Const(True))),
    Mutant(name="pre-norm for post-norm", by=_NUMBERS, family="bert", change=with_facts(pre_norm=Const(True))),
    Mutant(name="post-norm for pre-norm", by=_NUMBERS, change=with_facts(pre_norm=Const(False))),
    Mutant(name="another scale", by=_NUMBERS, change=with_facts(scale=Const(0.3))),
    Mutant(name="kv heads taken for heads", by=_NUMBERS, change=with_facts(kv_heads=Config("num_attention_heads"))),
    Mutant(
        name="half the heads, twice as wide",
        by=_NUMBERS,
        change=with_facts(heads=Const(4), kv_heads=Const(2), head_dim=Const(32)),
    ),
    Mutant(name="all layers share one cache layer", by=_CACHE, change=with_facts(layer_idx=Const(0))),
    Mutant(name="rope not handed on", by=("plan_is_true",), change=with_block(call=Call(mask="attention_mask"))),
    Mutant(
        name="an argument that is not free",
        by=("plan_is_true",),
        change=with_block(call=Call(rope="position_embeddings", free=("use_cache",))),
    ),
    Mutant(
        name="final norm left out of the decode loop", by=("greedy_generate",), alone=True, change=with_parts(norm=None)
    ),
    Mutant(
        name="positions off by two in the decode loop",
        by=("greedy_generate",),
        family="opt",
        change=with_parts(positions=Positions(path="model.decoder.embed_positions")),
    ),
    Mutant(
        name="positions left out of the decode loop",
        by=("greedy_generate",),
        family="gpt2",
        change=with_parts(positions=None),
    ),
)

# --- policies that say the wrong thing --------------------------------------------------------------------------------

WORDS = (
    Mutant(
        name="a fact that no container knows",
        by=("applies",),
        alone=True,
        change=with_facts(nonsense=Const(1)),
    ),
    Mutant(name="requirement unmet", by=("applies",), alone=True, change=with_policy(requires=("transformers>=99",))),
    Mutant(name="everything refused", by=("applies",), alone=True, change=with_policy(supports=refuses)),
    Mutant(name="16 bits refused", by=("numerics_bf16", "numerics_fp16"), change=with_policy(supports=wants_fp32)),
    Mutant(
        name="a layer class that is not there",
        by=("applies",),
        change=with_block(layer=_LLAMA + "LlamaDecoderLayers"),
    ),
    Mutant(
        name="a weight that is not transposed",
        by=("applies",),
        family="gpt2",
        change=with_slots(up=Linear("mlp.c_fc", split="column")),
    ),
    Mutant(name="a norm of another class", by=("applies",), change=with_slots(norm_attn=Norm("input_layernorm"))),
    Mutant(name="a projection unread", by=("parameters_once", "applies"), change=with_slots(out=None)),
    Mutant(
        name="a projection read twice",
        by=("parameters_once", "applies"),
        change=with_slots(gate_up=Concat("mlp.up_proj", "mlp.up_proj", split="column")),
    ),
    Mutant(
        name="something ignored that is not there",
        by=("parameters_once",),
        alone=True,
        change=with_block(ignore=("self_attn.rotary",)),
    ),
    Mutant(
        name="a fact read from the weights",
        by=("meta_load",),
        alone=True,
        change=with_facts(pre_norm=Attr("self_attn.q_proj.weight.is_cpu")),
    ),
    Mutant(name="import of torch", by=("light_import",), alone=True, plugin="heavy"),
    Mutant(name="import that prints", by=("light_import",), plugin="talkative"),
    Mutant(name="hook with a default", by=("hook_signatures",), alone=True, plugin="defaulted"),
    Mutant(name="no DSI_API", by=("hook_signatures",), plugin="without_api"),
    Mutant(name="another policy registered", by=("hook_signatures",), plugin="forgetful"),
    Mutant(name="something else registered each time", by=("hook_signatures",), plugin="inconstant"),
)

# --- what containers compute ------------------------------------------------------------------------------------------


def _ops(name: str, what: str, *by: str, alone: bool = False, family: str = "llama", needs: str = "") -> Mutant:
    return Mutant(name=what, by=by or _NUMBERS, alone=alone, family=family, change=in_ops(name), needs=needs)


def _layer(name: str, what: str, *by: str, alone: bool = False, family: str = "llama", needs: str = "") -> Mutant:
    return Mutant(name=what, by=by or _NUMBERS, alone=alone, family=family, change=in_layer(name), needs=needs)


NUMBERS = (
    _ops("KvGroupOffByOne", "kv group off by one"),
    _ops("OneKvHeadForAll", "one kv head for all"),
    _ops("HeadsInterleavedOverGroups", "kv heads taken in turn"),
    _ops("ScaledTwice", "scores scaled twice"),
    _ops("NotScaled", "scores not scaled"),
    _ops("NotCausal", "causality forgotten"),
    _ops("LonePromptLost", "a text of one token attends to nothing", alone=True),
    _ops("RowsMixed", "rows of a batch mixed", "batch_of_one", alone=True),
    _ops("RopeOffByOne", "queries one position late"),
    _ops("ValuesTurned", "values rotated"),
    _ops("KeysNotTurned", "keys not rotated"),
    _ops("WrongEps", "wrong eps"),
    _ops("EpsOutsideTheRoot", "eps outside the root"),
    _ops("NormWeightLost", "norm weight lost"),
    _ops("MeanNotRemoved", "RMS norm for layer norm", family="bert"),
    _ops("NormBiasLost", "norm bias lost", family="bert"),
    _ops("UnbiasedVariance", "variance over n - 1", family="bert"),
    _ops("GateSwapped", "activation over the wrong half"),
    _ops("GateNotActivated", "activation forgotten"),
    _ops("RoughInBf16", "bits lost in bf16", "numerics_bf16", alone=True),
    _ops("RoughInFp16", "bits lost in fp16", "numerics_fp16", alone=True),
    _layer("ResidualFromNormed", "residual from the normed input"),
    _layer("ResidualLost", "attention's residual lost"),
    _layer("ResidualTwice", "residual added twice"),
    _layer("MlpResidualLost", "MLP's residual lost"),
    _layer("MlpResidualNormed", "MLP's residual from its normed input"),
    _layer("PostNormOrder", "attention reads what is not normed"),
    _layer("LostBias", "lost bias", "numerics_fp32", "state_dict_round_trip"),
    _layer("LostKeyBias", "lost bias of a part", "numerics_fp32"),
    _layer("TransposedWeight", "transposed weight"),
    _layer("RowsReversed", "fused rows in another order"),
)

MASKS = (
    _ops("MaskIgnored", "mask ignored", "left_padding", "right_padding", "ragged_padding"),
    _ops(
        "EncoderMaskIgnored", "encoder mask ignored", "left_padding", "right_padding", "ragged_padding", family="bert"
    ),
    _ops("MaskInverted", "mask inverted", "left_padding"),
    _ops("MaskOfFirstRow", "first row's mask for all", "ragged_padding"),
    _ops("LeftMaskOfOneRowLost", "left padding of a single row ignored", "left_padding", alone=True),
    _ops("RightMaskOfOneRowLost", "right padding of a single row ignored", "right_padding", alone=True),
    _ops("HoleIgnored", "hole in a mask ignored", "ragged_padding", alone=True),
    _ops("NaNWithoutTokens", "0 / 0 without tokens", "fully_masked_rows", alone=True),
    _ops("WindowIgnored", "sliding window ignored", "sliding_window", alone=True, family="mistral"),
)

CACHES = (
    _ops("ChunkIsAPrompt", "a second piece taken for a first", "chunked_prefill", alone=True),
    _layer("CacheNotUpdated", "cache not read", *_CACHE),
    _layer("CacheOfOneRowNotUpdated", "cache of a single row not read", "decode_equals_full", alone=True),
    _layer("RopeAfterCache", "rope after cache", *_CACHE),
    _layer("NewestKeyNotSeen", "cache read before it is updated", *_CACHE),
    _layer("BeamsNotReordered", "keys kept beside the cache", "beam_generate", alone=True),
    _layer("StepWithoutBias", "a bias lost in the decode loop", "greedy_generate"),
    _layer("StepIgnoresMask", "mask ignored in the decode loop", "greedy_generate"),
)

# --- what containers are ----------------------------------------------------------------------------------------------

MANNERS = (
    _layer("AlwaysStock", "the fused path never runs", "plan_is_true"),
    _layer("StockIn16Bits", "the fused path never runs in bf16", "plan_is_true"),
    _layer("StockOverACache", "the fused path never runs over a filled cache", "plan_is_true"),
    _layer("OtherForm", "a weight held in another form than planned", "plan_is_true", alone=True),
    _layer("OneMorePlace", "a module that nobody planned", "plan_is_true"),
    _layer("InputOverwritten", "the input overwritten", "hidden_states", alone=True),
    _layer("HooksLost", "hooks lost", "hidden_states", alone=True),
    _layer("AttentionsForgotten", "attentions not recorded", "attentions", alone=True),
    _layer("RecordersNotSeen", "attentions wanted by the config not recorded", "attentions"),
    _layer("ReturnsATuple", "a tuple for a tensor"),
    _layer("NamesInAnotherOrder", "names in another order", "state_dict_round_trip", alone=True),
    _layer("NameLost", "a name lost", "state_dict_round_trip", "save_pretrained_round_trip"),
    _layer("NameRenamed", "a name of its own", "state_dict_round_trip", "save_pretrained_round_trip"),
    _layer("SavedTransposed", "a weight saved transposed", "state_dict_round_trip", "save_pretrained_round_trip"),
    _layer("SavedThroughMemory", "two names over one memory", "save_pretrained_round_trip", alone=True),
    _layer("LoadForgotten", "new weights not taken", "state_dict_round_trip"),
    _layer("DerivedKept", "what was made of old weights kept", "state_dict_round_trip"),
    _layer("SecondCopy", "second copy kept", "no_second_copy", alone=True),
    _layer("OriginalsKept", "stock weights kept through views", "no_second_copy"),
    _layer("MarksTheOriginal", "restore leaves an attribute", "restore", alone=True),
    _layer("ChangesTheOriginal", "restore leaves another module", "restore"),
    _layer("HookLeft", "restore leaves a hook", "restore"),
    _layer("ConfigChanged", "restore leaves a config entry", "restore"),
    Mutant(name="restore does nothing", by=("restore",), around=rules.restores_nothing),
    Mutant(name="applied twice", by=("apply_twice",), alone=True, around=rules.applied_twice),
    _layer("MarksTheClass", "class marked", "instance_only", alone=True),
    _layer("PatchesTheClass", "class patched", "instance_only"),
    _layer("PatchesTheModule", "module patched", "instance_only"),
    _layer("CopyIsTheSame", "a copy that shares", "deepcopy", alone=True),
    _layer("NotPicklable", "a closure kept", "pickling", alone=True),
    _layer("StaleDtype", "a tensor of the old dtype kept", "dtype_moves", alone=True),
    _layer("StaleDevice", "a tensor left on the device", "device_moves", alone=True, needs="cuda"),
    _layer("ReadsBack", "a value read back within a call", "cuda_graph_replay", alone=True, needs="cuda"),
)

# --- layers of maps ---------------------------------------------------------------------------------------------------


def _map(
    name: str, what: str, *by: str, container: str = "ResnetBlock", alone: bool = False, needs: str = ""
) -> Mutant:
    change = in_map(name, container)
    return Mutant(name=what, by=by or _NUMBERS, alone=alone, family="unet", change=change, needs=needs)


def _map_slots(what: str, container: str, **slots: Any) -> Mutant:
    return Mutant(name=what, by=_NUMBERS, family="unet", change=with_map_slots(container, **slots))


MAPS = (
    _map("NoSilu", "no SiLU behind a group norm"),
    _map("OneGroup", "one group of all channels"),
    _map("OneGroupOfANorm", "one group of all channels in a norm by itself", container="MapNorm"),
    _map("GateAndValueSwapped", "gate and value swapped", container="CrossTransformerBlock"),
    _map("ResidualLost", "a map's residual lost"),
    _map("TimeLost", "the time lost", "numerics_fp32", "denoising_steps"),
    _map("TimeOfFirstRow", "one row's time for all", "numerics_fp32", "batch_of_one"),
    _map("ContextNotSeen", "the context not handed on", "numerics_fp32", container="SpatialTransformer"),
    _map_slots(
        "keys and values of the context swapped",
        "CrossTransformerBlock",
        cross_kv=Concat("attn2.to_v", "attn2.to_k", shared="context"),
    ),
    _map_slots("norms of a map swapped", "CrossTransformerBlock", norm_self=Norm("norm2"), norm_cross=Norm("norm1")),
    Mutant(
        name="keys and values of a map's attention swapped",
        by=_NUMBERS,
        family="vae",
        change=with_map_slots("ImageAttention", qkv=Concat("to_q", "to_v", "to_k")),
    ),
    Mutant(
        name="a divisor of its own",
        by=_NUMBERS,
        family="vae",
        change=in_map("DividedOnce", "ImageAttention"),
    ),
    _map("SizeNotSeen", "a wanted size ignored", "map_sizes", container="Upsample", alone=True),
    _map("TakesMemoryAsItLies", "a layout assumed", "map_layouts", container="MapConv", alone=True),
    Mutant(
        name="what was kept of a context that was written anew",
        by=("denoising_steps",),
        alone=True,
        family="unet",
        around=maps.versions_not_seen,
    ),
    _map("AlwaysStockMap", "the fused path of a map never runs", "plan_is_true"),
    _map("OtherConvForm", "a convolution held in another form than planned", "plan_is_true"),
    _map("MapNameLost", "a convolution's name lost", "state_dict_round_trip", "save_pretrained_round_trip"),
    _map("ChannelsLastSaved", "a convolution saved as it is held", "state_dict_round_trip"),
    _map("LastBitsLost", "last bits of a convolution lost", "state_dict_round_trip", "restore"),
    _map("MarksTheMapsOriginal", "restore leaves an attribute on a layer of maps", "restore"),
    _map("SecondMapCopy", "second copy of a convolution kept", "no_second_copy"),
    _map("ReadsMapBack", "a value of a map read back within a call", "cuda_graph_replay", needs="cuda"),
)

# --- ranks ------------------------------------------------------------------------------------------------------------


def _rule(what: str, around: Callable[[], Any], *by: str, alone: bool = False, family: str = "llama") -> Mutant:
    return Mutant(name=what, by=by, alone=alone, family=family, around=around)


RANKS = (
    _rule("naive chunk of fused qkv", rules.naive_qkv, *_TP, alone=True),
    _rule("naive chunk of packed qkv", rules.naive_qkv, *_TP, family="gpt2"),
    _rule("naive chunk of gate and up", rules.naive_gate_up, *_TP),
    _rule("bias added on every rank", rules.bias_on_every_rank, *_TP),
    _rule("bias added on no rank", rules.bias_on_no_rank, *_TP),
    _rule("ranks swapped in row splits", rules.ranks_swapped_in_rows, *_TP),
    _rule("last index of a rank lost", rules.last_index_lost, "tp_shards_reassemble"),
    _rule("first index of a rank doubled", rules.first_index_twice, "tp_shards_reassemble"),
    _rule("heads not divided", rules.heads_not_divided, *_TP),
    _rule("kv heads not divided", rules.kv_heads_not_divided, *_TP),
    _rule("no sum over the ranks", rules.no_sum, *_TP),
    _rule("no sum after the MLP", rules.no_sum_after_mlp, *_TP),
    _rule("residual added on every rank", rules.residual_on_every_rank, *_TP),
    _rule("uneven heads cut off", rules.never_uneven, "tp_indivisible_refused", alone=True),
    _rule("refused without a way on", rules.refused_without_a_way_on, "tp_indivisible_refused"),
    Mutant(name="row for column", by=_SPLIT, change=with_slots(qkv=Concat(*_QKV, split="row"))),
    Mutant(name="column for row", by=_SPLIT, change=with_slots(out=Linear("self_attn.o_proj", split="column"))),
    Mutant(name="one end of a cut whole", by=_SPLIT, change=with_slots(down=Linear("mlp.down_proj"))),
    _layer("SaysNoSharding", "a container that does not say how it splits", *_SPLIT),
    _layer("PartExportedWrong", "a part exported in another order", "tp_shards_reassemble", alone=True),
    _layer("PartOfTheWholeScale", "a scale of one rank's heads", *_TP),
    _layer("WrongAmongProcesses", "wrong among processes alone", "tp_processes", alone=True),
)

MUTANTS: tuple[Mutant, ...] = (*MAPPING, *WORDS, *NUMBERS, *MASKS, *CACHES, *MANNERS, *MAPS, *RANKS)
