"""The handle on a pipeline: its plan, what is refused before anything is changed, all components or none, and the way
back.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

import dsi
from dsi import engine as engine_module
from dsi.pipeline import is_pipeline
from tests.pipelines.test_pipelines import weights
from tests.support.models import tiny
from tests.support.pipelines import paint, text_to_image, text_to_image_xl

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")


def state(pipe: Any) -> dict[str, Any]:
    """Everything that an injection could change."""
    parts = {name: one for name, one in pipe.components.items() if isinstance(one, nn.Module)}
    found: dict[str, Any] = {}
    for name, part in parts.items():
        for path, module in part.named_modules():
            found[f"{name}.{path}"] = (type(module), sorted(module.__dict__))
    return found | {name: (id(x.data_ptr()), x.dtype, x.clone()) for name, x in weights(pipe).items()}


def unchanged(pipe: Any, before: dict[str, Any]) -> bool:
    now = state(pipe)
    if now.keys() != before.keys():
        return False
    return all(
        torch.equal(now[name][2], value[2]) and now[name][1] == value[1] if len(value) == 3 else now[name] == value
        for name, value in before.items()
    )


def test_what_a_pipeline_is():
    pipe = text_to_image()
    assert is_pipeline(pipe)
    assert not is_pipeline(pipe.unet)
    assert not is_pipeline(type(pipe))
    assert not is_pipeline(SimpleNamespace(components={}))


def test_the_plan_is_what_is_done():
    pipe = text_to_image(safety=True)
    pipe.text_encoder.train()
    before = state(pipe)
    plan = dsi.plan(pipe)
    assert unchanged(pipe, before)
    engine = dsi.init_inference(pipe)
    assert plan.table() == str(engine.plan) == str(plan)
    assert [one.name for one in plan.components] == ["vae", "text_encoder", "unet", "safety_checker"]
    assert plan.plans.keys() == {"vae", "unet", "safety_checker"}
    by_name = {one.name: one for one in plan.components}
    assert "training_mode" in by_name["text_encoder"].reason
    assert "text_encoder (CLIPTextModel, " in str(plan)
    assert "left alone: training_mode: the model is in training mode" in str(plan)
    data = json.loads(json.dumps(plan.to_dict()))
    assert [one["name"] for one in data["components"] if one["plan"]] == ["vae", "unet", "safety_checker"]
    assert "dtype" not in by_name["text_encoder"].reason


def test_the_engine_is_the_pipeline():
    pipe = text_to_image()
    wanted = paint(pipe)
    with dsi.init_inference(pipe) as engine:
        assert engine.unet is pipe.unet
        assert engine.scheduler is pipe.scheduler
        assert engine.active
        assert "3 components optimized" in repr(engine)
        assert engine.engines["unet"].module is pipe.unet
        with pytest.raises(AttributeError, match="no_such"):
            engine.no_such  # noqa: B018 - read for its error
    assert not engine.active
    assert "restored" in repr(engine)
    assert torch.equal(paint(engine)[0], wanted[0])
    engine.restore()


def test_some_components_are_nobodys():
    """They are named, and a cast is theirs too."""
    torch.manual_seed(0)
    pipe = text_to_image(text_encoder=Words().eval())
    plan = dsi.plan(pipe)
    assert {one.name: one.reason for one in plan.components}["text_encoder"] == "no_policy: no policy claims this class"
    assert "text_encoder" not in plan.plans
    engine = dsi.init_inference(pipe, dtype="bf16", keep_original="host")
    assert pipe.text_encoder.embed.weight.dtype is torch.bfloat16
    assert "0 layers replaced, float32 -> bfloat16 on cpu (no_policy" in str(engine.plan)
    engine.restore()
    assert pipe.text_encoder.embed.weight.dtype is torch.float32


class Words(nn.Module):
    """A text encoder that no policy knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 32)


