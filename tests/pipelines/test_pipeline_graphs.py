"""Components as graphs, with a stand-in for the capture: what a structure is, what is outside of it, what is bounded.

`tests/gpu/test_pipelines_gpu.py` has the real capture.
"""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

import dsi
from dsi.containers.shared_products import shared_products
from dsi.runtime import forward_pool
from dsi.runtime.trees import tensors
from tests.pipelines.test_pipelines import CASES, compare, same
from tests.runtime.test_forward_graphs import Replayed, graphs  # noqa: F401 - a fixture of every test here
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

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")


def routed(*models: nn.Module) -> None:
    """Have these, and their parts, take the way of a CUDA device."""
    for model in models:
        for module in model.modules():
            if "_dsi" in module.__dict__ and "forward" in module.__dict__:
                module.__dict__["_dsi"].on_cuda = True


class Pair:
    """A model, its optimized copy, and the way of its latest forward."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.stock, self.ours = model, copy.deepcopy(model)
        self.engine = dsi.init_inference(self.ours, **options)
        routed(self.ours)

    @property
    def route(self) -> Any:
        return self.ours._dsi.last_forward

    @property
    def pool(self) -> Any:
        return self.ours._dsi.forwards

    def check(self, *args: Any, graph: bool | None = True, **given: Any) -> Any:
        with torch.no_grad():
            wanted, found = self.stock(*args, **given), self.ours(*args, **given)
        assert type(found) is type(wanted)
        for one, other in zip(tensors(found), tensors(wanted), strict=True):
            same(one, other)
        assert graph is None or self.route.graph is graph, self.route
        return found


def latents(rows: int = 2, side: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(rows, 4, side, side, generator=torch.Generator().manual_seed(seed))


def texts(rows: int = 2, seed: int = 0, width: int = HIDDEN) -> Tensor:
    return torch.randn(rows, 7, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pair() -> Pair:
    return Pair(unet())


def counted(model: nn.Module, name: str) -> int:
    """How often the shared product of a name was computed."""
    (product,) = (one for one in shared_products(model) if one.name == name)
    return product.products


# --- structures -------------------------------------------------------------------------------------------------------


def residuals(model: nn.Module, rows: int = 2, side: int = 8) -> dict[str, Any]:
    """What a ControlNet adds."""
    with torch.no_grad():
        return dict(
            zip(
                ("down_block_additional_residuals", "mid_block_additional_residual"),
                model(latents(rows, side), 5, texts(rows), picture(rows, size=2 * side), return_dict=False),
                strict=True,
            )
        )


CALLS: dict[str, dict[str, Any]] = {
    "float32 time": {"timestep": torch.tensor(31.0)},
    "float64 time": {"timestep": torch.tensor(31.0, dtype=torch.float64)},
    "int32 time": {"timestep": torch.tensor(31, dtype=torch.int32)},
    "a time a row": {"timestep": torch.tensor([31, 7])},
    "a number": {"timestep": 31},
    "a tuple": {"return_dict": False},
    "a mask of the text": {"encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1] * 7])},
    "nothing in a dict": {"cross_attention_kwargs": {}},
    "control": residuals(controlnet()),
    "another size": {"sample": latents(2, 12)},
    "one row": {"sample": latents(1), "encoder_hidden_states": texts(1)},
    "channels side by side": {"sample": latents().contiguous(memory_format=torch.channels_last)},
}


def test_every_structure_is_right_at_its_first_call_and_replayed_after(pair, graphs):  # noqa: F811
    base = {"sample": latents(), "timestep": torch.tensor(31), "encoder_hidden_states": texts()}
    for turn in range(3):
        for name, changed in CALLS.items():
            pair.check(**{**base, **changed}, graph=turn > 0)
            assert pair.route.graph or pair.route.reason == "the first call of this structure", name
    # where the channels stand is no structure
    assert len(graphs) == len(CALLS) == len(pair.pool) + 0
    assert len(CALLS) <= forward_pool.KEPT


def test_a_replay_reads_what_the_call_brings(pair):
    """Each argument of its own, those inside of dicts and lists too."""
    control, base = residuals(controlnet()), {"sample": latents(), "timestep": torch.tensor(31)}
    for turn in range(5):
        given = {**base, "encoder_hidden_states": texts(), **control}
        for name in list(given)[: turn + 1] if turn else ():
            given[name] = _others(given[name])
        pair.check(**given, graph=turn > 0)


def _others(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value + 1
    return type(value)(one + 1 for one in value)


def test_added_conditions():
    pipe = text_to_image_xl()
    pair = Pair(pipe.unet)
    for seed in range(4):
        added = {"text_embeds": texts(seed=seed)[:, 0], "time_ids": torch.arange(12.0).view(2, 6) + seed}
        given = {"encoder_hidden_states": texts(seed=seed, width=2 * HIDDEN), "added_cond_kwargs": added}
        pair.check(latents(seed=seed), torch.tensor(31.0 + seed), **given, graph=seed > 0)


def test_outputs_stay_what_they_are(pair):
    for seed in range(2):
        pair.check(latents(seed=seed), torch.tensor(3), texts(), graph=seed > 0)
    first = pair.check(latents(seed=2), torch.tensor(3), texts()).sample
    kept = first.clone()
    pair.check(latents(seed=3), torch.tensor(9), texts(seed=1))
    assert torch.equal(first, kept)


def test_sizes_in_any_order_and_no_more_than_are_kept(pair, graphs, monkeypatch):  # noqa: F811
    monkeypatch.setattr(forward_pool, "KEPT", 3)
    embeds = {rows: texts(rows) for rows in (1, 2)}
    for seed in range(40):
        rows, side = (1, 2)[seed % 2], (4, 6, 8)[seed // 2 % 3]
        pair.check(latents(rows, side, seed), torch.tensor(seed), embeds[rows], graph=None)
        assert len(pair.pool) <= 3
    (product,) = (one for one in shared_products(pair.ours) if one.name == "context")
    assert len(product._pinned) == len(pair.pool._inputs) <= 3


def test_a_number_that_changes_with_every_call_gets_no_more_graphs(pair, graphs):  # noqa: F811
    for _ in range(2):
        for step in range(2 * forward_pool.NUMBERS):
            pair.check(latents(), step, texts(), graph=None)
    assert len(graphs) == forward_pool.NUMBERS
    assert "pass it as a tensor" in pair.route.reason
    for turn in range(2):
        pair.check(latents(), torch.tensor(3), texts(), graph=turn > 0)


def test_a_mask_of_pixels_is_no_padding():
    """Some argument is called as the mask of a text is, and is none."""
    pair = Pair(unet(mid_block_type=None))
    mask = torch.ones(2, 64)
    mask[:, 32:] = 0
    for seed in range(3):
        pair.check(latents(seed=seed), torch.tensor(3), texts(), attention_mask=mask, graph=seed > 0)
    # so nobody tries what becomes of the layers without it
    assert not pair.pool.unpadded._stops
    assert not pair.pool.unpadded._maskless


# --- products of what comes back --------------------------------------------------------------------------------------


def test_a_prompt_is_multiplied_once(pair):
    embeds = texts()
    for seed in range(2):
        pair.check(latents(seed=seed), torch.tensor(seed), embeds, graph=seed > 0)
    before, step = counted(pair.ours, "context"), counted(pair.ours, "time")
    for seed in range(5):
        pair.check(latents(seed=seed), torch.tensor(seed), embeds)
    assert counted(pair.ours, "context") == before
    # this one is in the graph, and the stand-in runs it
    assert counted(pair.ours, "time") == step + 5


def test_another_prompt_is_another_product(pair):
    one, other = texts(), texts(seed=1)
    for turn, embeds in enumerate((one, one, other, one, other, other)):
        pair.check(latents(seed=turn), torch.tensor(turn), embeds, graph=turn > 0)
    # the same tensor, with something else in it
    other.mul_(2)
    pair.check(latents(), torch.tensor(1), other)
    # the same memory, as another tensor
    view = other[:]
    view.add_(1)
    pair.check(latents(), torch.tensor(1), view)
    pair.check(latents(), torch.tensor(1), other)


def test_a_prompt_under_inference_mode(pair):
    """Nobody counts what is written to such a tensor."""
    with torch.inference_mode():
        embeds = texts()
    for turn in range(4):
        with torch.inference_mode():
            embeds += turn
        pair.check(latents(), torch.tensor(3), embeds, graph=turn > 0)


@pytest.mark.parametrize("how", ["load", "write"])
def test_other_weights_are_another_product(pair, how):
    embeds = texts()
    for turn in range(3):
        pair.check(latents(), torch.tensor(3), embeds, graph=turn > 0)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    if how == "load":
        changed = {name: 2 * pair.stock.state_dict()[name]}
        for model in (pair.stock, pair.ours):
            model.load_state_dict(changed, strict=False)
    else:
        with torch.no_grad():
            pair.stock.get_parameter(name).mul_(2)
            layer = pair.ours.down_blocks[0].attentions[0].transformer_blocks[0].cross_kv
            layer.weight[: layer.out_features // 2].mul_(2)
    # what is loaded may be held anew
    pair.check(latents(), torch.tensor(3), embeds, graph=None if how == "load" else True)


def test_what_is_computed_outside_goes_with_its_graphs(pair):
    for turn in range(2):
        pair.check(latents(), torch.tensor(3), texts(), graph=turn > 0)
    (product,) = (one for one in shared_products(pair.ours) if one.name == "context")
    rows = weakref.ref(product._pinned[0][2])
    pair.ours.to(torch.float64).to(torch.float32)
    gc.collect()
    assert rows() is None
    assert not product._pinned
    routed(pair.ours)
    for turn in range(2):
        pair.check(latents(), torch.tensor(3), texts(), graph=turn > 0)
    pair.engine.restore()
    assert not product._pinned


# --- what a user may switch -------------------------------------------------------------------------------------------


def other_processors(model: Any) -> None:
    for module in _stock_modules(model, "set_processor"):
        module.set_processor(Doubled())


class Doubled(AttnProcessor):
    """Twice of what the stock one gives."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().__call__(*args, **kwargs)


