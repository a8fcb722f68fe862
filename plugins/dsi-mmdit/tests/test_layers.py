"""Every layer of this package against the stock one: its values, its calls, what it leaves alone, the way back."""

from __future__ import annotations

import copy
import pickle

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0, JointAttnProcessor2_0

import dsi
from dsi_mmdit.flux import FLUX
from dsi_mmdit.sd3 import SD3

TEXT = 20


def hostile(model, seed=0):
    """Weights under which a lost bias, norm or gate shows, and epsilons that a swapped norm shows by."""
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=drawn)
            if parameter.dim() < 2:
                parameter.copy_(parameter.round() + 0.2 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    norms = [module for module in model.modules() if isinstance(getattr(module, "eps", None), float)]
    for number, norm in enumerate(norms):
        # an epsilon of its own, which is felt
        norm.eps = 0.01 * (1 + number % 7)
    return model.eval()


def sd3(**options):
    sizes = {
        "sample_size": 8,
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 3,
        "caption_projection_dim": 24,
        "joint_attention_dim": TEXT,
        "pooled_projection_dim": 12,
        "pos_embed_max_size": 16,
    }
    return hostile(diffusers.SD3Transformer2DModel(**{**sizes, **options}))


def flux(**options):
    sizes = {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": TEXT,
        "pooled_projection_dim": 12,
        "axes_dims_rope": (4, 4, 8),
    }
    return hostile(diffusers.FluxTransformer2DModel(**{**sizes, **options}))


MODELS = {
    "sd3": lambda: sd3(),
    "sd3, norms": lambda: sd3(qk_norm="rms_norm"),
    "sd3.5": lambda: sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    # also the layer that drops the text
    "sd3, all dual": lambda: sd3(dual_attention_layers=(0, 1, 2)),
    "flux": lambda: flux(),
    "flux, guidance": lambda: flux(guidance_embeds=True),
}
LAYERS = {"sd3": 3, "flux": 4}


def policy(name):
    return FLUX if name.startswith("flux") else SD3


def inputs(model, rows=2, height=3, width=5, length=7, seed=1):
    drawn = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=drawn).to(model.dtype)

    given = {
        "encoder_hidden_states": noise(rows, length, TEXT),
        "pooled_projections": noise(rows, 12),
        "timestep": torch.linspace(0.3, 0.7, rows).to(model.dtype),
        "return_dict": False,
    }
    if isinstance(model, diffusers.SD3Transformer2DModel):
        return {**given, "hidden_states": noise(rows, 4, height, width), "timestep": 1000 * given["timestep"]}
    rows_at, columns_at = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack((torch.zeros_like(rows_at), rows_at, columns_at), -1).flatten(0, 1).float()
    if model.config.guidance_embeds:
        given["guidance"] = torch.full((rows,), 3.5).to(model.dtype)
    return {
        **given,
        "hidden_states": noise(rows, height * width, 4),
        "txt_ids": torch.zeros(length, 3),
        "img_ids": ids,
        "joint_attention_kwargs": {},
    }


def run(model, **given):
    with torch.no_grad():
        return model(**(inputs(model) | given))[0]


def share(found, wanted):
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def containers(model):
    return [module for module in model.modules() if hasattr(module, "fused_calls")]


def calls(model):
    return [(one.fused_calls, one.stock_calls) for one in containers(model)]


@pytest.fixture(params=MODELS)
def pair(request):
    """A stock model, its optimized copy and the engine."""
    stock = MODELS[request.param]()
    model = copy.deepcopy(stock)
    return stock, model, dsi.init_inference(model, injection_policy=policy(request.param))


@pytest.fixture(params=["sd3.5", "flux"])
def whole(request):
    """As `pair`, of one model each."""
    stock = MODELS[request.param]()
    model = copy.deepcopy(stock)
    return stock, model, dsi.init_inference(model, injection_policy=policy(request.param))


@pytest.fixture(autouse=True)
def _own_backend():
    """What a test sets as diffusers' attention is set for that test; a model that sets its own sets everybody's."""
    with attention_backend("native"):
        yield


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_every_layer_is_replaced_and_equals_stock(pair, rows):
    stock, model, _ = pair
    given = inputs(stock, rows)
    assert share(run(model, **given), run(stock, **given)) <= 1e-5
    assert calls(model) == [(1, 0)] * LAYERS["flux" if hasattr(stock, "single_transformer_blocks") else "sd3"]


