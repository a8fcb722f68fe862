"""A Stable Diffusion pipeline as diffusers runs it and as dsi runs it, side by side, in numbers and in a picture.

    python examples/stable_diffusion.py [FOLDER] [--prompt TEXT] [--steps N] [--out FILE.png]

FOLDER is a checkpoint as `pipe.save_pretrained` writes it, of any text-to-image pipeline that diffusers loads; nothing
is downloaded. Without one the example makes a tiny pipeline with random weights, whose pictures show nothing and whose
numbers are real. Both pipelines paint the same text from the same noise, in turns; the table tells what a step and a
picture take, how much memory, and how far apart the pictures are; the PNG holds both, and their difference enlarged. It
exits with 1 if the pictures are not the same to the eye, or if the weights are not what they were after `restore()`.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import inspect
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import attrs
import diffusers
import numpy
import torch
import transformers
from PIL import Image
from torch import nn

import dsi

# decibels above which two pictures are one to the eye: of float32, and of 16 bits, where stock's own rounding shows
ALIKE = {torch.float32: 60.0, torch.float16: 30.0, torch.bfloat16: 25.0}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MIB = 2**20


@attrs.define(kw_only=True)
class Painted:
    """What one pipeline did.

    Args:
        picture: float [H, W, 3], 0 to 1, of the latest round.
        steps, whole: milliseconds of every step and of every picture, the first round apart.
        memory: bytes, see `Studio.memory`.
    """

    picture: Any = None
    steps: list[float] = attrs.field(factory=list)
    whole: list[float] = attrs.field(factory=list)
    memory: int = 0


@attrs.frozen(kw_only=True)
class Studio:
    """What is painted, and where.

    Args:
        prompt: the text.
        count: of steps.
        size: height and width in pixels; None as the pipeline has it.
        device: "cuda" or "cpu".
        seed: of the noise.
    """

    prompt: str
    count: int
    size: int | None
    device: str
    seed: int

    def paint(self, pipe: Any, painted: Painted, *, counted: bool) -> None:
        """One picture, its times kept where they count."""
        marks = [self.now()]

        def mark(_: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
            marks.append(self.now())
            return state

        sizes = {} if self.size is None else {"height": self.size, "width": self.size}
        # on the CPU, as the documentation advises: the same noise on every machine
        noise = torch.Generator().manual_seed(self.seed)
        settings = {"num_inference_steps": self.count, "output_type": "np", "generator": noise, **sizes}
        painted.picture = pipe(self.prompt, callback_on_step_end=mark, **settings).images[0]
        end = self.now()
        if counted:
            painted.whole.append(1e3 * (end - marks[0]))
            # before the first step stands the text encoder
            painted.steps += [1e3 * (after - before) for before, after in itertools.pairwise(marks[1:])]

    def now(self) -> float:
        """Seconds, once the device has finished."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def memory(self, pipe: Any, parts: Sequence[nn.Module], painted: Painted) -> None:
        """Paint the first picture; bytes of the weights and of what it held beside them, on a CPU of weights alone."""
        painted.memory = sum(parameter.nbytes for part in parts for parameter in part.parameters())
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if self.device == "cuda" else 0
        self.paint(pipe, painted, counted=False)
        if self.device == "cuda":
            painted.memory += torch.cuda.max_memory_allocated() - before


# --- pipelines ----------------------------------------------------------------------------------------------------