def _stock_modules(model: Any, method: str) -> list[Any]:
    """Those that have a method, where they stand and behind containers."""
    roots = [model, *(one.original for one in model.modules() if isinstance(one, dsi.containers.StandIn))]
    found = {id(one): one for root in roots for one in root.modules() if not isinstance(one, dsi.containers.StandIn)}
    return [one for one in found.values() if hasattr(one, method)]


def free_u(model: Any) -> None:
    model.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)


def chunks(model: Any) -> None:
    for module in _stock_modules(model, "set_chunk_feed_forward"):
        module.set_chunk_feed_forward(4, 1)


class Scaled(nn.Module):
    """A processor with parameters, as adapters bring it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner = [2.0], AttnProcessor()
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.scale[0] * self.inner(*args, **kwargs)


def adapters(model: Any) -> None:
    for module in _stock_modules(model, "set_processor"):
        module.set_processor(Scaled())


def scales(model: Any) -> None:
    for module in _stock_modules(model, "set_processor"):
        module.processor.scale[0] = 3.0


@pytest.mark.parametrize("change", [other_processors, free_u, chunks, adapters])
def test_what_is_switched_after_the_capture(pair, change, graphs):  # noqa: F811
    given = latents(), torch.tensor(3), texts()
    for turn in range(3):
        pair.check(*given, graph=turn > 0)
    for model in (pair.stock, pair.ours):
        change(model)
    pair.check(*given, graph=False)
    assert "graphs are made anew: an attribute of a layer was set" in pair.route.reason
    for _ in range(2):
        pair.check(*given)
    assert len(graphs) == 2


def test_the_scale_of_an_adapter():
    """A list in a module that stands behind a container, or in the tree where the layer was left."""
    for first in (True, False):
        model = unet()
        if first:
            adapters(model)
        pair = Pair(model)
        for change in (scales,) if first else (adapters, scales):
            for turn in range(3):
                pair.check(latents(), torch.tensor(3), texts(), graph=True if turn == 2 else None)
            for one in (pair.stock, pair.ours):
                change(one)
            pair.check(latents(), torch.tensor(3), texts(), graph=False)
            assert "an attribute of a layer was set" in pair.route.reason
            pair.check(latents(), torch.tensor(3), texts())


def test_a_switch_is_seen_by_graphs_of_other_structures(pair):
    """A call that has no graph yet comes first."""
    given = latents(), torch.tensor(3), texts()
    for turn in range(2):
        pair.check(*given, graph=turn > 0)
    for model in (pair.stock, pair.ours):
        free_u(model)
    pair.check(latents(side=12), torch.tensor(3), texts(), graph=False)
    # the stand-in for a graph would do as it is told now, a graph would not
    assert not len(pair.pool)
    for turn in range(2):
        pair.check(*given, graph=turn > 0)


# --- the other components ---------------------------------------------------------------------------------------------


class Coder(Pair):
    """An autoencoder, by its two methods."""

    def code(self, way: str, x: Tensor, **given: Any) -> Any:
        with torch.no_grad():
            wanted, found = getattr(self.stock, way)(x, **given), getattr(self.ours, way)(x, **given)
        assert type(found) is type(wanted)
        one, other = (value[0] for value in (found, wanted))
        if way == "encode":
            same(one.mean, other.mean)
            same(one.std, other.std)
        else:
            same(one, other)
        return one

    def graph(self, part: str) -> bool:
        route: Any = getattr(self.ours, part)._dsi.last_forward
        return bool(route.graph)


@pytest.mark.parametrize("given", [{}, {"return_dict": False}], ids=str)
def test_an_autoencoder_is_two_graphs(given, graphs):  # noqa: F811
    pair = Coder(vae())
    for seed in range(3):
        pair.code("encode", picture(2, seed), **given)
        pair.code("decode", latents(2, 6, seed), **given)
        assert pair.graph("encoder") is pair.graph("decoder") is (seed > 0)
    assert len(graphs) == 2
    assert "forward" not in pair.ours.__dict__
    first = pair.code("decode", latents(2, 6))
    kept = first.clone()
    pair.code("decode", latents(2, 6, 9))
    assert torch.equal(first, kept)
    with torch.no_grad():
        same(pair.ours(picture()).sample, pair.stock(picture()).sample)
    pair.engine.restore()
    assert "_dsi" not in pair.ours.decoder.__dict__
    assert "forward" not in pair.ours.decoder.__dict__


def test_parts_of_pictures_are_replays(graphs):  # noqa: F811
    """Tiles of a size share a graph, and rows of a batch."""
    pair = Coder(vae())
    for switch in ("enable_tiling", "enable_slicing"):
        for model in (pair.stock, pair.ours):
            getattr(model, switch)()
        for seed in range(2):
            pair.code("decode", latents(2, 20, seed))
            pair.code("encode", picture(2, seed, 40))
        assert pair.graph("decoder")
        assert pair.graph("encoder")
    for model in (pair.stock, pair.ours):
        model.disable_tiling()
        model.disable_slicing()
    for seed in range(2):
        pair.code("decode", latents(2, 20, seed))
        assert pair.graph("decoder") is (seed > 0)
    assert len(graphs) < 24


def test_a_safety_checker_decides_on_the_host():
    pipe = text_to_image(safety=True)
    stock = copy.deepcopy(pipe.safety_checker)
    dsi.init_inference(pipe)
    routed(pipe.safety_checker)
    for seed in range(3):
        given = picture(2, seed), picture(2, seed).numpy()
        with torch.no_grad():
            wanted, found = stock(*given), pipe.safety_checker(*given)
        assert found[1] == wanted[1] == [False, False]
        assert pipe.safety_checker.vision_model._dsi.last_forward.graph is (seed > 0)


def test_a_controlnet():
    pair = Pair(controlnet())
    embeds = texts()
    for seed in range(3):
        given = {"return_dict": seed != 1, "conditioning_scale": 0.5}
        pair.check(latents(seed=seed), torch.tensor(seed), embeds, picture(2, seed), **given, graph=seed > 1)


# --- pipelines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["text", "several pictures", "image", "inpainting", "control", "xl", "safety"])
def test_pictures_by_graphs_are_stocks(case):
    build, given = CASES[case]
    pipe = build()
    stock = copy.deepcopy(pipe)
    engine = dsi.init_inference(pipe)
    routed(*(one for one in pipe.components.values() if isinstance(one, nn.Module)))
    for seed in range(2):
        compare(stock, engine, seed=seed, **{"steps": 3, **given})
    assert pipe.unet._dsi.last_forward.graph
    assert pipe.vae.decoder._dsi.last_forward.graph
    engine.restore()
    wanted, found = paint(stock, **given), paint(pipe, **given)
    assert torch.equal(wanted[0], found[0])


def test_a_pipeline_that_changes_between_pictures(graphs):  # noqa: F811
    """Sizes, guidance, rows, schedulers: right at the first call of each, and replayed when it comes again."""
    pipe = text_to_image()
    stock = copy.deepcopy(pipe)
    dsi.init_inference(pipe)
    routed(pipe.unet, pipe.vae, pipe.text_encoder)
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
        for given in turns:
            compare(stock, pipe, steps=3, **given)
    made = len(graphs)
    for given in turns:
        compare(stock, pipe, steps=3, **given)
        assert pipe.unet._dsi.last_forward.graph
    assert len(graphs) <= made + len(turns)


def test_required_graphs_come_at_once(graphs):  # noqa: F811
    pipe = text_to_image(safety=True)
    stock = copy.deepcopy(pipe)
    dsi.init_inference(pipe)
    for one in pipe.components.values():
        for module in one.modules() if isinstance(one, nn.Module) else ():
            if "_dsi" in module.__dict__:
                module.__dict__["_dsi"].config = dsi.InferenceConfig(enable_cuda_graph=True)
    routed(pipe.unet, pipe.vae, pipe.text_encoder, pipe.safety_checker)
    compare(stock, pipe, steps=2)
    # text encoder, denoiser, decoder, vision tower
    assert len(graphs) == 4
    assert all(isinstance(one, Replayed) for one in graphs)
