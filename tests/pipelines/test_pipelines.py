"""Pipelines of diffusers work unchanged on optimized components: the same pictures as stock's, and all the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import dsi
import dsi.containers
from tests.support.pipelines import (
    SIZE,
    controlnet,
    paint,
    picture,
    schedule,
    text_to_image,
    text_to_image_xl,
    unet,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"),
    pytest.mark.filterwarnings("ignore:.*upcast_vae:FutureWarning"),
]

# of fp32, relative to the largest number
CLOSE = 1e-5


def same(one: Tensor, other: Tensor, close: float = CLOSE) -> None:
    assert one.shape == other.shape
    assert one.isfinite().all()
    assert (one - other).abs().max() <= close * other.abs().max()


def compare(stock: Any, ours: Any, **given: Any) -> None:
    """The latents of every step, and the pictures."""
    (wanted, steps), (found, others) = paint(stock, **given), paint(ours, **given)
    assert len(steps) == len(others) > 0
    for one, other in zip(others, steps, strict=True):
        same(one, other)
    same(found, wanted)


def weights(pipe: Any) -> dict[str, Tensor]:
    parts = {name: one for name, one in pipe.components.items() if isinstance(one, torch.nn.Module)}
    return {f"{name}.{key}": value for name, one in parts.items() for key, value in one.state_dict().items()}


def calls_of(pipe: Any, kind: str) -> list[int]:
    """How often each layer of a container ran fused, and how often stock's computation."""
    found = [
        module
        for one in pipe.components.values()
        if isinstance(one, torch.nn.Module)
        for module in one.modules()
        if isinstance(module, dsi.containers.StandIn)
    ]
    return [getattr(module, kind) for module in found]


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "text": (text_to_image, {}),
    "guidance off": (text_to_image, {"guidance_scale": 1.0}),
    "several pictures": (text_to_image, {"num_images_per_prompt": 2, "prompt": ["a cat", "a dog"]}),
    "odd sides": (text_to_image, {"height": 24, "width": 40}),
    "safety": (lambda: text_to_image(safety=True), {}),
    "image": (
        lambda: text_to_image("StableDiffusionImg2ImgPipeline"),
        {"image": picture(), "strength": 0.7, "steps": 3},
    ),
    "inpainting": (
        lambda: text_to_image("StableDiffusionInpaintPipeline", unet=unet(in_channels=9)),
        {"image": picture(), "mask_image": picture(channels=1).round(), "height": SIZE, "width": SIZE},
    ),
    "inpainting, four channels": (
        lambda: text_to_image("StableDiffusionInpaintPipeline"),
        {"image": picture(), "mask_image": picture(channels=1).round(), "height": SIZE, "width": SIZE},
    ),
    "control": (
        lambda: text_to_image("StableDiffusionControlNetPipeline", controlnet=controlnet()),
        {"image": picture(), "height": SIZE, "width": SIZE},
    ),
    "two controls": (
        lambda: text_to_image("StableDiffusionControlNetPipeline", controlnet=[controlnet(), controlnet()]),
        {
            "image": [picture(), picture(seed=1)],
            "controlnet_conditioning_scale": [0.5, 0.8],
            "height": SIZE,
            "width": SIZE,
        },
    ),
    "xl": (text_to_image_xl, {"num_images_per_prompt": 2}),
    "xl, guidance off": (text_to_image_xl, {"guidance_scale": 1.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_pictures_are_stocks(case):
    build, given = CASES[case]
    pipe = build()
    stock = copy.deepcopy(pipe)
    before = weights(pipe)
    engine = dsi.init_inference(pipe)
    assert engine.module is pipe
    compare(stock, pipe, **given)
    compare(stock, engine, **given)
    assert not any(calls_of(pipe, "stock_calls"))
    assert all(engine.plan.plans[name].blocks for name in ("unet", "vae", "text_encoder"))
    assert engine.restore() is pipe
    assert not engine.active
    after = weights(pipe)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    wanted, found = paint(stock, **given), paint(pipe, **given)
    assert torch.equal(wanted[0], found[0])
    assert all(map(torch.equal, wanted[1], found[1]))


@pytest.mark.parametrize(
    "name",
    ["PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
     "DDPMScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"],
)  # fmt: skip
def test_any_scheduler_does(pair, name):
    """Their timesteps are of several dtypes."""
    stock, ours, _ = pair
    for pipe in (stock, ours):
        pipe.scheduler = schedule(name)
    compare(stock, ours, steps=3)


@pytest.fixture(scope="module")
def shared() -> tuple[Any, Any, Any]:
    pipe = text_to_image()
    stock = copy.deepcopy(pipe)
    return stock, pipe, dsi.init_inference(pipe)


@pytest.fixture
def pair(shared: tuple[Any, Any, Any]) -> Any:
    """Two pipelines, one of them optimized, and its engine; as they were afterwards."""
    before = [pipe.scheduler for pipe in shared[:2]]
    yield shared
    for pipe, scheduler in zip(shared[:2], before, strict=True):
        pipe.scheduler = scheduler
        pipe.vae.disable_tiling()
        pipe.vae.disable_slicing()


def test_prompts_that_are_embeddings_already(pair):
    stock, ours, _ = pair
    texts, nothing = stock.encode_prompt("a cat", "cpu", 1, True)
    compare(stock, ours, prompt=None, prompt_embeds=texts, negative_prompt_embeds=nothing)
    # the same tensors, with something else in them
    texts += 0.5
    compare(stock, ours, prompt=None, prompt_embeds=texts, negative_prompt_embeds=nothing)


def test_two_prompts_in_turn(pair):
    """What was computed of one text is not another's."""
    stock, ours, _ = pair
    for prompt in ("a cat", "a dog", "a cat"):
        compare(stock, ours, prompt=prompt)


def test_a_callback_may_change_the_latents_and_the_prompt(pair):
    def change(pipe: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            # guidance ends here
            pipe._guidance_scale = 0.0
            return {"latents": 0.5 * state["latents"], "prompt_embeds": state["prompt_embeds"][-1:]}
        return {}

    given = {
        "num_inference_steps": 4,
        "height": SIZE,
        "width": SIZE,
        "output_type": "pt",
        "callback_on_step_end": change,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    stock, ours, _ = pair
    wanted, found = (
        pipe("a cat", generator=torch.Generator().manual_seed(0), **given).images for pipe in (stock, ours)
    )
    same(found, wanted)


@pytest.mark.parametrize("switch", ["enable_tiling", "enable_slicing"])
def test_pictures_in_parts(pair, switch):
    stock, ours, _ = pair
    for pipe in (stock, ours):
        getattr(pipe.vae, switch)()
    compare(stock, ours, height=40, width=24, num_images_per_prompt=2)
    with torch.no_grad():
        image = picture(3, size=40)
        wanted, found = (pipe.vae.encode(image).latent_dist for pipe in (stock, ours))
    same(found.mean, wanted.mean)
    same(found.std, wanted.std)


@pytest.mark.parametrize("name", ["text", "xl", "safety", "control"])
def test_what_is_saved_is_stocks(name, tmp_path):
    build, given = CASES[name]
    pipe = build()
    before, wanted = weights(pipe), paint(pipe, **given)[0]
    engine = dsi.init_inference(pipe)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    after = weights(again)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    same(paint(again, **given)[0], wanted)
    engine.restore()


def test_moves_and_casts():
    pipe = text_to_image()
    stock = copy.deepcopy(pipe)
    engine = dsi.init_inference(pipe)
    for one in (stock, pipe):
        one.to("cpu", torch.bfloat16)
    assert {tensor.dtype for tensor in weights(pipe).values() if tensor.is_floating_point()} == {torch.bfloat16}
    # 8 bits of mantissa, through some ten layers a step
    wanted, found = paint(stock), paint(pipe)
    same(found[1][0], wanted[1][0], 0.1)
    for one in (stock, pipe):
        one.to(torch.float32)
    compare(stock, pipe)
    engine.restore()
    compare(stock, pipe)


def test_a_dtype_is_every_components():
    pipe = text_to_image_xl()
    stock = copy.deepcopy(pipe).to(torch.bfloat16)
    engine = dsi.init_inference(pipe, dtype="bf16", keep_original="host")
    before = weights(copy.deepcopy(pipe))
    assert {t.dtype for t in before.values() if t.is_floating_point()} == {torch.bfloat16}
    assert pipe.dtype is torch.bfloat16
    wanted, found = paint(stock), paint(pipe)
    same(found[1][0], wanted[1][0], 0.1)
    assert {tensor.dtype for tensor in found[1]} == {torch.bfloat16}
    original = weights(text_to_image_xl())
    engine.restore()
    after = weights(pipe)
    assert all(torch.equal(after[name], original[name]) for name in original)


def test_a_vae_that_is_cast_up_for_every_picture():
    """fp16 weights whose pipeline decodes in fp32."""
    stock, ours = text_to_image_xl(), text_to_image_xl()
    stock.vae.to(torch.float16)
    assert ours.vae.config.force_upcast
    dsi.init_inference(ours.vae, dtype="fp16")
    for _ in range(2):
        compare(stock, ours)
        assert ours.vae.dtype is torch.float16


def test_components_that_two_pipelines_share(pair):
    stock, ours, _ = pair
    kind = diffusers.StableDiffusionImg2ImgPipeline
    one, other = (kind(**pipe.components, requires_safety_checker=False) for pipe in (stock, ours))
    for pipe in (one, other):
        pipe.set_progress_bar_config(disable=True)
    compare(one, other, image=picture(), strength=0.7, steps=3)
    with pytest.raises(dsi.InjectionError, match="vae: AutoencoderKL is optimized already"):
        dsi.init_inference(other)
