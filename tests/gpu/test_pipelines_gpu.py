"""Pipelines of diffusers on CUDA: components as real graphs, equal to stock whatever came before, and given back."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

import dsi
from dsi.runtime.trees import tensors
from tests.support.pipelines import (
    HIDDEN,
    SIZE,
    controlnet,
    paint,
    picture,
    schedule,
    text_to_image,
    text_to_image_xl,
    unet,
    vae,
)

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")]

DEVICE = "cuda"
# of fp32, relative to the largest number: products in another order, through some steps
CLOSE = 1e-3


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """fp32 products in fp32, by the same algorithms on both sides."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [one.allow_tf32 for one in backends], torch.backends.cudnn.deterministic
    for one in backends:
        one.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    yield
    for one, value in zip(backends, before[0], strict=True):
        one.allow_tf32 = value
    torch.backends.cudnn.deterministic = before[1]


def same(one: Tensor, other: Tensor, close: float = CLOSE) -> None:
    assert one.shape == other.shape
    assert one.isfinite().all()
    assert (one.float() - other.float()).abs().max() <= close * other.float().abs().max()


def compare(stock: Any, ours: Any, **given: Any) -> None:
    (wanted, steps), (found, others) = paint(stock, **given), paint(ours, **given)
    for one, other in zip(others, steps, strict=True):
        same(one, other)
    same(found, wanted)


