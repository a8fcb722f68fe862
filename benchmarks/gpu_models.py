"""What the GPU benchmarks measure: architectures at real sizes with random weights, made on the device.

A model is held with its engine by a `Stage`, one at a time: cases that follow each other on one model share it.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
import transformers
from measure import Refused, check_rms
from torch import Tensor, nn

import dsi

DEVICE = "cuda"
HALF, BRAIN = torch.float16, torch.bfloat16
# longer texts are read by stock models in pieces, of so many positions
WHOLE, PIECE = 4096, 2048


@attrs.frozen(kw_only=True)
class Model:
    """One architecture at one size.

    Args:
        cls: the model class, an attribute of transformers.
        config: the config class, an attribute of transformers.
        settings: of the config.
        dtype: the one it is usually run in.
    """

    cls: str
    config: str
    settings: Mapping[str, Any]
    dtype: torch.dtype

    def build(self) -> nn.Module:
        """In eval mode on the device, every parameter random: none is 0 or 1, or nothing would tell them apart."""
        config = getattr(transformers, self.config)(**self.settings)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(DEVICE):
                model = getattr(transformers, self.cls)(config).eval()
        finally:
            torch.set_default_dtype(before)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim < 2:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                else:
                    parameter.normal_(0, 0.02)
        model.config.dtype = self.dtype
        if model.can_generate():
            model.generation_config.eos_token_id = None
            model.generation_config.pad_token_id = 0
        return model


_LLAMA_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}
_LLAMA_8B = {
    **_LLAMA_7B,
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
_LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
_OPT_7B = {"hidden_size": 4096, "word_embed_proj_dim": 4096, "num_attention_heads": 32, "ffn_dim": 16384}
_OPT_1B = {"hidden_size": 2048, "word_embed_proj_dim": 2048, "num_attention_heads": 32, "ffn_dim": 8192}
_QWEN3 = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
_GEMMA2 = {
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "intermediate_size": 9216,
}
_PYTHIA = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 8192,
    "use_parallel_residual": True,
}

MODELS: Mapping[str, Model] = {
    "llama-7b": Model(
        cls="LlamaForCausalLM",
        config="LlamaConfig",
        settings={**_LLAMA_7B, "max_position_embeddings": 4096},
        dtype=BRAIN,
    ),
    "llama-8b": Model(
        cls="LlamaForCausalLM",
        config="LlamaConfig",
        settings={**_LLAMA_8B, "max_position_embeddings": 8192},
        dtype=BRAIN,
    ),
    "llama-1b": Model(cls="LlamaForCausalLM", config="LlamaConfig", settings=_LLAMA_1B, dtype=BRAIN),
    "opt-6.7b": Model(
        cls="OPTForCausalLM", config="OPTConfig", settings={**_OPT_7B, "num_hidden_layers": 32}, dtype=HALF
    ),
    "opt-1.3b": Model(
        cls="OPTForCausalLM", config="OPTConfig", settings={**_OPT_1B, "num_hidden_layers": 24}, dtype=HALF
    ),
    "gpt2-xl": Model(
        cls="GPT2LMHeadModel", config="GPT2Config", settings={"n_embd": 1600, "n_layer": 48, "n_head": 25}, dtype=HALF
    ),
    "gpt2-124m": Model(cls="GPT2LMHeadModel", config="GPT2Config", settings={}, dtype=HALF),
    "bert-base": Model(cls="BertModel", config="BertConfig", settings={}, dtype=HALF),
    "qwen3-0.6b": Model(cls="Qwen3ForCausalLM", config="Qwen3Config", settings=_QWEN3, dtype=BRAIN),
    "gemma2-2b": Model(cls="Gemma2ForCausalLM", config="Gemma2Config", settings=_GEMMA2, dtype=BRAIN),
    "pythia-1.4b": Model(cls="GPTNeoXForCausalLM", config="GPTNeoXConfig", settings=_PYTHIA, dtype=HALF),
}


class Pair:
    """Stock and dsi: two models with the same weights.

    Args:
        known: what they are.
        **options: of `dsi.init_inference`.
    """

    def __init__(self, known: Model, **options: Any) -> None:
        self.known = known
        self.stock: Any = known.build()
        self.engine: Any = dsi.init_inference(copy.deepcopy(self.stock), **options)

    def reference(self) -> Any:
        """A float32 model with exactly their weights."""
        return copy.deepcopy(self.stock).float()

    def ids(self, batch: int, tokens: int) -> Tensor:
        """Random token ids, the same for the same arguments."""
        generator = torch.Generator(DEVICE).manual_seed(batch * 100003 + tokens)
        return torch.randint(4, self.stock.config.vocab_size, (batch, tokens), device=DEVICE, generator=generator)

    def weight_bytes(self) -> int:
        """Bytes of weights that one token reads: all, of a table that is no head none."""
        head = self.stock.get_output_embeddings().weight
        tables = {id(m.weight) for m in self.stock.modules() if isinstance(m, nn.Embedding)} - {id(head)}
        return sum(p.nbytes for p in self.stock.parameters() if id(p) not in tables)

    def position_bytes(self) -> int:
        """Bytes of keys and values that one position of one row holds."""
        config = self.stock.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * heads * width * self.known.dtype.itemsize


class Stage:
    """Holds one pair at a time, so that the device's memory does."""

    def __init__(self) -> None:
        self._key: Any = None
        self._pair: Pair | None = None

    def pair(self, name: str, **options: Any) -> Pair:
        """The pair of this model, made where another one stands."""
        key = name, tuple(sorted(options.items()))
        if self._pair is None or self._key != key:
            self.clear()
            self._pair, self._key = Pair(MODELS[name], **options), key
        return self._pair

    def clear(self) -> None:
        """Give the memory back."""
        self._pair = self._key = None
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def check_forward(
    name: str, pair: Pair, call: Callable[[Any], Any], *, engine: Any = None, kept: Tensor | None = None
) -> dict[str, Any]:
    """Our error against float32 beside stock's own, of one forward; refused above 1.2 times that.

    Args:
        name: of the case.
        pair: the models.
        call: from a model to its result, whose first element is compared.
        engine: another one than the pair's.
        kept: bool [B, T], the positions that count; all where left out.
    """
    reference = pair.reference()
    models = (reference, pair.stock, pair.engine if engine is None else engine)
    # a graph's outputs may be overwritten by the next call
    outputs = [call(model)[0].clone() for model in models]
    if kept is not None:
        outputs = [found[kept] for found in outputs]
    return check_rms(name, *outputs)


