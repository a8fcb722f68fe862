"""dsi against stock transformers and torch.compile on this CPU, in one process, checked before it is measured.

    python benchmarks/cpu.py [--out FILE.json] [--quick] [--only NAME]

Every contender has a copy of the model of its own, so that stock never meets dsi. The contenders run in turns and
their medians are compared. A case whose check is red is refused: float32 outputs within 1e-5 relative and greedy tokens
equal; bfloat16 errors against a float32 reference at most 1.2 times stock's own. Beside the times stand the ceilings,
measured in the same run: a packed oneDNN matrix product, and reading and copying memory.
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

import torch
import transformers
from cpu_diffusion import SIZES as DENOISERS
from cpu_diffusion import diffusion_cases
from measure import (
    Result,
    Sample,
    check_fp32,
    check_half,
    check_tokens,
    interleaved,
    per_token,
    run,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import dsi
from tests.support.models import make_hostile_

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# without such instructions bfloat16 is tens of times slower than float32 here: fewer rounds, or it takes half an hour
BF16_IN_HARDWARE = torch.ops.mkldnn._is_mkldnn_bf16_supported()

# how many times as fast as each contender dsi must be
BARS = {
    "bert-base fp32 1x128": {"stock": 1.9, "torch.compile": 1.9},
    "bert-base bf16 1x128": {"stock": 1.2, "torch.compile": 1.0},
    "pyllama-7m fp32 decode": {"stock": 2.5},
    "gpt2-124m fp32 decode": {"stock": 1.4},
    "gpt2-124m bf16 decode": {"stock": 1.8},
}


# --- models -------------------------------------------------------------------------------------------------------


def random_model(cls: Callable[..., nn.Module], config: object) -> nn.Module:
    """A float32 model in eval mode whose weights all matter."""
    torch.manual_seed(0)
    model = cls(config).eval()
    make_hostile_(model)
    return model


def copies(model: nn.Module, dtype: torch.dtype, count: int) -> list[nn.Module]:
    """Independent copies in `dtype`."""
    return [copy.deepcopy(model).to(dtype) for _ in range(count)]


def reference(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A float32 model that holds exactly the weights that a copy in `dtype` holds."""
    return copy.deepcopy(model).to(dtype).float()