def latents(rows: int = 2, side: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(rows, 4, side, side, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def texts(rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(rows, 7, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "text": (lambda: text_to_image(safety=True), {"num_images_per_prompt": 2}),
    "image": (lambda: text_to_image("StableDiffusionImg2ImgPipeline"), {"image": picture(), "strength": 0.7}),
    "control": (
        lambda: text_to_image("StableDiffusionControlNetPipeline", controlnet=controlnet()),
        {"image": picture(), "height": SIZE, "width": SIZE},
    ),
    "xl": (text_to_image_xl, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_pictures_by_graphs_are_stocks(case: str) -> None:
    build, given = CASES[case]
    pipe = build().to(DEVICE)
    stock = copy.deepcopy(pipe)
    engine = dsi.init_inference(pipe, enable_cuda_graph=True)
    for seed in range(2):
        compare(stock, engine, steps=4, seed=seed, **given)
    assert pipe.unet._dsi.last_forward.graph
    assert pipe.vae.decoder._dsi.last_forward.graph
    assert pipe.text_encoder._dsi.last_forward.graph
    engine.restore()
    wanted, found = paint(stock, **given), paint(pipe, **given)
    assert torch.equal(wanted[0], found[0])


def test_a_pipeline_that_changes_between_pictures() -> None:
    pipe = text_to_image().to(DEVICE)
    stock = copy.deepcopy(pipe)
    dsi.init_inference(pipe)
    turns: list[dict[str, Any]] = [
        {},
        {"guidance_scale": 1.0},
        {"height": 24, "width": SIZE},
        {"num_images_per_prompt": 2},
        {"prompt": "a dog"},
    ]
    for name in ("DDIMScheduler", "EulerDiscreteScheduler"):
        for one in (stock, pipe):
            one.scheduler = schedule(name)
        for given in [*turns, *turns]:
            compare(stock, pipe, steps=3, **given)
    assert pipe.unet._dsi.last_forward.graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_first_call_has_the_bits_of_later_ones(dtype: torch.dtype) -> None:
    model = unet().to(DEVICE, dtype)
    dsi.init_inference(model)
    embeds, found, graphs = texts().to(dtype), [], []
    for _ in range(4):
        with torch.no_grad():
            found.append(model(latents().to(dtype), torch.tensor(31, device=DEVICE), embeds).sample)
        graphs.append(model._dsi.last_forward.graph)
    assert graphs[-1], model._dsi.last_forward
    assert all(torch.equal(one, found[-1]) for one in found)


def test_prompts_in_turn_and_times_from_the_host() -> None:
    stock = unet().to(DEVICE)
    ours = copy.deepcopy(stock)
    dsi.init_inference(ours, enable_cuda_graph=True)
    one, other, outputs = texts(), texts(seed=1), []
    for turn, embeds in enumerate((one, one, other, one, other, other)):
        given = latents(seed=turn), torch.tensor(turn), embeds
        with torch.no_grad():
            outputs.append((ours(*given).sample, stock(*given).sample))
        assert ours._dsi.last_forward.graph
    other.mul_(2)
    with torch.no_grad():
        given = latents(), torch.tensor(3, device=DEVICE), other
        outputs.append((ours(*given).sample, stock(*given).sample))
    for found, wanted in outputs:
        same(found, wanted)


@pytest.mark.parametrize("switch", ["", "enable_tiling", "enable_slicing"])
def test_an_autoencoder_in_whole_and_in_parts(switch: str) -> None:
    stock = vae().to(DEVICE)
    ours = copy.deepcopy(stock)
    dsi.init_inference(ours, enable_cuda_graph=True)
    for model in (stock, ours):
        if switch:
            getattr(model, switch)()
    for seed in range(2):
        with torch.no_grad():
            one, other = (model.decode(latents(2, 20, seed), return_dict=False)[0] for model in (ours, stock))
            same(one, other)
            image = picture(2, seed, 40).to(DEVICE)
            one, other = (model.encode(image).latent_dist.mean for model in (ours, stock))
            same(one, other)
        assert ours.encoder._dsi.last_forward.graph
        assert ours.decoder._dsi.last_forward.graph


def test_a_switch_after_the_capture() -> None:
    stock = unet().to(DEVICE)
    ours = copy.deepcopy(stock)
    dsi.init_inference(ours)
    given = latents(), torch.tensor(3, device=DEVICE), texts()
    for turn in range(5):
        if turn == 3:
            for model in (stock, ours):
                model.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
        with torch.no_grad():
            same(ours(*given).sample, stock(*given).sample)


def test_a_pipeline_that_is_moved_after_it_was_optimized() -> None:
    pipe = text_to_image()
    stock = copy.deepcopy(pipe).to(DEVICE)
    engine = dsi.init_inference(pipe)
    pipe.to(DEVICE)
    for seed in range(2):
        compare(stock, pipe, seed=seed, steps=3)
    assert pipe.unet._dsi.last_forward.graph
    engine.restore()
    compare(stock, pipe)


def test_memory_comes_back() -> None:
    def held() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return int(torch.cuda.memory_allocated())

    pipe = text_to_image().to(DEVICE)
    paint(pipe)
    before = held()
    for _ in range(3):
        engine = dsi.init_inference(pipe)
        for _ in range(2):
            paint(engine, steps=3)
        engine.restore()
        del engine
        # a workspace of the libraries may come to stay
        assert held() <= before + (1 << 20), "what graphs held is not given back"


def test_half_precision_errs_no_more_than_stocks() -> None:
    exact = unet().to(DEVICE)
    stock = copy.deepcopy(exact).half()
    ours = copy.deepcopy(exact)
    dsi.init_inference(ours, dtype="fp16", enable_cuda_graph=True)
    errors = []
    for model in (ours, stock):
        total = 0.0
        for seed in range(8):
            x, embeds, time = latents(seed=seed).half(), texts(seed=seed).half(), torch.tensor(31 * seed, device=DEVICE)
            with torch.no_grad():
                wanted = exact(x.float(), time, embeds.float()).sample
                found = model(x, time, embeds).sample
            total += float((found.float() - wanted).pow(2).mean())
        errors.append(total**0.5)
    assert errors[0] <= 1.2 * errors[1]


def test_a_pipeline_in_half_precision() -> None:
    pipe = text_to_image_xl().to(DEVICE)
    stock = copy.deepcopy(pipe).to(torch.float16)
    engine = dsi.init_inference(pipe, dtype=torch.float16, enable_cuda_graph=True)
    assert {one.dtype for one in pipe.components.values() if isinstance(one, nn.Module)} == {torch.float16}
    for seed in range(2):
        (found, steps), (wanted, others) = paint(engine, seed=seed), paint(stock, seed=seed)
        same(steps[0], others[0], 0.05)
        assert len(tensors(found)) == 1
        assert found.isfinite().all()
        assert found.shape == wanted.shape
    # it is cast up for the decoding, and back
    assert pipe.vae.dtype is torch.float16
