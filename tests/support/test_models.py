"""The tiny models are hostile, repeatable and free of side effects; else every test that uses them is weaker."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support import CAUSAL, FAMILIES, ROPE_TYPES, cases, difference, fingerprint, inputs_for, tiny


@pytest.mark.parametrize(("family", "head"), cases())
def test_every_head_runs_with_every_padding(family, head):
    model = tiny(family, head)
    for pad in (None, "left", "right", "ragged"):
        output = model(**inputs_for(family, 3, 9, pad))
        assert all(torch.isfinite(t).all() for t in output.to_tuple() if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_parameter_is_off_its_neutral_value(family):
    for name, parameter in tiny(family).named_parameters():
        if parameter.numel() > 1:
            assert parameter.std() > 0.01, name


@pytest.mark.parametrize("family", CAUSAL)
def test_generation_runs_to_its_full_length(family):
    model = tiny(family)
    tokens = model.generate(**inputs_for(family, 2, 9, "ragged"), max_new_tokens=6, do_sample=False)
    assert tokens.shape == (2, 15)


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_each_rope_type_computes_something_else(rope_type):
    # longer than half of the positions, where the dynamic types begin to differ
    inputs = inputs_for("llama", 1, 40)
    plain, scaled = (tiny(name)(**inputs).logits for name in ("llama", f"llama_{rope_type}"))
    assert (plain - scaled).abs().max() > 0.1


def test_same_arguments_same_model_and_the_callers_random_state_is_left_alone():
    state = torch.get_rng_state()
    first, second = tiny("llama"), tiny("llama")
    assert torch.equal(torch.get_rng_state(), state)
    assert fingerprint(first, identity=False) == fingerprint(second, identity=False)
    assert fingerprint(first, identity=False) != fingerprint(tiny("llama", seed=1), identity=False)


def test_a_cast_leaves_float32_buffers_as_loading_does():
    model = tiny("llama", dtype=torch.bfloat16)
    assert model.dtype is torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype is torch.float32


def test_ragged_rows_have_lengths_of_their_own():
    left = inputs_for("llama", 3, 9, "ragged")["attention_mask"]
    right = inputs_for("bert", 3, 9, "ragged")["attention_mask"]
    assert left.sum(1).tolist() == right.sum(1).tolist() == [9, 6, 3]
    assert left[:, -1].all()
    assert right[:, 0].all()


# --- the fingerprint sees what a caller would ---------------------------------------------------------------------


def _one_bit(model):
    weight = model.lm_head.weight.data
    weight.view(torch.int32)[0, 0] ^= 1


def _forward_override(model):
    model.model.layers[0].mlp.forward = lambda x: x


def _hook(model):
    model.model.norm.register_forward_hook(lambda *_: None)


def _same_values_other_parameter(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def _same_values_other_stride(model):
    weight = model.lm_head.weight
    weight.data = weight.data.t().contiguous().t()


def _untied_copy(model):
    model.model.layers[1] = model.model.layers[0]


CHANGES = {
    "value lm_head.weight": _one_bit,
    "attributes model.layers.0.mlp": _forward_override,
    "hooks model.norm": _hook,
    "object lm_head.weight": _same_values_other_parameter,
    "layout lm_head.weight": _same_values_other_stride,
    "tie model.layers.1.mlp.up_proj.weight": _untied_copy,
    "training model.norm": lambda model: model.model.norm.train(),
    "config.hidden_size": lambda model: setattr(model.config, "hidden_size", 1),
    "generation_config.top_k": lambda model: setattr(model.generation_config, "top_k", 3),
    "layout lm_head.weight ": lambda model: model.lm_head.requires_grad_(False),
    "class model.norm": lambda model: setattr(model.model.norm, "__class__", type("Other", (nn.Module,), {})),
}


@pytest.mark.parametrize(("key", "change"), CHANGES.items(), ids=CHANGES)
def test_fingerprint_names_what_changed(key, change):
    model = tiny("llama")
    before = fingerprint(model)
    assert difference(before, fingerprint(model)) == []
    change(model)
    assert any(line.startswith(f"{key.strip()}:") for line in difference(before, fingerprint(model)))
