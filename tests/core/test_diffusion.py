"""The blocks of a UNet and of an autoencoder, against the stock models."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

import dsi
from dsi.containers import StandIn
from dsi.containers.shared_products import shared_products
from tests.core.twins import FP32
from tests.support.diffusion import FORMS, TEXT, share, tiny_unet, tiny_vae, unet_inputs


@torch.no_grad()
def run(unet: Any, given: dict[str, Any]) -> Tensor:
    output: Tensor = unet(**given)[0]
    return output


def calls(model: nn.Module) -> tuple[int, int]:
    """Containers that ran fused, and that ran stock, at least once."""
    found = [module for module in model.modules() if isinstance(module, StandIn)]
    return sum(one.fused_calls > 0 for one in found), sum(one.stock_calls > 0 for one in found)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- the same pictures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("batch", "height", "width"), [(2, 8, 8), (1, 8, 12), (3, 7, 9)])
def test_a_unet_is_the_stock_one(form, batch, height, width):
    unet = tiny_unet(form)
    given = unet_inputs(unet, batch, height, width)
    wanted = run(unet, given)
    engine = dsi.init_inference(unet)
    assert share(run(unet, given), wanted) <= FP32
    assert calls(unet) == (len(engine.plan.blocks), 0)
    assert {left.path for left in engine.plan.left} <= {"time_embedding", "add_embedding"}
    engine.restore()
    assert torch.equal(run(unet, given), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_in_16_bits_it_errs_no_more_than_stock(form, dtype):
    unet = tiny_unet(form)
    wanted = run(unet, unet_inputs(unet)).double()
    stock = copy.deepcopy(unet).to(dtype)
    given = unet_inputs(stock)
    theirs = (run(stock, given).double() - wanted).norm()
    dsi.init_inference(stock)
    assert (run(stock, given).double() - wanted).norm() <= 1.2 * theirs


def test_what_comes_in_channels_last_comes_out_the_same():
    unet = tiny_unet()
    given = unet_inputs(unet)
    dsi.init_inference(unet)
    wanted = run(unet, given)
    given["sample"] = given["sample"].contiguous(memory_format=torch.channels_last)
    assert torch.equal(run(unet, given), wanted)


def test_masks_of_the_context_and_additional_residuals():
    unet = tiny_unet()
    given = unet_inputs(unet)
    given["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    shapes = [(16, 8), (16, 8), (16, 4), (32, 4)]
    given["down_block_additional_residuals"] = [torch.randn(2, c, side, side) for c, side in shapes]
    given["mid_block_additional_residual"] = torch.randn(2, 32, 4, 4)
    wanted = run(unet, given)
    dsi.init_inference(unet)
    assert share(run(unet, given), wanted) <= FP32
    assert calls(unet)[1] == 0
    del given["encoder_attention_mask"]
    assert share(run(unet, given), wanted) > FP32


def test_an_output_object_and_gradients_are_as_stock_gives_them():
    unet = tiny_unet()
    given = unet_inputs(unet) | {"return_dict": True}
    wanted = unet(**given).sample
    dsi.init_inference(unet)
    found = unet(**given).sample
    assert found.requires_grad
    assert share(found.detach(), wanted.detach()) <= FP32
    with pytest.raises(dsi.UnsupportedModelError, match="no gradients flow"):
        found.sum().backward()


@pytest.mark.parametrize("tiled", [False, True])
def test_an_autoencoder_is_the_stock_one(tiled):
    vae = tiny_vae()
    if tiled:
        vae.enable_tiling()
        vae.enable_slicing()
    picture = torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def both() -> tuple[Tensor, Tensor]:
        latent = vae.encode(picture).latent_dist.mode()
        return latent, vae.decode(latent, return_dict=False)[0]

    wanted = both()
    engine = dsi.init_inference(vae)
    assert all(share(one, other) <= FP32 for one, other in zip(both(), wanted, strict=True))
    assert not engine.plan.left
    assert calls(vae) == (len(engine.plan.blocks), 0)
    engine.restore()
    assert all(torch.equal(one, other) for one, other in zip(both(), wanted, strict=True))


def test_training_and_autocast_run_the_stock_layers():
    unet = tiny_unet()
    given = unet_inputs(unet)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = run(unet, given)
    engine = dsi.init_inference(unet)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(unet, given), wanted)
    # a layer that keeps others calls their containers, so every one of them runs stock
    assert calls(unet) == (0, len(engine.plan.blocks))


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_weights_keep_their_names_and_come_back_bit_for_bit(dtype):
    unet = tiny_unet("sdxl")
    before = bits(unet)
    engine = dsi.init_inference(unet, dtype=dtype, keep_original="host")
    cast = {name: tensor.to(dtype or tensor.dtype) for name, tensor in before.items()}
    assert same(bits(unet), cast)
    engine.restore()
    assert same(bits(unet), before)
    assert all(parameter.is_contiguous() for parameter in unet.parameters())


def test_other_weights_load_into_an_optimized_model():
    unet, other = tiny_unet("sdxl"), tiny_unet("sdxl", seed=3)
    given = unet_inputs(unet)
    dsi.init_inference(unet)
    run(unet, given)
    assert not any(unet.load_state_dict(other.state_dict()))
    assert share(run(unet, given), run(other, given)) <= FP32
    missing = {name: tensor for name, tensor in other.state_dict().items() if "attn1.to_q" not in name}
    with pytest.raises(RuntimeError, match=r"Missing key.*transformer_blocks\.0\.attn1\.to_q\.weight"):
        unet.load_state_dict(missing)


def test_copies_and_pickles_are_models_of_their_own():
    unet = tiny_unet()
    given = unet_inputs(unet)
    dsi.init_inference(unet)
    wanted = run(unet, given)
    copies = [copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))]  # noqa: S301 - our own bytes
    unet.load_state_dict(tiny_unet(seed=5).state_dict())
    for one in copies:
        assert torch.equal(run(one, given), wanted)
        assert {len(product.layers()) for product in shared_products(one)} == {4, 8}


def test_a_cast_afterwards_is_followed():
    unet = tiny_unet()
    given = unet_inputs(unet)
    wanted = run(unet, given)
    dsi.init_inference(unet)
    unet.to(torch.float64).to(torch.float32)
    assert share(run(unet, given), wanted) <= FP32
    assert calls(unet)[1] == 0


def test_saved_models_have_the_stock_layout(tmp_path):
    unet = tiny_unet()
    before = bits(unet)
    dsi.init_inference(unet)
    unet.save_pretrained(tmp_path)
    loaded, info = type(unet).from_pretrained(tmp_path, output_loading_info=True)
    assert same(bits(loaded), before)
    assert not any(info.values())


# --- what is left stock, and why --------------------------------------------------------------------------------------


def _processor(unet: Any) -> None:
    unet.set_attn_processor(AttnProcessor())


def _lora(unet: Any) -> None:
    """A linear layer wrapped as PEFT does it."""

    class LoraLinear(nn.Linear):
        pass

    for module in unet.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            module.attn2.to_q = LoraLinear(16, 16, bias=False) if module.dim == 16 else LoraLinear(32, 32, bias=False)


def _chunks(unet: Any) -> None:
    for module in unet.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            module.set_chunk_feed_forward(2, 1)


def _activation(unet: Any) -> None:
    for module in unet.modules():
        if type(module).__name__ == "ResnetBlock2D":
            module.nonlinearity = nn.GELU()


BLOCK, RESNET = "BasicTransformerBlock", "ResnetBlock2D"


@pytest.mark.parametrize(
    ("change", "options", "layer", "reason"),
    [
        (_processor, {}, BLOCK, "attn1.processor.__class__.__name__ is 'AttnProcessor'"),
        (lambda unet: unet.fuse_qkv_projections(), {}, BLOCK, "is 'FusedAttnProcessor2_0'"),
        (_lora, {}, BLOCK, "attn2.to_q is .*LoraLinear"),
        (_chunks, {}, BLOCK, "_chunk_size is 2"),
        (None, {"only_cross_attention": True}, BLOCK, "only_cross_attention is True"),
        (None, {"attention_type": "gated"}, BLOCK, "fuser is"),
        (None, {"resnet_time_scale_shift": "scale_shift"}, RESNET, "'scale_shift'"),
        (_activation, {}, RESNET, "nonlinearity.__class__.__name__ is 'GELU'"),
    ],
)
def test_what_is_not_implemented_is_left_with_a_reason(change, options, layer, reason):
    unet = tiny_unet(**options)
    if change is not None:
        change(unet)
    given = unet_inputs(unet)
    wanted = run(unet, given)
    engine = dsi.init_inference(unet)
    found = [left for left in engine.plan.left if left.original.endswith(layer)]
    assert found
    for left in found:
        assert left.reason.code in ("refused", "wrapped")

    assert all(re.search(reason, left.reason.text) for left in found)
    # what stands around them is replaced all the same
    assert any(block.original.endswith("Transformer2DModel") for block in engine.plan.blocks)
    assert share(run(unet, given), wanted) <= FP32


def test_a_processor_that_is_set_later_is_heeded():
    unet, twin = tiny_unet(), tiny_unet()
    given = unet_inputs(unet)
    dsi.init_inference(unet)
    seen: list[str] = []

    class Louder(AttnProcessor2_0):
        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(type(attn).__name__)
            return 2.0 * super().__call__(attn, hidden_states, *args, **kwargs)

    unet.set_attn_processor(Louder())
    found = run(unet, given)
    assert len(seen) == 8
    blocks = [one for one in unet.modules() if isinstance(one, StandIn) and one.changed()]
    assert len(blocks) == 4
    twin.set_attn_processor(Louder())
    assert share(found, run(twin, given)) <= FP32
    unet.set_attn_processor(AttnProcessor2_0())
    twin.set_attn_processor(AttnProcessor2_0())
    assert share(run(unet, given), run(twin, given)) <= FP32
    assert not any(one.changed() for one in unet.modules() if isinstance(one, StandIn))


@pytest.mark.parametrize("kwargs", [{"scale": 0.5}, {"unheard": 1}])
def test_attention_arguments_are_the_stock_layers_affair(kwargs):
    unet = tiny_unet()
    given = unet_inputs(unet)
    wanted = run(unet, given)
    dsi.init_inference(unet)
    found = run(unet, given | {"cross_attention_kwargs": {}})
    assert calls(unet)[1] == 0
    assert share(found, wanted) <= FP32
    assert share(run(unet, given | {"cross_attention_kwargs": dict(kwargs)}), wanted) <= FP32


def test_embeddings_in_a_tuple_are_the_stock_layers_affair():
    block = tiny_unet().down_blocks[0].attentions[0]
    holder = nn.ModuleDict({"attention": block})
    dsi.init_inference(holder)
    given = {"hidden_states": torch.randn(1, 16, 4, 4), "return_dict": False}
    # an IP-Adapter's processor takes embeddings of text and pictures; torch's fails on them
    with pytest.raises(AttributeError), torch.no_grad():
        holder["attention"](encoder_hidden_states=(torch.randn(1, 3, TEXT), [torch.randn(1, 2, TEXT)]), **given)
    assert holder["attention"].transformer_blocks[0].stock_calls == 1


# --- shared products --------------------------------------------------------------------------------------------------


def test_one_product_a_step_for_the_time_and_one_a_prompt_for_the_text():
    unet = tiny_unet("sdxl")
    given = unet_inputs(unet)
    dsi.init_inference(unet)
    time, text = (next(p for p in shared_products(unet) if p.name == name) for name in ("time", "context"))
    for step in range(3):
        run(unet, given | {"timestep": torch.tensor(step)})
    assert (time.products, text.products) == (3, 1)
    given["encoder_hidden_states"].mul_(2.0)
    run(unet, given)
    assert text.products == 2


def test_attention_of_narrow_heads_is_the_same_over_many_positions():
    unet = tiny_unet(attention_head_dim=8)
    given = unet_inputs(unet, 1, 24, 24)
    wanted = run(unet, given)
    dsi.init_inference(unet)
    assert share(run(unet, given), wanted) <= FP32
