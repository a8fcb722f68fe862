"""The configuration: every malformed one is one ConfigError with the path in it, every valid one loads."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import attrs
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dsi.config import InferenceConfig, _Request, default_inference_config, load_config
from dsi.config_fields import MAX_TOKENS, short
from dsi.errors import ConfigError, DsiError
from dsi.policy import Block, Policy

POLICY = Policy(name="p", blocks=[Block(layer="m:Layer", container="m:Container", slots={})])


class Layer(torch.nn.Module):
    pass


class Odd:
    """A value whose text and whose comparison both fail."""

    def __repr__(self):
        raise RuntimeError("no text")

    def __eq__(self, other):
        raise RuntimeError("no comparison")

    __hash__ = object.__hash__


# --- malformed: what is given, the path of the fault, a piece of its advice ---------------------------------------

NOT_BOOL = [1, 0, "true", "yes", None, [], {}, 1.0]
NOT_TOKENS = [0, -1, True, False, "8", 8.0, float("nan"), [], MAX_TOKENS + 1, 10**5000]
TP = "tensor parallelism is not in this version"
MOE = "mixture-of-experts"
QUANT = "quantizers are not in this version"
WEIGHTS = "from_pretrained"

MALFORMED: list[tuple[dict, str, str]] = [
    *[({"strict": value}, "strict", "use True or False") for value in NOT_BOOL],
    *[({"kernel_inject": value}, "replace_with_kernel_inject", "use True or False") for value in NOT_BOOL],
    *[({"use_triton": value}, "use_triton", "True, False or None") for value in NOT_BOOL if value is not None],
    *[({"max_out_tokens": value}, "max_out_tokens", "an int from 1") for value in NOT_TOKENS],
    *[({"min_tokens": value}, "min_out_tokens", "an int from 1") for value in [*NOT_TOKENS, None]],
    # dtype
    *[
        ({"dtype": value}, "dtype", "float16 (fp16, half")
        for value in ("fp8", "FP16", "", "float64", "torch.float", 16, True, [], {}, Odd(), torch.float64, torch.int64)
    ],
    *[({"dtype": value}, "dtype", QUANT) for value in ("int8", "torch.int8", torch.int8)],
    # policies
    *[
        ({"injection_policy": value}, "injection_policy", "plugin:name")
        for value in ("llama", ":llama", "llama:", "a:b:c", "a: b", "", 3, True, [POLICY], Policy, Layer)
    ],
    ({"injection_policy": {Layer: ("attn.out", "mlp.out")}}, "injection_policy", "needs tp_size > 1"),
    ({"injection_dict": {Layer: ("attn.out",)}}, "injection_policy", "row-split outputs of tensor parallelism"),
    ({"policy": {}}, "injection_policy", "plugin:name"),
    ({"injection_policy_tuple": ("a", "b")}, "injection_policy_tuple", "dsi.policy.Policy"),
    ({"replace_method": "manual"}, "replace_method", "use 'auto'"),
    ({"replace_method": None}, "replace_method", "use 'auto'"),
    # tensor parallelism
    *[
        ({"tensor_parallel": {"tp_size": value}}, "tensor_parallel.tp_size", TP)
        for value in (0, 2, -1, True, "1", None)
    ],
    *[({"tp": value}, "tensor_parallel", "dict with any of enabled, tp_size") for value in (2, "2", [2], True, 1.0)],
    ({"tp": {"tp_grain_size": 32}}, "tensor_parallel.tp_grain_size", "use 64"),
    ({"tp": {"mpu": object()}}, "tensor_parallel.mpu", TP),
    ({"tp": {"tp_group": object()}}, "tensor_parallel.tp_group", TP),
    ({"tp": {"enabled": "yes"}}, "tensor_parallel.enabled", "use True or False"),
    ({"mp_size": 2}, "mp_size", TP),
    ({"mp_size": None}, "mp_size", "use 1"),
    ({"mp_size": True}, "mp_size", "use 1"),
    ({"mp_size": 1, "tp": {"tp_size": 2}}, "mp_size", "differs from tensor_parallel.tp_size: 2"),
    ({"mpu": object()}, "mpu", TP),
    # what comes later
    ({"enable_cuda_graph": 0}, "enable_cuda_graph", "use True, False or None"),
    ({"triton_autotune": True}, "triton_autotune", "use False"),
    ({"quant": {"enabled": True}}, "quant.enabled", QUANT),
    ({"quant": {"weight": {"num_bits": 8}}}, "quant.weight", QUANT),
    ({"quant": {"activation": {}}}, "quant.activation", QUANT),
    ({"quant": {"qkv": {"enabled": True}}}, "quant.qkv", QUANT),
    ({"quant": True}, "quant", "dict with any of enabled"),
    ({"moe": True}, "moe.enabled", MOE),
    ({"moe": {"enabled": True}}, "moe.enabled", MOE),
    ({"moe": {"ep_size": 2}}, "moe.ep_size", MOE),
    ({"moe": {"num_experts": [4]}}, "moe.moe_experts", MOE),
    ({"moe": {"type": "residual"}}, "moe.type", MOE),
    ({"moe": {"expert_group": object()}}, "moe.ep_group", MOE),
    ({"moe": {"ep_mp_group": object()}}, "moe.ep_mp_group", MOE),
    ({"moe": 1}, "moe", "dict with any of enabled"),
    ({"ep_size": 2}, "ep_size", MOE),
    ({"ep_group": object()}, "ep_group", MOE),
    ({"expert_group": object()}, "ep_group", MOE),
    ({"ep_mp_group": object()}, "ep_mp_group", MOE),
    ({"moe_experts": [2]}, "moe_experts", MOE),
    ({"moe_type": "standard"}, "moe_type", MOE),
    # checkpoints
    ({"checkpoint": "ckpt.json"}, "checkpoint", WEIGHTS),
    ({"checkpoint": {"type": "ds_model"}}, "checkpoint", WEIGHTS),
    ({"checkpoint": False}, "checkpoint", WEIGHTS),
    ({"base_dir": "/data"}, "base_dir", WEIGHTS),
    ({"save_mp_checkpoint_path": "/data"}, "save_mp_checkpoint_path", WEIGHTS),
    ({"checkpoint_config": {"checkpoint_dir": "/data"}}, "checkpoint_config.checkpoint_dir", WEIGHTS),
    ({"ckpt_config": {"base_dir": "/data"}}, "checkpoint_config.base_dir", WEIGHTS),
    ({"ckpt_config": "/data"}, "checkpoint_config", "dict with any of checkpoint_dir"),
    ({"training_mp_size": 2}, "training_mp_size", "use 1"),
    # what the model or the container decides
    ({"return_tuple": True}, "return_tuple", "what the original layer returned"),
    ({"return_tuple": False}, "return_tuple", "leaving the option out"),
    ({"triangular_masking": True}, "triangular_masking", "read from the model"),
    ({"tm": False}, "triangular_masking", "leaving the option out"),
    ({"transposed_mode": True}, "transposed_mode", "use False"),
    ({"set_empty_params": True}, "set_empty_params", "use False"),
    ({"keep_module_on_host": False}, "keep_module_on_host", "model.to(device)"),
    ({"zero": {"stage": 3}}, "zero", "use {}"),
    ({"zero": 3}, "zero", "use {}"),
    ({"config": {"hidden_size": 8}}, "config", "use None"),
    ({"args": {"hidden_size": 8}}, "config", "use None"),
    *[({"keep_original": value}, "keep_original", '"host" or None') for value in ("device", True, "", 1)],
    # names
    ({"kernel_injct": True}, "kernel_injct", "did you mean kernel_inject?"),
    ({"replace_with_kernel": True}, "replace_with_kernel", "did you mean replace_with_kernel_inject?"),
    ({"torch_dtype": "fp16"}, "torch_dtype", "did you mean dtype?"),
    ({"max_token": 8}, "max_token", "did you mean max_tokens?"),
    ({"tp_size": 2}, "tp_size", "did you mean tensor_parallel.tp_size?"),
    ({"num_experts": 2}, "num_experts", "did you mean moe.num_experts?"),
    ({"tp": {"tp_sise": 2}}, "tensor_parallel.tp_sise", "did you mean tensor_parallel.tp_size?"),
    ({"tp": {"strict": True}}, "tensor_parallel.strict", "did you mean strict?"),
    ({"moe": {"enable": False}}, "moe.enable", "did you mean moe.enabled?"),
    ({"quant": {"weights": {}}}, "quant.weights", "did you mean quant.weight?"),
    ({"ckpt_config": {"dir": ""}}, "checkpoint_config.dir", "checkpoint_dir"),
    ({"quantization_setting": 8}, "quantization_setting", "unknown option"),
    ({"zzz": "auto"}, "zzz", "use any of dtype, "),
    ({"": 1}, "''", "unknown option"),
    ({"x" * 10_000: 1}, "'xxx", "unknown option"),
    ({"a\nb": 1}, r"'a\nb'", "unknown option"),
    ({1: 2}, "1", "the name of an option is a string"),
    ({None: 2}, "None", "the name of an option is a string"),
    ({("a", "b"): 2}, "('a', 'b')", "the name of an option is a string"),
    ({"tp": {3: 2}}, "tensor_parallel.3", "the name of an option is a string"),
    # two spellings
    (
        {"kernel_inject": True, "replace_with_kernel_inject": False},
        "replace_with_kernel_inject",
        "True as kernel_inject and False as",
    ),
    ({"max_tokens": 8, "max_out_tokens": 9}, "max_out_tokens", "8 as max_tokens and 9 as max_out_tokens are both"),
    ({"min_tokens": 1, "min_out_tokens": 2}, "min_out_tokens", "are both given"),
    ({"tp": {"enabled": True}, "tensor_parallel": {"enabled": False}}, "tensor_parallel.enabled", "are both given"),
    ({"tp": {}, "tensor_parallel": {"tp_size": 3}}, "tensor_parallel.tp_size", TP),
    ({"policy": "a:b", "injection_policy": "a:c"}, "injection_policy", "'a:b' as policy and 'a:c' as"),
    ({"policy": "a:b", "injection_dict": POLICY}, "injection_policy", "are both given"),
    ({"strict": True, "dtype": "fp16", "max_tokens": 3, "max_out_tokens": "3"}, "max_out_tokens", "an int from 1"),
    # pairs
    ({"min_out_tokens": 9, "max_out_tokens": 8}, "min_out_tokens", "more than max_out_tokens: 8"),
    ({"kernel_inject": False, "policy": "a:b"}, "injection_policy", "replace_with_kernel_inject=True"),
    ({"kernel_inject": False, "policy": POLICY}, "injection_policy", "replace_with_kernel_inject=True"),
    ({"kernel_inject": False, "use_triton": True}, "use_triton", "replace_with_kernel_inject=True"),
    ({"kernel_inject": False, "strict": True}, "strict", "replace_with_kernel_inject=True"),
]


def _lines(error: ConfigError, path: str) -> str:
    """The faults of one path, joined."""
    return " | ".join(fault for fault in error.faults if re.match(rf"{re.escape(path)}(:|x)", fault))


def test_the_table_is_long_and_has_no_entry_twice():
    texts = [f"{short(config)} {[type(value) for value in config.values()]}" for config, _, _ in MALFORMED]
    # what has no text is told apart by being there
    texts = [text for text in texts if not text.startswith("<dict>")]
    assert len(texts) >= 130
    assert sorted(texts) == sorted(set(texts))


@pytest.mark.parametrize(
    ("config", "path", "advice"), MALFORMED, ids=lambda value: value[:24] if isinstance(value, str) else ""
)
def test_malformed(config, path, advice):
    with pytest.raises(ConfigError, match=r"^\d+ faults? in the configuration\n  - ") as caught:
        load_config(config)
    assert advice in _lines(caught.value, path), caught.value.faults
    assert all(len(fault) < 600 and "\n" not in fault for fault in caught.value.faults)


@pytest.mark.parametrize(
    ("config", "path", "advice"), MALFORMED, ids=lambda value: value[:24] if isinstance(value, str) else ""
)
def test_malformed_keyword_arguments(config, path, advice):
    with pytest.raises(ConfigError) as caught:
        load_config({}, config)
    assert advice in _lines(caught.value, path)


def test_every_fault_is_in_one_error():
    """One of each kind, from both places, nested and not."""
    config = {
        "tp": {"tp_szie": 2, "tp_size": 4},
        "kernl_inject": True,
        "moe": True,
        "strict": "x",
        "max_tokens": 3,
        "max_out_tokens": 4,
        "tm": True,
        3: 4,
        "min_tokens": 8,
    }
    with pytest.raises(ConfigError, match="12 faults in the configuration") as caught:
        load_config(config, {"dtype": "int8", "use_triton": 1, "strict": True})
    for path in (
        "tensor_parallel.tp_szie", "tensor_parallel.tp_size", "kernl_inject", "moe.enabled", "strict", "max_out_tokens",
        "triangular_masking", "3", "min_out_tokens", "dtype", "use_triton",
    ):  # fmt: skip
        assert _lines(caught.value, path), path


def test_the_value_and_what_would_do_are_named():
    with pytest.raises(
        ConfigError, match=r"max_out_tokens: -5 is no number of tokens; use an int from 1 to 2147483647"
    ):
        load_config(max_out_tokens_of(-5))


def max_out_tokens_of(value):
    return {"max_out_tokens": value}


# --- valid --------------------------------------------------------------------------------------------------------

SPELLINGS = {
    "float16": ["fp16", "float16", "half", "torch.float16", torch.float16, torch.half],
    "float32": ["fp32", "float32", "float", "torch.float32", torch.float32],
    "bfloat16": ["bf16", "bfloat16", "bfloat", "torch.bfloat16", torch.bfloat16],
    None: [None, "auto"],
}


@pytest.mark.parametrize(("name", "spelled"), [(n, s) for n, several in SPELLINGS.items() for s in several], ids=str)
def test_every_spelling_of_a_dtype(name, spelled):
    assert load_config({"dtype": spelled}).dtype == name


VALID: list[tuple[dict, dict]] = [
    ({}, {}),
    ({"kernel_inject": False}, {"replace_with_kernel_inject": False}),
    ({"replace_with_kernel_inject": True}, {}),
    ({"max_tokens": 8}, {"max_out_tokens": 8}),
    ({"max_out_tokens": None}, {}),
    ({"min_tokens": 8, "max_tokens": 8}, {"min_out_tokens": 8, "max_out_tokens": 8}),
    ({"max_out_tokens": MAX_TOKENS}, {"max_out_tokens": MAX_TOKENS}),
    *[({name: POLICY}, {"injection_policy": POLICY}) for name in ("injection_policy", "injection_dict", "policy")],
    ({"policy": "acme:fast"}, {"injection_policy": "acme:fast"}),
    ({"use_triton": True}, {"use_triton": True}),
    ({"use_triton": False}, {"use_triton": False}),
    ({"strict": True}, {"strict": True}),
    ({"keep_original": "host"}, {"keep_original": "host"}),
    ({"kernel_inject": False, "use_triton": False}, {"replace_with_kernel_inject": False, "use_triton": False}),
    ({"kernel_inject": False, "strict": False, "policy": None}, {"replace_with_kernel_inject": False}),
    # DeepSpeed's own defaults, and what means nothing
    ({"tensor_parallel": {"enabled": True, "tp_size": 1, "tp_grain_size": 64, "mpu": None, "tp_group": None}}, {}),
    ({"tp": {}}, {}),
    ({"tp": {"enabled": False}}, {}),
    ({"tp": None}, {}),
    ({"enable_cuda_graph": False, "triton_autotune": False}, {"enable_cuda_graph": False}),
    ({"zero": {}}, {}),
    ({"quant": {}}, {}),
    ({"quant": {"enabled": False}}, {}),
    ({"moe": False}, {}),
    ({"moe": {}}, {}),
    ({"moe": {"enabled": False, "ep_size": 1, "num_experts": None, "ep_group": None}}, {}),
    ({"ep_size": 1, "ep_group": None, "ep_mp_group": None, "moe_experts": None, "moe_type": None}, {}),
    ({"keep_module_on_host": True}, {}),
    ({"checkpoint": None, "base_dir": "", "save_mp_checkpoint_path": None, "checkpoint_config": {}}, {}),
    ({"ckpt_config": {"checkpoint_dir": None, "base_dir": ""}}, {}),
    ({"set_empty_params": False, "training_mp_size": 1, "transposed_mode": False, "config": None, "args": None}, {}),
    ({"injection_policy_tuple": None, "mpu": None}, {}),
    # two spellings that agree
    ({"kernel_inject": False, "replace_with_kernel_inject": False}, {"replace_with_kernel_inject": False}),
    ({"max_tokens": 8, "max_out_tokens": 8}, {"max_out_tokens": 8}),
    ({"tp": {"tp_size": 1}, "tensor_parallel": {"tp_size": 1}}, {}),
    # "auto" is "not given", whatever the option
    ({"dtype": "auto", "max_tokens": "auto", "tp": "auto", "return_tuple": "auto", "strict": "auto"}, {}),
    ({"max_tokens": "auto", "max_out_tokens": 8}, {"max_out_tokens": 8}),
    ({"tp": {"tp_size": "auto"}}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("config", "differs"), VALID, ids=lambda value: ",".join(map(str, value)) or "-")
@pytest.mark.parametrize("place", ["config", "kwargs"])
def test_valid(config, differs, place):
    loaded = load_config(config) if place == "config" else load_config(None, config)
    assert loaded == InferenceConfig(**differs)


def test_defaults():
    config = load_config()
    assert attrs.asdict(config) == {
        "dtype": None,
        "replace_with_kernel_inject": True,
        "injection_policy": None,
        "max_out_tokens": None,
        "min_out_tokens": 1,
        "use_triton": None,
        "enable_cuda_graph": None,
        "strict": False,
        "keep_original": None,
    }
    assert load_config(default_inference_config()) == config


def test_the_defaults_given_out_are_a_copy():
    default_inference_config()["strict"] = True
    assert default_inference_config()["strict"] is False


@pytest.mark.parametrize("name", sorted(attr.name for attr in attrs.fields(_Request)))
def test_no_option_is_accepted_and_ignored(name):
    """A value that nobody can mean is refused for every name there is, with the name in front."""
    with pytest.raises(ConfigError, match=rf"\n  - {name}(: |\.)"):
        load_config({name: object()})


def test_a_mapping_that_is_no_dict():
    assert load_config(MappingProxyType({"strict": True})).strict


# --- two places ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "kwargs"),
    [
        ({"dtype": "fp16"}, {"dtype": torch.float16}),
        ({"kernel_inject": True}, {"replace_with_kernel_inject": True}),
        ({"tp": {"tp_size": 1}}, {"tensor_parallel": {"tp_size": 1}}),
        ({"policy": POLICY}, {"injection_policy": POLICY}),
        ({"dtype": "auto"}, {"dtype": "fp16"}),
        ({"moe": False}, {"moe": {"enabled": False}}),
        ({"tp": {"tp_size": 1}}, {"tp": {"enabled": False}}),
    ],
    ids="+".join,
)
def test_both_places_may_say_the_same(config, kwargs):
    load_config(config, kwargs)


@pytest.mark.parametrize(
    ("config", "kwargs", "words"),
    [
        ({"dtype": "fp16"}, {"dtype": "bf16"}, "dtype: 'fp16' in config and 'bf16' in the keyword arguments"),
        ({"max_tokens": 8}, {"max_out_tokens": 9}, "max_out_tokens: 8 in config and 9 in the keyword arguments"),
        ({"strict": True}, {"strict": 1}, "strict: True in config and 1 in the keyword arguments"),
        ({"tp": {"tp_size": 1}}, {"tp": {"tp_size": True}}, "tensor_parallel.tp_size: 1 in config and True in the"),
        ({"tp": {"tp_size": 1}}, {"tp": {"tp_size": 2}}, "tensor_parallel.tp_size: 2 is not supported"),
        ({"strict": True}, {"strict": "x"}, "strict: 'x' is no bool"),
        ({"zzz": 1}, {"zzz": 2}, "zzz: 1 in config and 2 in the keyword arguments"),
    ],
    ids=str,
)
def test_places_that_conflict(config, kwargs, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config(config, kwargs)


def test_the_places_are_merged():
    assert load_config({"dtype": "fp16"}, {"strict": True}) == InferenceConfig(dtype="float16", strict=True)


def test_the_callers_dicts_are_not_modified():
    config = {"tp": {"tp_size": 1, "enabled": "auto"}, "moe": False, "dtype": "half", "quant": {"enabled": False}}
    kwargs = {"max_tokens": 9, "ckpt_config": {"base_dir": None}}
    before = copy.deepcopy((config, kwargs))
    load_config(config, kwargs)
    with pytest.raises(ConfigError):
        load_config(config, {**kwargs, "strict": 1})
    assert (config, kwargs) == before


# --- deprecated ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "word"), [({"mp_size": 1}, "mp_size"), ({"replace_method": "auto"}, "replace_method")]
)
def test_deprecated_names_work_and_say_so(config, word):
    with pytest.warns(DeprecationWarning, match=f"{word} is deprecated; use"):
        assert load_config(config) == InferenceConfig()


def test_mp_size_may_agree_with_tp_size():
    with pytest.warns(DeprecationWarning, match="mp_size"):
        load_config({"mp_size": 1, "tp": {"tp_size": 1}})


def test_nothing_else_warns(recwarn):
    load_config({"kernel_inject": True, "tp": {"tp_size": 1}, "max_tokens": 5})
    assert not recwarn.list


# --- files --------------------------------------------------------------------------------------------------------


def test_a_file_as_str_and_as_path(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"dtype": "fp16", "tp": {"tp_size": 1}}', encoding="utf-8")
    assert load_config(str(path)) == load_config(path) == InferenceConfig(dtype="float16")
    assert load_config(path, {"strict": True}) == InferenceConfig(dtype="float16", strict=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"{'dtype': 'fp16'}", "not JSON"),
        (b'{"dtype": "fp16",}', "not JSON"),
        (b"[]", r"holds \[\]; use a JSON object"),
        (b'"fp16"', "holds 'fp16'; use a JSON object"),
        (b"null", "holds None; use a JSON object"),
        (b"3", "holds 3; use a JSON object"),
        (b'{"strict": true, "strict": false}', "'strict' is written twice"),
        (b'{"tp": {"tp_size": 1, "tp_size": 1}}', "'tp_size' is written twice"),
        (b'{"max_tokens": NaN}', "NaN is no JSON value"),
        (b'{"max_tokens": -Infinity}', "-Infinity is no JSON value"),
        (b'{"dtype": "\xff"}', "not UTF-8 at byte 11"),
        ('{"dtype": "fp16"}'.encode("utf-16"), "not UTF-8"),
        (b'\xef\xbb\xbf{"dtype": "fp16"}', "not JSON: .*BOM"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b" " * ((1 << 20) + 1), "more than 1048576 bytes"),
        (b"\x00", "not JSON"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_malformed_files(tmp_path, content, words):
    path = tmp_path / "ds_config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"ds_config\.json'.*{words}"):
        load_config(path)


def test_a_fault_in_a_file_has_its_path(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"tp": {"tp_size": 2}}')
    with pytest.raises(ConfigError, match=r"tensor_parallel\.tp_size: 2"):
        load_config(path)


@pytest.mark.parametrize("path", ["nope.json", "", "no\0file", '{"dtype": "fp16"}', "."])
def test_a_file_that_is_not_there(path):
    with pytest.raises(ConfigError, match="no such file; use the path of a JSON file, or a dict"):
        load_config(path)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text("{}")

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match=r"config\.json': cannot be read: Permission denied"):
        load_config(path)


@pytest.mark.parametrize(
    "config", [3, True, [("dtype", "fp16")], b"config.json", {"dtype"}, object(), InferenceConfig()]
)
def test_a_config_of_another_type(config):
    with pytest.raises(ConfigError, match=r"config: .* is a \w+; use a dict, the path of a JSON file, or None"):
        load_config(config)


# --- the class itself ---------------------------------------------------------------------------------------------


def test_the_constructor_checks_too():
    with pytest.raises(ConfigError, match="strict: 3 is no bool"):
        InferenceConfig(strict=3)
    with pytest.raises(ConfigError, match="min_out_tokens: 9 is more than max_out_tokens: 8"):
        InferenceConfig(min_out_tokens=9, max_out_tokens=8)
    assert InferenceConfig(dtype="half").dtype == "float16"


def test_it_is_frozen():
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        InferenceConfig().strict = True


def test_the_error_is_one_that_callers_catch():
    assert issubclass(ConfigError, DsiError)
    assert issubclass(ConfigError, ValueError)


def test_an_error_is_quick():
    started = time.perf_counter()
    with pytest.raises(ConfigError):
        load_config({f"option_{i}": i for i in range(20)})
    # 50 ms is the bar; a shared machine gets ten times that
    assert time.perf_counter() - started < 0.5


# --- fuzz ---------------------------------------------------------------------------------------------------------

NAMES = sorted(
    {spelled for attr in attrs.fields(_Request) for spelled in (attr.name, *attr.metadata["aliases"])}
    | {"tp_size", "enabled", "weight", "num_experts", "base_dir", "tp_group", "kernel", "x"}
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["auto", "fp16", "half", "int8", "host", "a:b", 1, 0, 64, True, False]),
)
KEYS = st.one_of(st.sampled_from(NAMES), st.text(max_size=6))
JSON = st.recursive(
    LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)), max_leaves=8
)
CONFIGS = st.dictionaries(KEYS, JSON, max_size=6)


def _load(*given):
    """What comes out, be it a config or its one permitted error; anything else is raised."""
    try:
        return load_config(*given)
    except ConfigError as error:
        return error


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=CONFIGS, kwargs=CONFIGS)
@example(config={"tp": {"tp": {"tp": {}}}}, kwargs={"tp": {"tensor_parallel": "auto"}})
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_anything_loads_or_is_a_config_error(config, kwargs):
    before = repr((config, kwargs))
    loaded = _load(config, kwargs)
    if isinstance(loaded, ConfigError):
        assert loaded.faults
        assert not any("\n" in fault for fault in loaded.faults)
    else:
        assert load_config(attrs.asdict(loaded, recurse=False)) == loaded
    # as text, because NaN differs from itself
    assert repr((config, kwargs)) == before


@settings(max_examples=200, deadline=None)
@given(content=st.one_of(st.binary(max_size=40), CONFIGS.map(lambda value: json.dumps(value).encode())))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_any_file_loads_or_is_a_config_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "config.json"
    path.write_bytes(content)
    loaded = _load(path)
    assert isinstance(loaded, InferenceConfig) or loaded.faults


def test_a_mapping_that_contains_itself():
    config: dict = {"strict": True}
    config["tp"] = config
    with pytest.raises(ConfigError, match=r"tensor_parallel\.strict"):
        load_config(config)
    assert isinstance(config["tp"], Mapping)