@pytest.mark.parametrize(("height", "width", "length"), [(1, 1, 1), (7, 3, 1), (8, 8, 77)])
def test_sizes(whole, height, width, length):
    stock, model, _ = whole
    given = inputs(stock, 2, height, width, length)
    assert share(run(model, **given), run(stock, **given)) <= 1e-5


def test_each_layer_gives_what_stock_gives(pair):
    stock, model, _ = pair
    for one, other in zip(layers(model), layers(stock), strict=True):
        given = layer_inputs(other)
        with torch.no_grad():
            found, wanted = one(**given), other(**given)
        assert type(found) is type(wanted) is tuple
        assert [x is None for x in found] == [x is None for x in wanted]
        for mine, its in zip(found, wanted, strict=True):
            assert its is None or (mine.dtype, mine.shape) == (its.dtype, its.shape)
            assert its is None or share(mine, its) <= 1e-5


def layers(model):
    return [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]


def layer_inputs(layer, dtype=torch.float32, scale=1.0):
    """Arguments of one layer."""
    drawn = torch.Generator().manual_seed(5)
    width = next(layer.parameters()).shape[-1]
    given = {
        "hidden_states": torch.randn(2, 6, width, generator=drawn) * scale,
        "encoder_hidden_states": torch.randn(2, 5, width, generator=drawn) * scale,
        "temb": torch.randn(2, width, generator=drawn),
    }
    given = {name: value.to(dtype) for name, value in given.items()}
    if "Flux" in type(layer).__name__:
        angles = torch.rand(11, 8, generator=drawn).repeat_interleave(2, -1)
        given["image_rotary_emb"] = (angles.cos(), angles.sin())
    return given


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_in_16_bits_are_stocks(whole, dtype):
    _, model, engine = whole
    engine.restore()
    errors = []
    for seed in range(4):
        one = copy.deepcopy(hostile(model, seed)).to(dtype)
        wide = copy.deepcopy(one).float()
        given = inputs(one, seed=seed)
        plain = run(one, **given)
        wanted = run(wide, **{k: v.float() if torch.is_tensor(v) else v for k, v in given.items()})
        dsi.init_inference(one, injection_policy=FLUX if hasattr(one, "single_transformer_blocks") else SD3)
        found = run(one, **given)
        assert {fused for fused, _ in calls(one)} == {1}
        errors.append([float((x.double() - wanted.double()).square().mean().sqrt()) for x in (found, plain)])
    ours, stocks = torch.tensor(errors).mean(0).tolist()
    assert ours <= 1.2 * stocks


def test_fp16_is_cut_off_where_stock_cuts_off():
    stock = flux()
    for layer in layers(stock):
        # what is added last passes the largest number
        last = layer.proj_out if hasattr(layer, "proj_out") else layer.ff_context.net[2]
        last.weight.data *= 50000 if hasattr(layer, "proj_out") else 200000
    stock.half()
    model = copy.deepcopy(stock)
    dsi.init_inference(model, injection_policy=FLUX)
    for one, other in zip(layers(model), layers(stock), strict=True):
        given = layer_inputs(other, torch.float16)
        with torch.no_grad():
            found, wanted = one(**given)[0], other(**given)[0]
        assert found.abs().max() == wanted.abs().max() == 65504.0
        assert one.fused_calls == 1


def test_one_row_of_time_holds_for_all(whole):
    stock, model, _ = whole
    for one, other in zip(layers(model), layers(stock), strict=True):
        given = layer_inputs(other)
        given["temb"] = given["temb"][:1]
        with torch.no_grad():
            found, wanted = one(**given)[1], other(**given)[1]
        assert share(found, wanted) <= 1e-5
        assert (one.fused_calls, one.stock_calls) == (1, 0)


def test_layers_of_flux_without_rotation():
    stock = flux()
    model = copy.deepcopy(stock)
    dsi.init_inference(model, injection_policy=FLUX)
    for one, other in zip(layers(model), layers(stock), strict=True):
        given = {**layer_inputs(other), "image_rotary_emb": None}
        with torch.no_grad():
            assert share(one(**given)[1], other(**given)[1]) <= 1e-5
        assert one.fused_calls == 1


