"""Tiny models with hostile weights, one for each variant that a container has to get right; no hub, no files.

A freshly initialised model forgives almost everything: biases are 0, norms are 1 and a layer is nearly the identity.
Here matrices keep the scale of what they multiply, and every vector is off its neutral value, so that a lost bias or
two swapped norms show in the outputs.

    model = tiny("llama")                                    LlamaForCausalLM, float32, eval mode
    model = tiny("bert", "BertForSequenceClassification")    another head of the same family
    model = tiny("opt", activation_function="gelu")          another variant
    batch = inputs_for("llama", batch=3, seq=9, pad="left")

    @pytest.mark.parametrize(("family", "head"), cases())    every head of every family
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import attrs
import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

VOCAB = 67
HIDDEN = 32
LAYERS = 2
HEADS = 4
INTERMEDIATE = 48
POSITIONS = 64
IMAGE = 16
PATCH = 8

# below this id stand the special tokens of every family
FIRST_WORD = 4

Padding = Literal["left", "right", "ragged"]


@attrs.frozen(kw_only=True)
class Family:
    """One architecture, or one variant of it, at its smallest.

    Args:
        name: how tests name it.
        config: the config class, an attribute of transformers.
        heads: model classes that the config builds, attributes of transformers; the first is the usual one.
        settings: arguments of the config.
        inputs: what the model reads.
        causal: it generates text.
        pad_id: the id that padded positions hold.
    """

    name: str
    config: str
    heads: tuple[str, ...]
    settings: Mapping[str, Any] = attrs.field(converter=lambda given: MappingProxyType(dict(given)))
    inputs: Literal["text", "image", "text and image"] = "text"
    causal: bool = False
    pad_id: int = 0


# --- encoders -----------------------------------------------------------------------------------------------------

_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INTERMEDIATE,
}
_CLIP_TEXT = {
    **_ENCODER,
    "max_position_embeddings": POSITIONS,
    "projection_dim": HIDDEN,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_CLIP_VISION = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INTERMEDIATE,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "projection_dim": HIDDEN,
}


def _heads(prefix: str, *tasks: str) -> tuple[str, ...]:
    return tuple(prefix + task for task in tasks)


_TASKS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def _encoders() -> Iterable[Family]:
    yield Family(
        name="bert",
        config="BertConfig",
        heads=_heads("Bert", "Model", "ForMaskedLM", *_TASKS, "ForPreTraining", "ForNextSentencePrediction"),
        settings={**_ENCODER, "max_position_embeddings": POSITIONS},
    )
    yield Family(
        name="roberta",
        config="RobertaConfig",
        heads=_heads("Roberta", "Model", "ForMaskedLM", *_TASKS),
        # positions count from pad_token_id + 1
        settings={**_ENCODER, "max_position_embeddings": POSITIONS + 2, "pad_token_id": 1},
        pad_id=1,
    )
    yield Family(
        name="distilbert",
        config="DistilBertConfig",
        heads=_heads("DistilBert", "Model", "ForMaskedLM", *_TASKS),
        settings={
            "vocab_size": VOCAB,
            "dim": HIDDEN,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "hidden_dim": INTERMEDIATE,
            "max_position_embeddings": POSITIONS,
        },
    )
    yield Family(
        name="clip_text",
        config="CLIPTextConfig",
        heads=("CLIPTextModel", "CLIPTextModelWithProjection"),
        settings=_CLIP_TEXT,
    )
    yield Family(
        name="clip_vision",
        config="CLIPVisionConfig",
        heads=("CLIPVisionModel", "CLIPVisionModelWithProjection"),
        settings=_CLIP_VISION,
        inputs="image",
    )
    yield Family(
        name="clip",
        config="CLIPConfig",
        heads=("CLIPModel",),
        settings={"text_config": _CLIP_TEXT, "vision_config": _CLIP_VISION, "projection_dim": HIDDEN},
        inputs="text and image",
    )


# --- decoders -----------------------------------------------------------------------------------------------------

_OPT = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "ffn_dim": INTERMEDIATE,
    "max_position_embeddings": POSITIONS,
    "word_embed_proj_dim": HIDDEN,
    "bos_token_id": 3,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    # twice what hidden_size / heads would be
    "head_dim": 16,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA_HEADS = _heads("Llama", "ForCausalLM", "Model", *_TASKS)


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


_PAIRS = _LLAMA["head_dim"] // 2
# every type leaves its neutral setting; dynamic and longrope change beyond half of the positions
_ROPES = {
    "linear": _rope("linear", factor=2.0),
    "dynamic": {**_rope("dynamic", factor=2.0), "max_position_embeddings": POSITIONS // 2},
    "yarn": _rope("yarn", factor=4.0, original_max_position_embeddings=POSITIONS // 4),
    "longrope": _rope(
        "longrope",
        factor=2.0,
        original_max_position_embeddings=POSITIONS // 2,
        short_factor=[1.0 + 0.05 * pair for pair in range(_PAIRS)],
        long_factor=[1.5 + 0.25 * pair for pair in range(_PAIRS)],
    ),
    "llama3": _rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=POSITIONS // 2
    ),
}
ROPE_TYPES: tuple[str, ...] = tuple(_ROPES)


def _decoders() -> Iterable[Family]:
    yield Family(
        name="gpt2",
        config="GPT2Config",
        heads=_heads("GPT2", "LMHeadModel", "Model", *_TASKS),
        settings={
            "vocab_size": VOCAB,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": POSITIONS,
            "n_inner": INTERMEDIATE,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        causal=True,
    )
    yield Family(
        name="opt",
        config="OPTConfig",
        heads=_heads("OPT", "ForCausalLM", "Model", "ForSequenceClassification", "ForQuestionAnswering"),
        settings=_OPT,
        causal=True,
        pad_id=1,
    )
    yield Family(
        name="opt_post_norm",
        config="OPTConfig",
        heads=_heads("OPT", "ForCausalLM", "Model"),
        # as opt-350m: norms after the residual, and embeddings narrower than the layers
        settings={**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": HIDDEN // 2},
        causal=True,
        pad_id=1,
    )
    yield Family(name="llama", config="LlamaConfig", heads=_LLAMA_HEADS, settings=_LLAMA, causal=True)
    yield Family(
        name="llama_mha",
        config="LlamaConfig",
        heads=_LLAMA_HEADS,
        # every optional part: as many kv heads as heads, all biases, tied embeddings
        settings={
            **_LLAMA,
            "num_key_value_heads": HEADS,
            "head_dim": HIDDEN // HEADS,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
        causal=True,
    )
    for rope_type, parameters in _ROPES.items():
        yield Family(
            name=f"llama_{rope_type}",
            config="LlamaConfig",
            heads=_LLAMA_HEADS[:1],
            settings={**_LLAMA, **parameters},
            causal=True,
        )


FAMILIES: Mapping[str, Family] = MappingProxyType({family.name: family for family in (*_encoders(), *_decoders())})
ENCODERS: tuple[str, ...] = tuple(family.name for family in _encoders())
CAUSAL: tuple[str, ...] = tuple(family.name for family in _decoders())


def cases(*names: str) -> list[tuple[str, str]]:
    """(family, head) for every head of the families named, or of all."""
    return [(name, head) for name in names or FAMILIES for head in FAMILIES[name].heads]


# --- models -------------------------------------------------------------------------------------------------------


def tiny_config(family: str, **overrides: Any) -> PretrainedConfig:
    """The family's config, with `overrides` over its settings."""
    known = FAMILIES[family]
    return getattr(transformers, known.config)(**{**known.settings, **overrides})