def test_one_module_in_two_places():
    pipe = text_to_image_xl()
    pipe.register_modules(text_encoder=pipe.text_encoder_2)
    plan = dsi.plan(pipe)
    reasons = {one.name: one.reason for one in plan.components}
    assert reasons["text_encoder_2"] == "it is the same module as text_encoder"
    engine = dsi.init_inference(pipe)
    assert "text_encoder_2" not in engine.engines
    engine.restore()


def offloaded(pipe: Any) -> None:
    accelerate.cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
    pipe._all_hooks = [object()]


def hooked(pipe: Any) -> None:
    accelerate.hooks.add_hook_to_module(pipe.vae.decoder.conv_in, accelerate.hooks.ModelHook())


def mapped(pipe: Any) -> None:
    pipe.hf_device_map = {"unet": 0}


def on_several_devices(pipe: Any) -> None:
    pipe.vae.to("meta")


def adapted(pipe: Any) -> None:
    layer = pipe.unet.mid_block.resnets[0]
    layer.__class__ = type("LoraLayer", (type(layer),), {"__module__": "peft.tuners.lora"})


def compiled(pipe: Any) -> None:
    pipe.unet = torch.compile(pipe.unet)


def grouped(pipe: Any) -> None:
    pipe.unet.__dict__["_diffusers_hook"] = SimpleNamespace(hooks={"group_offloading": object()})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (offloaded, r"model offload is on.*\n.*unet carries an accelerate hook"),
        (hooked, r"vae\.decoder\.conv_in carries an accelerate hook"),
        (mapped, "the components are mapped to devices"),
        (on_several_devices, r"on different devices \(vae on meta, text_encoder on cpu\)"),
        (adapted, r"unet\.mid_block\.resnets\.0 carries adapters of peft"),
        (compiled, "unet is compiled; optimize the pipeline as it was before"),
        (grouped, r"unet carries hooks of diffusers \(group_offloading\)"),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_changed(change: Callable[[Any], None], words: str):
    pipe = text_to_image()
    change(pipe)
    parts = {name: [*one.modules()] for name, one in pipe.components.items() if isinstance(one, nn.Module)}
    with pytest.raises(dsi.UnsupportedModelError, match=words):
        dsi.init_inference(pipe)
    assert dsi.plan(pipe).refusals
    assert "refused: " in str(dsi.plan(pipe))
    for name, modules in parts.items():
        found = [*getattr(pipe, name).modules()]
        assert all(one is other for one, other in zip(found, modules, strict=True))
        assert not any("_dsi" in module.__dict__ for module in found)


def test_what_is_optimized_already_is_refused():
    pipe = text_to_image()
    first = dsi.init_inference(pipe.vae)
    before = state(pipe)
    with pytest.raises(dsi.InjectionError, match="vae: AutoencoderKL is optimized already"):
        dsi.init_inference(pipe)
    assert unchanged(pipe, before)
    first.restore()
    engine = dsi.init_inference(pipe)
    with pytest.raises(dsi.InjectionError, match="is optimized already"):
        dsi.init_inference(pipe)
    engine.restore()