def check_steps(name: str, pair: Pair, ids: Tensor, *, steps: int = 8) -> dict[str, Any]:
    """Our error against float32 beside stock's own, of the logits of decode steps; refused above 1.2 times that.

    dsi writes, and the others read what it wrote in one forward each.
    """
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": steps, "do_sample": False}
    written = pair.engine.generate(ids, **settings, return_dict_in_generate=True, output_logits=True)
    ours, read = torch.stack(written.logits, 1), written.sequences[:, :-1]
    reference = pair.reference()
    exact, stock = (_read(model, read, steps) for model in (reference, pair.stock))
    del reference
    found = check_rms(name, exact, stock, ours)
    return found | {"greedy_as_stock": (stock.argmax(-1) == ours.argmax(-1)).double().mean().item()}


def _read(model: Any, ids: Tensor, steps: int) -> Tensor:
    """Logits of the last `steps` positions, of a long text read a piece at a time through the model's own cache.

    The scores of 32,768 positions in float32 would take 128 GiB.
    """
    cut = ids.shape[1] - steps if ids.shape[1] > WHOLE else 0
    cache = transformers.DynamicCache(config=model.config)
    for piece in ids[:, :cut].split(PIECE, 1) if cut else ():
        model(piece, past_key_values=cache, logits_to_keep=1)
    return model(ids[:, cut:], past_key_values=cache, logits_to_keep=steps).logits


def check_route(name: str, pair: Pair) -> None:
    """The latest `generate`, of more tokens than a few, took its steps in graphs, or nothing is reported."""
    route = pair.engine.module._dsi.last_route
    if not route.graph:
        raise Refused(f"{name}: steps were no graphs: {route.reason}")