def test_control_residuals(whole):
    stock, model, _ = whole
    name = (
        "controlnet_block_samples" if hasattr(stock, "single_transformer_blocks") else "block_controlnet_hidden_states"
    )
    width = stock.inner_dim
    residuals = [torch.randn(2, 15, width, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    assert share(run(model, **{name: residuals}), run(stock, **{name: residuals})) <= 1e-5


def test_what_came_in_is_not_written_to(whole):
    stock, model, _ = whole
    for one, other in zip(layers(model), layers(stock), strict=True):
        given = layer_inputs(other)
        kept = copy.deepcopy(given)
        with torch.no_grad():
            one(**given)
        assert all(torch.equal(given[name], kept[name]) for name in kept if torch.is_tensor(kept[name]))


# --- calls that are the stock layer's affair ------------------------------------------------------------------------


def test_arguments_of_attention_run_the_stock_layer(whole):
    stock, model, _ = whole
    length = 7 + 15
    mask = torch.randn(2, 1, length, length, generator=torch.Generator().manual_seed(2))
    given = {"joint_attention_kwargs": {"attention_mask": mask}}
    if not hasattr(stock, "single_transformer_blocks"):
        # what its processor takes and does not read
        given = {"joint_attention_kwargs": {"foo": 1}}
    assert share(run(model, **given), run(stock, **given)) <= 1e-6
    assert {fused for fused, _ in calls(model)} == {0}


def test_a_time_or_context_of_another_kind_runs_the_stock_layer(whole):
    stock, model, _ = whole
    for one, other in zip(layers(model), layers(stock), strict=True):
        given = {**layer_inputs(other), "unknown": 1}
        with pytest.raises(TypeError, match="unknown"):
            one(**given)
        given = layer_inputs(other)
        given["encoder_hidden_states"] = given["encoder_hidden_states"].double()
        with pytest.raises(RuntimeError):
            one(**given)
        assert (one.fused_calls, one.stock_calls) == (0, 2)


@pytest.mark.parametrize("change", [lambda terms: terms[:1], lambda terms: terms.double(), lambda terms: terms.half()])
def test_rotary_terms_of_another_kind_run_the_stock_layer(change):
    stock = flux()
    model = copy.deepcopy(stock)
    dsi.init_inference(model, injection_policy=FLUX)
    for one, other in zip(layers(model), layers(stock), strict=True):
        given = layer_inputs(other)
        given["image_rotary_emb"] = tuple(change(terms) for terms in given["image_rotary_emb"])
        with torch.no_grad():
            assert share(one(**given)[1], other(**given)[1]) <= 1e-6
        assert (one.fused_calls, one.stock_calls) == (0, 1)


def test_another_attention_of_diffusers_runs_the_stock_layer():
    model = flux()
    dsi.init_inference(model, injection_policy=FLUX)
    with attention_backend("_native_math"):
        run(model)
    assert {fused for fused, _ in calls(model)} == {0}
    run(model)
    assert {fused for fused, _ in calls(model)} == {1}
    model.set_attention_backend("_native_math")
    run(model)
    assert {fused for fused, _ in calls(model)} == {1}


def test_chunks_change_nothing_but_memory():
    stock = sd3(qk_norm="rms_norm")
    model = copy.deepcopy(stock)
    dsi.init_inference(model, injection_policy=SD3)
    for one in (stock, model):
        one.enable_forward_chunking(1, 1)
    assert share(run(model), run(stock)) <= 1e-5


def test_a_processor_of_the_second_attention_runs_the_stock_layer():
    model = sd3(dual_attention_layers=(1,))
    dsi.init_inference(model, injection_policy=SD3)

    class Mine(JointAttnProcessor2_0):
        pass

    model.transformer_blocks[1].original.attn2.processor = Mine()
    run(model)
    assert calls(model) == [(1, 0), (0, 1), (1, 0)]


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("sd3", lambda model: model.set_attn_processor(FusedJointAttnProcessor2_0()), "FusedJointAttnProcessor2_0"),
        ("sd3", lambda model: model.fuse_qkv_projections(), "processor"),
        ("sd3", lambda model: model.enable_forward_chunking(2), "_chunk_size is 2"),
        ("flux", lambda model: model.fuse_qkv_projections(), "fused"),
        ("flux", lambda model: model.set_attention_backend("_native_math"), "_attention_backend"),
    ],
)
def test_what_is_no_layer_of_these_is_left_with_a_reason(name, change, reason):
    model = MODELS[name]()
    change(model)
    plan = dsi.plan(model, injection_policy=policy(name))
    assert not plan.blocks
    told = [left.reason.text for left in plan.left if left.reason.code != "no_policy"]
    assert len(told) == LAYERS[name]
    assert all(reason in text for text in told)