@pytest.mark.parametrize("options", [{}, {"dtype": "fp16"}, {"dtype": "bf16", "keep_original": "host"}], ids=str)
@pytest.mark.parametrize("error", [RuntimeError("no more"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_all_components_or_none(options, error, monkeypatch):
    """The last one fails, whatever the casts of those before it had lost."""
    pipe = text_to_image(safety=True)
    before, made = state(pipe), []
    attach = engine_module.attach_session

    def failing(model: Any, injection: Any, config: Any) -> Any:
        made.append(type(model).__name__)
        if len(made) == 4:
            raise error
        return attach(model, injection, config)

    monkeypatch.setattr(engine_module, "attach_session", failing)
    if isinstance(error, RuntimeError):
        with pytest.raises(dsi.InjectionError, match=r"safety_checker: step \d+ failed.*no more.*\n.*no component"):
            dsi.init_inference(pipe, **options)
    else:
        with pytest.raises(KeyboardInterrupt):
            dsi.init_inference(pipe, **options)
    assert made == ["AutoencoderKL", "CLIPTextModel", "UNet2DConditionModel", "StableDiffusionSafetyChecker"]
    assert unchanged(pipe, before)
    monkeypatch.undo()
    dsi.init_inference(pipe, **options)


def test_a_cast_that_lost_bits_is_not_undone():
    pipe = text_to_image()
    engine = dsi.init_inference(pipe, dtype="fp16")
    assert not engine.plan.restorable
    with pytest.raises(dsi.RestoreError, match="the casts of vae, text_encoder, unet cannot be undone"):
        engine.restore()
    assert all(one.active for one in engine.engines.values())
    with pytest.raises(dsi.RestoreError, match="could not undo"), engine:
        pass


def test_a_component_that_cannot_be_given_back_yet(monkeypatch):
    """The others are, and a second call tries again."""
    pipe = text_to_image()
    wanted = paint(pipe)
    engine = dsi.init_inference(pipe)
    with monkeypatch.context() as patch:

        def fails() -> None:
            raise dsi.RestoreError("no memory")

        patch.setattr(engine.engines["vae"], "restore", fails)
        with pytest.raises(dsi.RestoreError, match="vae: no memory"):
            engine.restore()
    assert [name for name, one in engine.engines.items() if one.active] == ["vae"]
    assert engine.active
    engine.restore()
    assert torch.equal(paint(pipe)[0], wanted[0])


def test_strict_names_the_component():
    pipe = text_to_image()
    pipe.text_encoder.train()
    before = state(pipe)
    with pytest.raises(dsi.UnsupportedModelError, match=r"text_encoder\.encoder\.layers\.0: training_mode"):
        dsi.init_inference(pipe, strict=True)
    assert unchanged(pipe, before)
    pipe.text_encoder.eval()
    dsi.init_inference(pipe, strict=True)


@pytest.mark.parametrize("kind", ["register_modules", "register_components"])
def test_nothing_that_a_policy_knows(kind):
    pipe = type("Pipe", (Other,), {kind: lambda self: None})()
    with pytest.warns(UserWarning, match="dsi replaced nothing: words: no_policy") as caught:
        engine = dsi.init_inference(pipe)
    assert caught[0].filename == __file__
    assert not engine.engines
    with pytest.raises(dsi.UnsupportedModelError, match="words: no_policy"):
        dsi.init_inference(pipe, strict=True)


class Other:
    """Not of diffusers, but of the same form."""

    def __init__(self) -> None:
        self.components = {"words": Words().eval(), "scheduler": object(), "nothing": None}

    components: dict[str, Any] = {}  # noqa: RUF012 - the instance's hides it


def test_graphs_that_are_required_need_cuda():
    with pytest.raises(dsi.UnsupportedModelError, match="enable_cuda_graph=True, and vae is on cpu"):
        dsi.init_inference(text_to_image(), enable_cuda_graph=True)


def test_two_pipelines_do_not_meet():
    one, other = text_to_image(), text_to_image()
    wanted = paint(other)
    first, second = dsi.init_inference(one), dsi.init_inference(other)
    first.restore()
    assert second.active
    assert torch.allclose(paint(other)[0], wanted[0], atol=1e-5)
    second.restore()
    assert torch.equal(paint(other)[0], wanted[0])


def test_a_copy_of_an_optimized_pipeline():
    pipe = text_to_image()
    wanted = paint(pipe)
    engine = dsi.init_inference(pipe)
    copied = copy.deepcopy(pipe)
    engine.restore()
    for part in ("encoder", "decoder"):
        inner = getattr(copied.vae, part)
        assert inner.__dict__["forward"].model is inner
    assert torch.allclose(paint(copied)[0], wanted[0], atol=1e-5)


def test_a_model_alone_is_no_pipeline():
    assert isinstance(dsi.init_inference(tiny("clip_text")), dsi.InferenceEngine)