def tiny(
    family: str,
    head: str | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    hostile: bool = True,
    **overrides: Any,
) -> PreTrainedModel:
    """A tiny model in eval mode, the same for the same arguments.

    Args:
        family: a key of `FAMILIES`.
        head: a model class of transformers that takes the family's config; the family's first where left out.
        seed: of the weights; the caller's random state is left alone.
        dtype: of the parameters.
        attention: the attention implementation, e.g. "eager"; transformers' choice where left out.
        hostile: weights at a scale where each matters; otherwise as transformers initialises them.
        **overrides: arguments of the config.
    """
    known = FAMILIES[family]
    config = tiny_config(family, **overrides)
    if attention is not None:
        config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, head or known.heads[0])(config).eval()
    if hostile:
        make_hostile_(model, seed=seed)
    _never_stop_(model, pad_id=known.pad_id)
    _cast_(model, dtype)
    return model


def make_hostile_(model: nn.Module, *, seed: int = 0) -> None:
    """Fill every parameter of `model` with values at which it matters.

    Matrices get a standard deviation of 1/sqrt(fan in), embeddings of 0.5, and vectors, biases and norms, a noise of
    0.1 over what they held. A tied parameter is filled once.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    scales = _scales(model)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if parameter.ndim < 2:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(scales[id(parameter)] * noise)


def _scales(model: nn.Module) -> dict[int, float]:
    scales = {id(p): p[0].numel() ** -0.5 for p in model.parameters() if p.ndim >= 2}
    for module in model.modules():
        if isinstance(module, Conv1D):
            # its weight is [in, out]
            scales[id(module.weight)] = module.weight.shape[0] ** -0.5
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            scales[id(module.weight)] = 0.5
    return scales


def _cast_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    # as from_pretrained(dtype=) does: buffers that no checkpoint holds, such as rotary frequencies, stay float32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _never_stop_(model: PreTrainedModel, *, pad_id: int) -> None:
    # random weights emit the end token at random; lengths must not depend on it
    generation = getattr(model, "generation_config", None)
    if generation is not None and model.can_generate():
        generation.eos_token_id = None
        generation.pad_token_id = pad_id


# --- inputs -------------------------------------------------------------------------------------------------------


def inputs_for(
    family: str, batch: int = 2, seq: int = 8, pad: Padding | None = None, *, seed: int = 0
) -> dict[str, Tensor]:
    """Keyword arguments of a forward call, the same for the same arguments.

    Args:
        family: a key of `FAMILIES`.
        batch: rows.
        seq: tokens a row, padding included.
        pad: None gives no mask at all. "left" and "right" pad the first row by a quarter, one token at least. "ragged"
            gives each row its own length, padded on the side that is usual for the family.
        seed: of the ids and pixels.

    Returns:
        input_ids and attention_mask, int64 [batch, seq]; pixel_values, float32 [batch, 3, IMAGE, IMAGE].
    """
    known = FAMILIES[family]
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}
    if known.inputs != "image":
        inputs["input_ids"] = torch.randint(FIRST_WORD, VOCAB, (batch, seq), generator=generator)
    if known.inputs != "text":
        inputs["pixel_values"] = torch.randn(batch, 3, IMAGE, IMAGE, generator=generator)
    if pad is None or known.inputs == "image":
        return inputs
    mask = _mask(batch, seq, pad, usual="left" if known.causal else "right")
    inputs["input_ids"] = inputs["input_ids"].masked_fill(mask == 0, known.pad_id)
    return {**inputs, "attention_mask": mask}


def _mask(batch: int, seq: int, pad: Padding, *, usual: Literal["left", "right"]) -> Tensor:
    lengths = torch.full((batch,), seq)
    if pad == "ragged":
        lengths -= torch.arange(batch) * math.ceil(seq / (batch + 1))
    else:
        lengths[0] -= max(1, seq // 4)
    lengths = lengths.clamp(min=1).unsqueeze(1)
    columns = torch.arange(seq).unsqueeze(0)
    side = usual if pad == "ragged" else pad
    kept = columns < lengths if side == "right" else columns >= seq - lengths
    return kept.long()