def test_a_norm_of_another_kind_is_left_with_a_reason():
    model = sd3(qk_norm="rms_norm")
    attention = model.transformer_blocks[0].attn
    attention.norm_q = torch.nn.LayerNorm(8)
    plan = dsi.plan(model, injection_policy=SD3)
    assert len(plan.blocks) == 2
    assert "norm_q" in next(left.reason.text for left in plan.left if left.path == "transformer_blocks.0")


def test_autocast_runs_the_stock_layer(whole):
    stock, model, _ = whole
    with torch.autocast("cpu", torch.bfloat16):
        # its weights may lie in another order in memory
        assert share(run(model), run(stock)) <= 2e-2
    assert {fused for fused, _ in calls(model)} == {0}


# --- the way back, and torch's own machinery ------------------------------------------------------------------------


def test_weights_have_their_stock_names_and_come_back_bit_for_bit(pair):
    stock, model, engine = pair
    wanted, found = stock.state_dict(), model.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    engine.restore()
    back = dict(model.named_parameters())
    assert back.keys() == dict(stock.named_parameters()).keys()
    assert all(torch.equal(back[name], value) for name, value in stock.named_parameters())
    assert torch.equal(run(model), run(stock))
    assert not containers(model)


def test_new_weights_are_used(pair):
    stock, model, _ = pair
    other = hostile(copy.deepcopy(stock), 9)
    model.load_state_dict(other.state_dict())
    assert share(run(model), run(other)) <= 1e-5
    assert share(run(model), run(stock)) > 1e-3


def test_copies_and_pickles_compute(whole):
    stock, model, _ = whole
    wanted = run(stock)
    for one in (copy.deepcopy(layers(model)[0]), pickle.loads(pickle.dumps(layers(model)[0]))):  # noqa: S301 - our own
        model_of = copy.deepcopy(model)
        model_of.transformer_blocks[0] = one
        assert share(run(model_of), wanted) <= 1e-5
        assert one.fused_calls == 1


def test_gradients_are_refused(whole):
    stock, model, _ = whole
    given = layer_inputs(layers(stock)[0])
    given["hidden_states"].requires_grad_()
    context, hidden = layers(model)[0](**given)
    for one in (context, hidden):
        assert one.requires_grad
        with pytest.raises(dsi.UnsupportedModelError, match="no gradients"):
            one.sum().backward()


def test_the_last_layer_drops_its_context_with_gradients_too():
    model = sd3()
    dsi.init_inference(model, injection_policy=SD3)
    last = layers(model)[-1]
    given = layer_inputs(layers(sd3())[-1])
    given["hidden_states"].requires_grad_()
    for more in ({}, {"joint_attention_kwargs": {"foo": 1}}):
        context, hidden = last(**given, **more)
        assert context is None
        assert hidden.requires_grad


def test_casts_and_moves(whole):
    stock, model, _ = whole
    model.to(torch.bfloat16).to(torch.float32)
    wanted = copy.deepcopy(stock).to(torch.bfloat16).to(torch.float32)
    assert share(run(model), run(wanted)) <= 1e-5
    assert {fused for fused, _ in calls(model)} == {1}


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sd3.5", "flux"])
@pytest.mark.parametrize("rows", [1, 2])
def test_graphs_on_a_gpu(name, dtype, rows):
    # heads of 64, as the real ones have
    sizes = {"attention_head_dim": 64, "num_attention_heads": 4}
    more = {"axes_dims_rope": (16, 24, 24)} if name == "flux" else {"caption_projection_dim": 256}
    more |= {} if name == "flux" else {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}
    stock = (flux if name == "flux" else sd3)(**sizes, **more)
    stock = stock.to("cuda", dtype)
    model, wide = copy.deepcopy(stock), copy.deepcopy(stock).float()
    dsi.init_inference(model, injection_policy=policy(name), enable_cuda_graph=True)
    errors = []
    for seed in range(4):
        given = {key: moved(value, "cuda") for key, value in inputs(stock, rows, 8, 8, 77, seed).items()}
        full = {key: moved(value, torch.float32) for key, value in given.items()}
        wanted = run(wide, **full).double()
        errors.append([float((run(one, **given).double() - wanted).square().mean().sqrt()) for one in (model, stock)])
    ours, stocks = torch.tensor(errors).mean(0).tolist()
    assert ours <= 1.2 * stocks
    assert all(fused > 0 and not stocks_calls for fused, stocks_calls in calls(model))


def moved(value, where):
    return value.to(where) if torch.is_tensor(value) and (where == "cuda" or value.is_floating_point()) else value
