"""Whole pipelines, which find the plugins by themselves, paint stock's pictures on optimized components."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
import transformers

import dsi

VOCABULARY, WIDTH = 64, 32
PIECES = [*(chr(code) for code in range(ord("a"), ord("z") + 1))]


def hostile(model, seed=0):
    """Weights under which a lost bias, norm or gate shows."""
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=drawn)
            if parameter.dim() < 2:
                parameter.copy_(parameter.round() + 0.1 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


def vae(channels):
    sizes = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "sample_size": 16,
        "latent_channels": channels,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.06,
        "scaling_factor": 1.5,
    }
    return hostile(diffusers.AutoencoderKL(**sizes), 3)


def text_encoder(width, *, projects):
    config = transformers.CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        projection_dim=width,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    kind = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
    return hostile(kind(config), width)


def tokenizer():
    pieces = ["<unk>", "<|startoftext|>", "<|endoftext|>", *PIECES, *(f"{letter}</w>" for letter in PIECES)]
    special = {"unk_token": "<unk>", "bos_token": pieces[1], "eos_token": pieces[2], "pad_token": pieces[2]}
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], **special, model_max_length=16)


def sd3():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=48,
        pooled_projection_dim=48,
        out_channels=4,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=hostile(transformer, 1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(4),
        text_encoder=text_encoder(16, projects=True),
        tokenizer=tokenizer(),
        text_encoder_2=text_encoder(32, projects=True),
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def flux():
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4, tie_word_embeddings=False
    )
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in ("\u2581", *PIECES))]
    return diffusers.FluxPipeline(
        transformer=hostile(transformer, 1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(1),
        text_encoder=text_encoder(WIDTH, projects=False),
        tokenizer=tokenizer(),
        text_encoder_2=hostile(transformers.T5EncoderModel(config), 2),
        tokenizer_2=transformers.T5Tokenizer(vocab=pieces, extra_ids=0),
    )


def paint(pipe, prompt="a cat", **given):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    sizes = {"height": 16, "width": 16, "num_inference_steps": 3}
    return pipe(prompt, **{**sizes, **given}, generator=generator, output_type="pt").images


def close(found, wanted):
    return bool((found - wanted).abs().max() <= 1e-5 * wanted.abs().max())


PIPELINES = {"sd3": (sd3, 3), "flux": (flux, 4)}
CALLS = {
    "plain": {},
    "a row": {"guidance_scale": 1.0},
    "two pictures": {"num_images_per_prompt": 2},
    "two prompts": {"prompt": ["a cat", "dogs"]},
    "another size": {"height": 24, "width": 16},
}


@pytest.fixture(scope="module", params=PIPELINES)
def painted(request):
    """A stock pipeline, an optimized one of the same weights, its engine, and how many layers it has."""
    build, layers = PIPELINES[request.param]
    stock, ours = build(), build()
    return stock, ours, dsi.init_inference(ours), layers


@pytest.mark.parametrize("name", CALLS)
def test_pictures_are_stocks(painted, name):
    stock, ours, _, layers = painted
    before = calls(ours)
    assert close(paint(ours, **CALLS[name]), paint(stock, **CALLS[name]))
    ran = [(fused - old, other) for (fused, other), (old, _) in zip(calls(ours), before, strict=True)]
    assert len(ran) == layers
    assert all(fused > 0 and not stocks for fused, stocks in ran)


def calls(pipe):
    found = [module for module in pipe.transformer.modules() if hasattr(module, "fused_calls")]
    return [(one.fused_calls, one.stock_calls) for one in found]


def test_a_saved_pipeline_is_stocks(painted, tmp_path):
    stock, ours, _, _ = painted
    ours.transformer.save_pretrained(tmp_path)
    loaded = type(stock.transformer).from_pretrained(tmp_path)
    wanted = stock.transformer.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("name", PIPELINES)
def test_the_way_back(name):
    stock = PIPELINES[name][0]()
    ours = copy.deepcopy(stock)
    wanted = paint(stock)
    engine = dsi.init_inference(ours)
    assert close(
        engine(
            "a cat",
            height=16,
            width=16,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images,
        wanted,
    )
    engine.restore()
    assert torch.equal(paint(ours), wanted)
    assert calls(ours) == []