def tiny_pipeline() -> Any:
    """Text-to-image with random weights: letters for a tokenizer, two layers of text, 32 and 64 channels."""
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=transformers.CLIPTextModel(text).eval(),
        tokenizer=_letters(32),
        unet=unet.eval(),
        scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _letters(length: int) -> Any:
    """A CLIP tokenizer that knows single letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<unk>", "<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return transformers.CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=[],
        unk_token="<unk>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=length,
    )


def load(folder: Path | None, dtype: torch.dtype, device: str) -> Any:
    """The pipeline of a folder, or the tiny one."""
    if folder is None:
        pipe = tiny_pipeline().to(dtype)
    else:
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def twin(pipe: Any) -> Any:
    """A pipeline of the same class over copies of its models."""
    parts = {name: copy.deepcopy(part) for name, part in pipe.components.items()}
    taken = inspect.signature(type(pipe).__init__).parameters
    switches = {name: value for name, value in pipe.config.items() if name in taken and name not in parts}
    made = type(pipe)(**parts, **switches)
    made.set_progress_bar_config(disable=True)
    return made


def models(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's models by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def fingerprint(pipe: Any) -> str:
    """A hash of every weight's name and bits."""
    found = hashlib.sha256()
    for name, part in models(pipe).items():
        for key, tensor in part.state_dict().items():
            found.update(f"{name}.{key}".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# --- comparing ----------------------------------------------------------------------------------------------------


def decibels(one: Any, other: Any) -> float:
    """The peak signal-to-noise ratio of two pictures; infinite where they are equal."""
    error = float(numpy.square(numpy.asarray(one, numpy.float64) - other).mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def beside(stock: Any, ours: Any) -> tuple[Image.Image, float]:
    """Both pictures and their difference in a row, and how many times the difference is enlarged."""
    difference = numpy.abs(numpy.asarray(stock, numpy.float64) - ours)
    factor = 1 / difference.max() if difference.max() > 0 else 1.0
    row = numpy.concatenate([stock, ours, difference * factor], axis=1)
    return Image.fromarray((row * 255).round().clip(0, 255).astype(numpy.uint8)), factor


def table(painted: dict[str, Painted], where: str) -> str:
    """The times and the memory of both, and their ratios."""
    rows = [f"{'':8} {'ms a step':>12} {'ms a picture':>14} {where:>16}"]
    values = {
        who: (statistics.median(one.steps), statistics.median(one.whole), one.memory / MIB)
        for who, one in painted.items()
    }
    rows += [f"{who:8} {step:12.2f} {whole:14.1f} {memory:16.1f}" for who, (step, whole, memory) in values.items()]
    ratios = [stock / ours for stock, ours in zip(values["stock"], values["dsi"], strict=True)]
    rows.append(f"{'stock/dsi':8} {ratios[0]:11.2f}x {ratios[1]:13.2f}x {ratios[2]:15.2f}x")
    return "\n".join(rows)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="a checkpoint; a tiny random pipeline without one")
    parser.add_argument("--prompt", default="an astronaut on a horse")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="pictures that are timed")
    parser.add_argument("--size", type=int, help="pixels of height and width; as the pipeline has it where left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp16" if cuda else "fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--out", type=Path, default=Path("stable_diffusion.png"))
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Load, paint in turns, compare, restore; 1 where something is not as promised."""
    args = arguments(given)
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    dtype = DTYPES[args.dtype]
    stock = load(args.folder, dtype, args.device)
    ours = twin(stock)
    before = fingerprint(ours)
    started = time.perf_counter()
    engine = dsi.init_inference(ours)
    print(f"{type(stock).__name__} on {args.device} in {args.dtype}; dsi took {time.perf_counter() - started:.2f} s")
    studio = Studio(prompt=args.prompt, count=args.steps, size=args.size, device=args.device, seed=args.seed)
    pipes: dict[str, Any] = {"stock": stock, "dsi": engine}
    painted = {who: Painted() for who in pipes}
    for who, pipe in pipes.items():
        studio.memory(pipe, list(models(ours if who == "dsi" else stock).values()), painted[who])
    for _ in range(args.rounds):
        for who, pipe in pipes.items():
            studio.paint(pipe, painted[who], counted=True)
    print(table(painted, "MiB at most" if args.device == "cuda" else "MiB of weights"))
    both = [painted[who].picture for who in ("stock", "dsi")]
    signal = decibels(*both)
    row, factor = beside(*both)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    row.save(args.out)
    print(f"PSNR {signal:.1f} dB; {args.out}: stock, dsi, and their difference {factor:.3g} times enlarged")
    engine.restore()
    same = fingerprint(ours) == before
    print(f"after restore() the weights are {'what they were, bit for bit' if same else 'NOT WHAT THEY WERE'}")
    if signal < ALIKE[dtype]:
        print(f"THE PICTURES DIFFER: {signal:.1f} dB, and {ALIKE[dtype]:.0f} dB is alike in {args.dtype}")
    return int(not same or signal < ALIKE[dtype])


if __name__ == "__main__":
    sys.exit(main())
