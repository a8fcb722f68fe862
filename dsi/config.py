"""The configuration: `load_config` gives an `InferenceConfig`, or one ConfigError that lists every fault.

It takes every name and alias of DeepSpeed-Inference's config. Each works or is refused by name with what to use
instead; none is accepted and then ignored. The value "auto" means "not given", for every option but `replace_method`.

    read       a mapping, a JSON file, keyword arguments
    spell      aliases become names, "auto" goes, two spellings or two places of one option must agree
    structure  cattrs, by the rules of `dsi.config_fields`
    pair       options that are right alone and wrong together
"""

# `option` and `group` are attrs.field with metadata, which RUF009 cannot know
# ruff: noqa: RUF009

from __future__ import annotations

import difflib
import functools
import json
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
import cattrs
from cattrs.gen import make_dict_structure_fn, override

from dsi import config_fields as fields
from dsi.config_fields import group, only, option, short
from dsi.errors import ConfigError
from dsi.policy import Policy

MAX_FILE_BYTES = 1 << 20


@attrs.frozen(kw_only=True)
class InferenceConfig:
    """What the rest of dsi reads. Valid once built.

    Args:
        dtype: "float32", "float16" or "bfloat16"; None keeps the model's. Written as a torch.dtype or any of
            DeepSpeed's strings.
        replace_with_kernel_inject: replace layers by fused ones. True here and False in DeepSpeed, because replacing
            layers is what dsi is called for; False only casts.
        injection_policy: a `dsi.policy.Policy`, "plugin:name", or None to let the registry choose.
        max_out_tokens: the context, prompt and new tokens together; None is the model's own maximum.
        min_out_tokens: the least context that will do.
        use_triton: True or False; None is True on CUDA.
        enable_cuda_graph: None lets forwards and the steps of `generate` on CUDA be graphs where they can and it pays;
            True makes every forward one, or raises and says why it cannot be; False has none.
        strict: whatever stays as it was is an error.
        keep_original: "host" keeps a host copy of what a cast loses, so that `restore()` works.

    Raises:
        ConfigError: an option is wrong, or two do not go together.
    """

    dtype: str | None = option(fields.DTYPE)
    replace_with_kernel_inject: bool = option(fields.BOOLEAN, "kernel_inject", default=True)
    injection_policy: Policy | str | None = option(fields.POLICY, "injection_dict", "policy")
    max_out_tokens: int | None = option(fields.TOKENS_OR_NONE, "max_tokens")
    min_out_tokens: int = option(fields.TOKENS, "min_tokens", default=1)
    use_triton: bool | None = option(fields.BOOLEAN_OR_NONE)
    enable_cuda_graph: bool | None = option(fields.BOOLEAN_OR_NONE)
    strict: bool = option(fields.BOOLEAN, default=False)
    keep_original: str | None = option(fields.KEEP)

    def __attrs_post_init__(self) -> None:
        if faults := fields.pair_faults(attrs.asdict(self, recurse=False)):
            raise ConfigError(faults)


@attrs.frozen(kw_only=True)
class _Request(InferenceConfig):
    """Everything that may be written: dsi's options and all the others that DeepSpeed has."""

    tensor_parallel: fields.TensorParallel = group(fields.TensorParallel, "tp")
    mp_size: int = option(only(1, "tensor parallelism is not in this version"), default=1)
    mpu: None = option(only(None, "tensor parallelism is not in this version"))
    injection_policy_tuple: None = option(only(None, "pass a dsi.policy.Policy as injection_policy"))
    replace_method: str = option(only("auto", "policies are always found by the registry"), default="auto")
    triton_autotune: bool = option(only(False, "launch configurations are shipped, not searched for"), default=False)
    zero: dict[str, Any] = option(fields.NO_ZERO, default=MappingProxyType({}))
    quant: fields.Quant = group(fields.Quant)
    moe: fields.Moe = group(fields.Moe, flag=True)
    ep_size: int = option(only(1, "mixture-of-experts layers are not in this version"), default=1)
    ep_group: None = option(only(None, "mixture-of-experts layers are not in this version"), "expert_group")
    ep_mp_group: None = option(only(None, "mixture-of-experts layers are not in this version"))
    moe_experts: None = option(only(None, "mixture-of-experts layers are not in this version"))
    moe_type: None = option(only(None, "mixture-of-experts layers are not in this version"))
    keep_module_on_host: bool = option(only(True, "dsi never moves a model; call model.to(device)"), default=True)
    checkpoint: None = option(fields.NOTHING)
    base_dir: None = option(fields.NOTHING)
    save_mp_checkpoint_path: None = option(fields.NOTHING)
    checkpoint_config: fields.CheckpointConfig = group(fields.CheckpointConfig, "ckpt_config")
    set_empty_params: bool = option(only(False, "containers always hold their weights"), default=False)
    training_mp_size: int = option(only(1, "checkpoints of a parallel training run are not read"), default=1)
    transposed_mode: bool = option(only(False, "the container chooses its own layout"), default=False)
    return_tuple: None = option(fields.never("a layer returns what the original layer returned"))
    triangular_masking: None = option(fields.never("whether a layer is causal is read from the model"), "tm")
    config: None = option(only(None, "the model's own config is used"), "args")

    def __attrs_post_init__(self) -> None:
        """Pairs are checked on what was given, before this is built."""


