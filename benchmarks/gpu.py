"""dsi against stock transformers on one CUDA device: every decoder and encoder family at a real size, random weights.

    python benchmarks/gpu.py [--out FILE.json] [--quick] [--only NAME]

A forward pass is timed with a synchronisation before and after each call, as a caller who waits for it meets it;
decoding is greedy, one row, by the difference of two lengths. Both have a copy of the model of their own and run in
turns. A case is refused where our error against a float32 reference is above 1.2 times stock's own.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import attrs
import torch
import transformers
from measure import Result, Sample, check_half, interleaved, per_token, run
from torch import Tensor, nn
from transformers import BertConfig, GPT2Config, LlamaConfig, OPTConfig

import dsi

DEVICE = "cuda"
PROMPT = 128


@attrs.frozen(kw_only=True)
class Model:
    """One architecture at one size.

    Args:
        cls: the model class, an attribute of transformers.
        config: its config.
        dtype: the one it is usually run in.
        shapes: (batch, tokens) of the forward passes.
        bar: how many times as fast as stock dsi must be, forward and decode.
        large: measured only when asked for.
    """

    cls: str
    config: object
    dtype: torch.dtype
    shapes: tuple[tuple[int, int], ...]
    bar: float = 1.0
    large: bool = False

    @property
    def decodes(self) -> bool:
        return not self.cls.startswith("Bert")


def models() -> Mapping[str, Model]:
    """What is measured; a function, so that `--help` needs no device."""
    llama = LlamaConfig(
        # the shape of Llama-3.2-1B
        vocab_size=128256,
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        intermediate_size=8192,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    opt = OPTConfig(
        # the shape of OPT-1.3B
        hidden_size=2048,
        word_embed_proj_dim=2048,
        num_hidden_layers=24,
        num_attention_heads=32,
        ffn_dim=8192,
    )
    llama_7b = LlamaConfig(
        num_hidden_layers=32, hidden_size=4096, intermediate_size=11008, max_position_embeddings=4096
    )
    opt_7b = OPTConfig(
        hidden_size=4096, word_embed_proj_dim=4096, num_hidden_layers=32, num_attention_heads=32, ffn_dim=16384
    )
    gpt2_xl = GPT2Config(n_embd=1600, n_layer=48, n_head=25)
    one, several = ((1, PROMPT),), ((1, PROMPT), (8, PROMPT))
    half, brain = torch.float16, torch.bfloat16
    return {
        "llama-7b": Model(cls="LlamaForCausalLM", config=llama_7b, dtype=brain, shapes=(), large=True),
        "opt-6.7b": Model(cls="OPTForCausalLM", config=opt_7b, dtype=half, shapes=(), large=True),
        "gpt2-xl": Model(cls="GPT2LMHeadModel", config=gpt2_xl, dtype=half, shapes=(), large=True),
        "bert-base": Model(cls="BertModel", config=BertConfig(), dtype=torch.float16, shapes=several),
        "gpt2-124m": Model(cls="GPT2LMHeadModel", config=GPT2Config(), dtype=torch.float16, shapes=one),
        "opt-1.3b": Model(cls="OPTForCausalLM", config=opt, dtype=torch.float16, shapes=one),
        "llama-1b": Model(cls="LlamaForCausalLM", config=llama, dtype=torch.bfloat16, shapes=one),
    }


@attrs.frozen(kw_only=True)
class Pair:
    """The two contenders, and the judge: a float32 model with exactly their weights."""

    stock: nn.Module
    engine: Callable[..., object]
    reference: nn.Module

    @classmethod
    def of(cls, known: Model) -> Pair:
        torch.manual_seed(0)
        with torch.device(DEVICE):
            reference = getattr(transformers, known.cls)(known.config).eval()
        for parameter in reference.parameters():
            # as transformers initialises them, biases are 0 and norms 1: nothing would tell them apart
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            parameter.copy_(parameter.to(known.dtype))
        stock, ours = (_lower(copy.deepcopy(reference), known.dtype) for _ in range(2))
        return cls(stock=stock, engine=dsi.init_inference(ours), reference=reference)


def _lower(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    # parameters only: buffers such as rotary frequencies stay float32, as from_pretrained leaves them
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    if model.can_generate():
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model


def _ids(pair: Pair, batch: int, tokens: int) -> Tensor:
    return torch.randint(4, pair.stock.config.vocab_size, (batch, tokens), device=DEVICE)


def forward(name: str, known: Model, shape: tuple[int, int], *, quick: bool, peak: Mapping[str, float]) -> Result:
    """One forward pass in milliseconds."""
    pair = Pair.of(known)
    ids = _ids(pair, *shape)
    check = check_half(name, *(model(ids)[0] for model in (pair.reference, pair.stock, pair.engine)))
    contenders = {"stock": partial(pair.stock, ids), "dsi": partial(pair.engine, ids)}
    times = interleaved(contenders, rounds=10 if quick else 100, warmup=10, sync=torch.cuda.synchronize)
    samples = {contender: Sample.of(values) for contender, values in times.items()}
    weights = sum(p.numel() for p in pair.stock.parameters() if p.ndim == 2)
    rate = 2 * weights * ids.numel() / samples["dsi"].median / 1e9
    ceiling = {"TFLOP/s, embeddings counted": rate, "of the measured peak": rate / peak["TFLOP/s bf16"]}
    return Result(name=name, unit="ms", times=samples, bars={"stock": known.bar}, check=check, ceiling=ceiling)


def decode(name: str, known: Model, *, quick: bool, peak: Mapping[str, float]) -> Result:
    """Greedy decoding of one row, milliseconds a token."""
    pair = Pair.of(known)
    ids = _ids(pair, 1, PROMPT)
    short, long = (8, 40) if quick else (16, 144)

    def generate(model: nn.Module, count: int) -> Tensor:
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)

    check = check_half(name, *(model(ids)[0] for model in (pair.reference, pair.stock, pair.engine)))
    agreed = generate(pair.stock, short) == generate(pair.engine, short)
    check |= {"tokens_equal_to_stock": agreed.double().mean().item()}
    generators = {"stock": partial(generate, pair.stock), "dsi": partial(generate, pair.engine)}
    times = per_token(generators, short=short, long=long, rounds=3 if quick else 9, sync=torch.cuda.synchronize)
    head = pair.stock.get_output_embeddings().weight
    tables = {id(m.weight) for m in pair.stock.modules() if isinstance(m, nn.Embedding)} - {id(head)}
    read = sum(p.numel() * p.itemsize for p in pair.stock.parameters() if id(p) not in tables)
    rate = read / times["dsi"].median / 1e6
    ceiling = {"GB/s of weights": rate, "of the measured copy bandwidth": rate / peak["GB/s copy"]}
    return Result(name=name, unit="ms/token", times=times, bars={"stock": known.bar}, check=check, ceiling=ceiling)


def ceilings() -> dict[str, float]:
    """What this device can do: a matrix product of 8192x8192x8192, and memory."""
    x, y = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    # 1 GiB, beyond the cache
    data = torch.empty(2**28, device=DEVICE)
    target = torch.empty_like(data)
    contenders = {"product": lambda: x @ y, "copy": lambda: target.copy_(data)}
    times = interleaved(contenders, rounds=20, warmup=5, sync=torch.cuda.synchronize)
    best = {name: min(values) for name, values in times.items()}
    return {
        "TFLOP/s bf16": 2 * 8192**3 / best["product"] / 1e9,
        "GB/s copy": 2 * data.nbytes / best["copy"] / 1e6,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--quick", action="store_true", help="few rounds: a smoke test, not a measurement")
    parser.add_argument("--only", nargs="+", help="these models only, e.g. llama-1b")
    parser.add_argument("--large", action="store_true", help="the models of 1.5 to 7 billion parameters too")
    return parser.parse_args()


@torch.no_grad()
def main() -> int:
    given = arguments()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py measures on a CUDA device, and torch finds none; benchmarks/cpu.py needs none")
    transformers.logging.set_verbosity_error()
    known = models()
    if unknown := set(given.only or ()) - known.keys():
        sys.exit(f"--only {' '.join(unknown)}: no such model; there are {', '.join(known)}")
    chosen = given.only or [name for name, model in known.items() if given.large or not model.large]
    options = {"quick": given.quick, "peak": ceilings()}
    cases: dict[str, Callable[[], Result]] = {}
    for name, model in known.items():
        dtype = str(model.dtype).removeprefix("torch.")
        if name not in chosen:
            continue
        for shape in model.shapes:
            case = f"{name} {dtype} {shape[0]}x{shape[1]}"
            cases[case] = partial(forward, case, model, shape, **options)
        if model.decodes:
            case = f"{name} {dtype} decode"
            cases[case] = partial(decode, case, model, **options)
    return run(cases, ceilings=options["peak"], out=given.out)


if __name__ == "__main__":
    sys.exit(main())