def compiled(model: nn.Module) -> Callable[..., object]:
    """The model as torch.compile makes it fastest for inference: inductor with its weights frozen into the code."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    return torch.compile(model)


def _is_emulated(dtype: torch.dtype) -> bool:
    return dtype is torch.bfloat16 and not BF16_IN_HARDWARE


# --- encoders -----------------------------------------------------------------------------------------------------


def bert(dtype_name: str, *, quick: bool, peak: Mapping[str, float]) -> Result:
    """BERT-base, random weights, one row of 128 tokens."""
    name, dtype = f"bert-base {dtype_name} 1x128", DTYPES[dtype_name]
    quick = quick or _is_emulated(dtype)
    base = random_model(BertModel, BertConfig())
    stock, frozen, ours = copies(base, dtype, 3)
    engine, fast = dsi.init_inference(ours), compiled(frozen)
    ids = torch.randint(4, base.config.vocab_size, (1, 128))

    def hidden(model: Callable[..., object]) -> Tensor:
        return model(ids).last_hidden_state

    if dtype is torch.float32:
        check = check_fp32(name, hidden(stock), hidden(engine))
    else:
        check = check_half(name, hidden(reference(base, dtype)), hidden(stock), hidden(engine))
    contenders = {"stock": partial(stock, ids), "torch.compile": partial(fast, ids), "dsi": partial(engine, ids)}
    times = interleaved(contenders, rounds=3 if quick else 25, warmup=1 if quick else 3)
    samples = {contender: Sample.of(values) for contender, values in times.items()}
    # without bfloat16 instructions the way to be fast is float32, and its peak is the higher one
    best = max(peak["GFLOP/s fp32"], peak[f"GFLOP/s {dtype_name}"])
    return Result(
        name=name,
        unit="ms",
        times=samples,
        bars=BARS[name],
        check=check,
        ceiling=_compute(base, tokens=128, milliseconds=samples["dsi"].median, peak=best),
    )


def _compute(model: nn.Module, *, tokens: int, milliseconds: float, peak: float) -> dict[str, float]:
    config = model.config
    weights = sum(m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layer" in name)
    attention = 4 * tokens**2 * config.hidden_size * config.num_hidden_layers
    achieved = (2 * tokens * weights + attention) / milliseconds / 1e6
    return {"GFLOP/s": achieved, "of the measured peak": achieved / peak}


# --- decoders -----------------------------------------------------------------------------------------------------


def decode(
    name: str, base: nn.Module, ids: Tensor, dtype: torch.dtype, *, lengths: tuple[int, int], rounds: int, read: float
) -> Result:
    """Greedy decoding of one row, milliseconds a token."""
    short, long = lengths
    stock, ours = copies(base, dtype, 2)
    for model in (stock, ours):
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    engine = dsi.init_inference(ours)

    def generate(model: nn.Module, count: int) -> Tensor:
        return model.generate(ids, max_new_tokens=count, do_sample=False)

    if dtype is torch.float32:
        check = check_fp32(name, stock(ids).logits, engine(ids).logits)
        check |= check_tokens(name, generate(stock, long), generate(engine, long))
    else:
        check = check_half(name, reference(base, dtype)(ids).logits, stock(ids).logits, engine(ids).logits)
        agreed = (generate(stock, short) == generate(engine, short)).double().mean().item()
        check |= {"tokens_equal_to_stock": agreed}
    times = per_token(
        {"stock": partial(generate, stock), "dsi": partial(generate, engine)}, short=short, long=long, rounds=rounds
    )
    return Result(
        name=name,
        unit="ms/token",
        times=times,
        bars=BARS[name],
        check=check,
        ceiling=_traffic(base, dtype, milliseconds=times["dsi"].median, read=read),
    )


def _traffic(model: nn.Module, dtype: torch.dtype, *, milliseconds: float, read: float) -> dict[str, float]:
    # a token reads every weight once, but of an embedding only its row; a tied head is a weight
    head = model.get_output_embeddings().weight
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - {id(head)}
    count = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    achieved = count * dtype.itemsize / milliseconds / 1e6
    return {"GB/s of weights": achieved, "of the measured read bandwidth": achieved / read}


def pyllama(*, quick: bool, peak: Mapping[str, float]) -> Result:
    """pyllama-7m in float32, real weights, a prompt of Python."""
    path = ROOT / "data" / "pyllama-7m"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(path)("def read_lines(path):\n", return_tensors="pt").input_ids
    lengths, rounds = ((16, 48), 3) if quick else ((32, 160), 9)
    return decode(
        "pyllama-7m fp32 decode", model, ids, torch.float32, lengths=lengths, rounds=rounds, read=peak["GB/s read"]
    )


def gpt2(dtype_name: str, *, quick: bool, peak: Mapping[str, float]) -> Result:
    """GPT-2 124M, random weights, a prompt of 16 tokens."""
    quick = quick or _is_emulated(DTYPES[dtype_name])
    model = random_model(GPT2LMHeadModel, GPT2Config())
    ids = torch.randint(4, model.config.vocab_size, (1, 16))
    lengths, rounds = ((4, 16), 3) if quick else ((8, 56), 7)
    name = f"gpt2-124m {dtype_name} decode"
    return decode(name, model, ids, DTYPES[dtype_name], lengths=lengths, rounds=rounds, read=peak["GB/s read"])


# --- ceilings -----------------------------------------------------------------------------------------------------


def ceilings(*, rounds: int = 15) -> dict[str, float]:
    """What this machine can do: matrix products of 1024x1024x1024, and memory."""
    # 256 MiB, beyond every cache
    data = torch.randn(64 * 2**20)
    target = torch.empty_like(data)
    matrix, vector = data.view(2**15, 2**11), torch.randn(2**11)
    contenders: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(data),
        "read": lambda: torch.mv(matrix, vector),
        **{name: _product(dtype) for name, dtype in DTYPES.items()},
    }
    # the fastest round: a ceiling is what the machine can do, not what it mostly did
    best = {name: min(times) for name, times in interleaved(contenders, rounds=rounds).items()}
    megabytes = data.numel() * data.itemsize / 1e6
    return {
        "GFLOP/s fp32": 2 * 1024**3 / best["fp32"] / 1e6,
        "GFLOP/s bf16": 2 * 1024**3 / best["bf16"] / 1e6,
        "GB/s copy": 2 * megabytes / best["copy"],
        "GB/s read": megabytes / best["read"],
    }


def _product(dtype: torch.dtype) -> Callable[[], Tensor]:
    x, weight = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
    packs = torch.backends.mkldnn.is_available()
    if dtype is torch.bfloat16:
        packs = packs and BF16_IN_HARDWARE
    if not packs:
        return lambda: nn.functional.linear(x, weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1024)
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--quick", action="store_true", help="few rounds, short texts: a smoke test, not a measurement")
    parser.add_argument("--only", choices=sorted({*DENOISERS, *(name.split()[0] for name in BARS)}), help="a model")
    return parser.parse_args()


@torch.no_grad()
def main() -> int:
    given = arguments()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    peak = ceilings(rounds=5 if given.quick else 15)
    options = {"quick": given.quick, "peak": peak}
    cases = {
        "bert-base fp32": partial(bert, "fp32", **options),
        "bert-base bf16": partial(bert, "bf16", **options),
        "pyllama-7m fp32": partial(pyllama, **options),
        "gpt2-124m fp32": partial(gpt2, "fp32", **options),
        "gpt2-124m bf16": partial(gpt2, "bf16", **options),
        **diffusion_cases(DTYPES, **options),
    }
    chosen = {name: case for name, case in cases.items() if given.only in (None, name.split()[0])}
    return run(chosen, ceilings=peak, out=given.out)


if __name__ == "__main__":
    sys.exit(main())