def load_config(
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> InferenceConfig:
    """The configuration that `config` and `kwargs` give together. Neither is modified.

    Args:
        config: a mapping, the path of a JSON file, or None.
        kwargs: the keyword arguments of the same call. An option in both places must mean the same in both.

    Raises:
        ConfigError: `faults` has every fault of both, each with its path, its value and what would do.

    >>> load_config({"kernel_inject": True}, {"dtype": "half"}).dtype
    'float16'
    """
    faults: list[str] = []
    first = _spell(_Request, _read(config), "", faults)
    second = _spell(_Request, kwargs, "", faults)
    given = _merge(first, second, faults)
    request = _structure(given, faults)
    faults += fields.pair_faults(given)
    if faults or request is None:
        raise ConfigError(faults)
    _warn_deprecated(given)
    return InferenceConfig(**{field.name: getattr(request, field.name) for field in attrs.fields(InferenceConfig)})


def default_inference_config() -> dict[str, Any]:
    """The default of every option that dsi reads; `load_config` of it gives the default configuration.

    >>> default_inference_config()["replace_with_kernel_inject"]
    True
    """
    return attrs.asdict(InferenceConfig(), recurse=False)


def _read(config: Any) -> Mapping[Any, Any]:
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return config
    if isinstance(config, str | os.PathLike):
        return _read_file(Path(os.fsdecode(config)))
    raise ConfigError(
        [f"config: {short(config)} is a {type(config).__name__}; use a dict, the path of a JSON file, or None"]
    )


def _read_file(path: Path) -> Mapping[str, Any]:
    where = repr(str(path))
    try:
        if not path.is_file():
            raise ConfigError([f"{where}: no such file; use the path of a JSON file, or a dict"])
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError([f"{where}: holds more than {MAX_FILE_BYTES} bytes; use the path of a configuration"])
        return _parse(where, path.read_bytes())
    except OSError as error:
        raise ConfigError([f"{where}: cannot be read: {error.strerror}"]) from None


def _parse(where: str, content: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ConfigError([f"{where}: not UTF-8 at byte {error.start}; save the file as UTF-8"]) from None
    except ValueError as error:
        raise ConfigError([f"{where}: not JSON: {error}"]) from None
    except RecursionError:
        raise ConfigError([f"{where}: nested too deeply"]) from None
    if not isinstance(value, dict):
        raise ConfigError([f"{where}: holds {short(value)}; use a JSON object, {{...}}"])
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"{', '.join(map(short, twice))} is written twice in one object")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _spellings(cls: type) -> dict[str, attrs.Attribute[Any]]:
    return {spelled: field for field in attrs.fields(cls) for spelled in (field.name, *field.metadata["aliases"])}


def _spell(cls: type, given: Mapping[Any, Any], path: str, faults: list[str]) -> dict[str, Any]:
    """`given` under full names, without "auto". Unknown names stay, for `_structure` to refuse."""
    spellings = _spellings(cls)
    result: dict[str, Any] = {}
    written: dict[str, str] = {}
    for key, value in given.items():
        field = spellings.get(key) if isinstance(key, str) else None
        if not isinstance(key, str):
            faults.append(f"{path}{short(key)}: the name of an option is a string, not {type(key).__name__}")
        elif field is None:
            result[key] = value
        elif not _is_auto(field, value) and (value := _enter(field, value, path, faults)) is not _DROPPED:
            where = (f"as {written.setdefault(field.name, key)}", f"as {key}")
            _join(field, result, field.name, value, path, where, faults)
    return result


_DROPPED = object()


def _is_auto(field: attrs.Attribute[Any], value: Any) -> bool:
    return isinstance(value, str) and value == "auto" and field.name != "replace_method"


def _enter(field: attrs.Attribute[Any], value: Any, path: str, faults: list[str]) -> Any:
    """The value to go on with: a nested group is spelled too, and what is no group is a fault and dropped."""
    cls = field.metadata.get("group")
    if cls is None:
        return value
    if value is None:
        return {}
    if isinstance(value, bool) and field.metadata["flag"]:
        return {"enabled": value}
    if isinstance(value, Mapping):
        return _spell(cls, value, f"{path}{field.name}.", faults)
    names = ", ".join(one.name for one in attrs.fields(cls))
    faults.append(f"{path}{field.name}: {short(value)} is no group of options; use a dict with any of {names}")
    return _DROPPED


def _join(
    field: attrs.Attribute[Any] | None,
    into: dict[str, Any],
    name: str,
    value: Any,
    path: str,
    where: tuple[str, str],
    faults: list[str],
) -> None:
    """Put `value` into `into`; one that is there already must mean the same. Groups are joined option by option."""
    there = into.setdefault(name, value)
    if field is not None and "group" in field.metadata:
        spellings = _spellings(field.metadata["group"])
        for inner, item in value.items():
            _join(spellings.get(inner), there, inner, item, f"{path}{name}.", where, faults)
    elif not _same(field, there, value):
        both = f"{short(there)} {where[0]} and {short(value)} {where[1]}"
        faults.append(f"{path}{name}: {both} are both given; use one of them")
        # the first value is checked where it stands, and this one nowhere else
        faults += [] if field is None else _faults(field, path, value)


def _same(field: attrs.Attribute[Any] | None, one: Any, other: Any) -> bool:
    if one is other:
        return True
    if field is None or _faults(field, "", one) or _faults(field, "", other):
        return short(one) == short(other)
    convert = field.metadata["rule"].convert
    return bool(convert(one) == convert(other))


def _faults(field: attrs.Attribute[Any], path: str, value: Any) -> list[str]:
    try:
        field.metadata["rule"].apply(field.name, value)
    except ValueError as error:
        return [f"{path}{error}"]
    return []


def _merge(first: dict[str, Any], second: dict[str, Any], faults: list[str]) -> dict[str, Any]:
    """Both, joined into `first`."""
    spellings = _spellings(_Request)
    for name, value in second.items():
        _join(spellings.get(name), first, name, value, "", ("in config", "in the keyword arguments"), faults)
    return first


def _structurer(field: attrs.Attribute[Any]) -> Callable[[Any, Any], Any]:
    return lambda value, _type: field.metadata["rule"].apply(field.name, value)


def _hook(cls: type, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    rules: dict[str, Any] = {
        field.name: override(struct_hook=_structurer(field)) for field in attrs.fields(cls) if "rule" in field.metadata
    }
    return make_dict_structure_fn(
        cls, converter, _cattrs_forbid_extra_keys=True, _cattrs_detailed_validation=True, **rules
    )


# made once: cattrs writes and compiles code for each class
@functools.cache
def _converter() -> cattrs.Converter:
    converter = cattrs.Converter()
    for cls in (fields.TensorParallel, fields.Quant, fields.Moe, fields.CheckpointConfig, _Request):
        converter.register_structure_hook(cls, _hook(cls, converter))
    return converter


def _structure(given: Mapping[str, Any], faults: list[str]) -> _Request | None:
    try:
        return _converter().structure(given, _Request)
    except cattrs.ClassValidationError as error:
        faults += _flatten(error, "", given)
        return None


def _flatten(error: cattrs.ClassValidationError, path: str, given: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    noted, others = error.group_exceptions()
    for inner, note in noted:
        if isinstance(inner, cattrs.ClassValidationError):
            lines += _flatten(inner, f"{path}{note.name}.", given[note.name])
        else:
            lines.append(f"{path}{inner}")
    for extra in others:
        if isinstance(extra, cattrs.ForbiddenExtraKeysError):
            lines += [_unknown(extra.cl, path, key, given[key]) for key in sorted(extra.extra_fields)]
    return lines


def _unknown(cls: type, path: str, key: str, value: Any) -> str:
    known = {spelled: spelled for spelled in _spellings(_Request)}
    for field in attrs.fields(_Request):
        if "group" in field.metadata:
            known |= {spelled: f"{field.name}.{spelled}" for spelled in _spellings(field.metadata["group"])}
    known |= {spelled: f"{path}{spelled}" for spelled in _spellings(cls)}
    close = _closest(key[:80], known)
    names = ", ".join(field.name for field in attrs.fields(InferenceConfig if cls is _Request else cls))
    shown = key if key.isidentifier() and len(key) <= 80 else short(key)
    advice = f"did you mean {known[close]}?" if close else f"use any of {names}"
    return f"{path}{shown}: unknown option, given {short(value)}; {advice}"


def _closest(key: str, known: Collection[str]) -> str:
    """The known name that `key` is a misspelling or an extension of ("torch_dtype"), or ""."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    inside = sorted((name for name in known if len(name) > 3 and name in key), key=len)
    far = difflib.get_close_matches(key, known, n=1)
    return next(iter([*close, *inside[-1:], *far]), "")


def _warn_deprecated(given: Mapping[str, Any]) -> None:
    for name, instead in (("mp_size", "tensor_parallel.tp_size"), ("replace_method", "nothing: it has no effect")):
        if name in given:
            # 4 is the caller of init_inference: this, load_config, init_inference
            warnings.warn(f"{name} is deprecated; use {instead}", DeprecationWarning, stacklevel=4)
