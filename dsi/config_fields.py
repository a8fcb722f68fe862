"""The rules of the configuration: what each kind of value may be, in one place.

A `Rule` turns what a user wrote into the one form that the rest of dsi reads, or says why it cannot. `option` and
`group` hang a rule, the aliases and a nested class on an attrs field; `dsi.config` walks those fields. Every name that
DeepSpeed-Inference knows has a field: it works, or its rule refuses it and says what to use instead. `pair_faults`
finds options that are right alone and wrong together.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from dsi.errors import ConfigError
from dsi.policy import Policy

MAX_TOKENS = 2**31 - 1

DTYPES: dict[str, tuple[str, ...]] = {
    "float16": ("fp16", "half", "torch.float16"),
    "float32": ("fp32", "float", "torch.float32"),
    "bfloat16": ("bf16", "bfloat", "torch.bfloat16"),
}
_DTYPE_OF = {spelled: name for name, others in DTYPES.items() for spelled in (name, *others)}

_FULL_NAME = re.compile(r"[^\s:]+:[^\s:]+")

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist, _REPR.maxstring, _REPR.maxother = 3, 4, 4, 80, 80


def short(value: Any) -> str:
    """`value` as one short piece of text, whatever it is: it goes into error messages."""
    try:
        return " ".join(_REPR.repr(value).split())
    except (ValueError, TypeError, AttributeError, RecursionError):
        # an int of 5000 digits has no repr, and a class may only look like a builtin
        return f"<{type(value).__name__}>"


def _is_dtype(value: Any) -> bool:
    # by name, because torch is not imported for a configuration
    return f"{type(value).__module__}.{type(value).__qualname__}" == "torch.dtype"


@attrs.frozen
class Rule:
    """What one option may be.

    Args:
        convert: (value) -> the canonical form; raises ValueError with words that follow the value, e.g. "is no bool".
            Canonical forms convert to themselves.
        allowed: what would do, in words that follow "use".
    """

    convert: Callable[[Any], Any]
    allowed: str

    def apply(self, path: str, value: Any) -> Any:
        """The canonical form of `value`; the ValueError of a wrong one is a whole fault line."""
        try:
            return self.convert(value)
        except ValueError as error:
            raise ValueError(f"{path}: {short(value)} {error}; use {self.allowed}") from None


def only(value: Any, why: str, *, also: tuple[Any, ...] = ()) -> Rule:
    """A rule for an option that has one working value. `also` are other ways to write it; all become `value`."""
    accepted = (value, *also)

    def convert(given: Any) -> Any:
        # True == 1 in Python, and an array has no truth: the type is compared first
        if any(type(given) is type(one) and given == one for one in accepted):
            return value
        raise ValueError(f"is not supported: {why}")

    return Rule(convert, repr(value))


def never(why: str) -> Rule:
    """A rule for an option that cannot be given at all."""

    def convert(_given: Any) -> Any:
        raise ValueError(f"is not supported: {why}")

    return Rule(convert, "the default by leaving the option out")


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError("is no bool")


def _boolean_or_none(value: Any) -> bool | None:
    return None if value is None else _boolean(value)


def _tokens(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_TOKENS:
        return int(value)
    raise ValueError("is no number of tokens")


def _tokens_or_none(value: Any) -> int | None:
    return None if value is None else _tokens(value)


def _dtype(value: Any) -> str | None:
    if value is None:
        return None
    spelled = str(value) if isinstance(value, str) or _is_dtype(value) else ""
    if spelled in ("int8", "torch.int8"):
        raise ValueError("is not supported: quantizers are not in this version")
    if spelled not in _DTYPE_OF:
        raise ValueError("is no dtype that dsi computes in")
    return _DTYPE_OF[spelled]


def _policy(value: Any) -> Policy | str | None:
    if value is None or isinstance(value, Policy):
        return value
    if isinstance(value, Mapping):
        raise ValueError(
            "is not supported: DeepSpeed's {LayerClass: outputs} lists the row-split outputs of tensor parallelism, "
            "which needs tp_size > 1; kernel injection needs a policy"
        )
    if isinstance(value, str) and _FULL_NAME.fullmatch(value):
        return value
    raise ValueError("names no policy")


def _nothing(value: Any) -> None:
    if value is None or (isinstance(value, str | Mapping) and not value):
        return
    raise ValueError("is not supported: dsi takes a model that already has its weights")


def _host(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value == "host"):
        return value
    raise ValueError("is no place for the original weights")


BOOLEAN = Rule(_boolean, "True or False")
BOOLEAN_OR_NONE = Rule(_boolean_or_none, "True, False or None")
TOKENS = Rule(_tokens, f"an int from 1 to {MAX_TOKENS}")
TOKENS_OR_NONE = Rule(_tokens_or_none, f"an int from 1 to {MAX_TOKENS}, or None for the model's own maximum")
DTYPE = Rule(
    _dtype,
    ", ".join(f"{name} ({', '.join(others)})" for name, others in DTYPES.items()) + ", or None to keep the model's",
)
POLICY = Rule(_policy, 'a dsi.policy.Policy, "plugin:name", or None to let the registry choose')
NOTHING = Rule(_nothing, "None, and load the model with from_pretrained first")
KEEP = Rule(_host, '"host" or None')
NO_ZERO = only({}, "ZeRO is for training", also=(None,))


def option(rule: Rule, *aliases: str, default: Any = None) -> Any:
    """An attrs field that holds one value under `rule`, spelled by its own name or by an alias."""

    def convert(value: Any, field: attrs.Attribute[Any]) -> Any:
        # a rule that refuses everything must not refuse its own default
        if value is default:
            return value
        try:
            return rule.apply(field.name, value)
        except ValueError as error:
            raise ConfigError([str(error)]) from None

    return attrs.field(
        default=default,
        converter=attrs.Converter(convert, takes_field=True),
        metadata={"rule": rule, "aliases": aliases},
    )


def group(cls: type, *aliases: str, flag: bool = False) -> Any:
    """An attrs field that holds a nested group of options.

    Args:
        cls: the attrs class of the group.
        aliases: other names of the group.
        flag: a bare bool stands for {"enabled": bool}.
    """
    return attrs.field(factory=cls, metadata={"group": cls, "aliases": aliases, "flag": flag})


_TP = "tensor parallelism is not in this version"
_MOE = "mixture-of-experts layers are not in this version"
_QUANT = "quantizers are not in this version"


@attrs.frozen(kw_only=True)
class TensorParallel:
    """The group `tensor_parallel`."""

    enabled: bool = option(BOOLEAN, default=True)
    tp_size: int = option(only(1, _TP), default=1)
    tp_grain_size: int = option(only(64, _TP, also=(None,)), default=64)
    mpu: None = option(only(None, _TP))
    tp_group: None = option(only(None, _TP))


@attrs.frozen(kw_only=True)
class Moe:
    """The group `moe`."""

    enabled: bool = option(only(False, _MOE), default=False)
    ep_size: int = option(only(1, _MOE), default=1)
    moe_experts: None = option(only(None, _MOE), "num_experts")
    type: None = option(only(None, _MOE))
    ep_mp_group: None = option(only(None, _MOE))
    ep_group: None = option(only(None, _MOE), "expert_group")


@attrs.frozen(kw_only=True)
class Quant:
    """The group `quant`."""

    enabled: bool = option(only(False, _QUANT), default=False)
    activation: None = option(only(None, _QUANT))
    weight: None = option(only(None, _QUANT))
    qkv: None = option(only(None, _QUANT))


@attrs.frozen(kw_only=True)
class CheckpointConfig:
    """The group `checkpoint_config`."""

    checkpoint_dir: None = option(NOTHING)
    save_mp_checkpoint_path: None = option(NOTHING)
    base_dir: None = option(NOTHING)


Given = Mapping[str, Any]
"""Options under full names, not yet structured."""

_Pair = Callable[[Given], str | None]


def _tokens_cross(given: Given) -> str | None:
    least, most = given.get("min_out_tokens", 1), given.get("max_out_tokens")
    if type(least) is int and type(most) is int and 1 <= most < least:
        return f"min_out_tokens: {short(least)} is more than max_out_tokens: {short(most)}; use {short(most)} or less"
    return None


def _sizes_cross(given: Given) -> str | None:
    old, new = given.get("mp_size"), given.get("tensor_parallel", {}).get("tp_size")
    if type(old) is int and type(new) is int and old != new:
        return f"mp_size: {short(old)} differs from tensor_parallel.tp_size: {short(new)}; use the latter alone"
    return None


def _idle(name: str, why: str, when: Callable[[Any], bool]) -> _Pair:
    """The fault of an option that means something only while layers are replaced."""

    def fault(given: Given) -> str | None:
        value = given.get(name)
        if given.get("replace_with_kernel_inject") is not False or not when(value):
            return None
        return (
            f"{name}: {short(value)} does not go with replace_with_kernel_inject: False, {why}; "
            f"use replace_with_kernel_inject=True or leave {name} out"
        )

    return fault


_PAIRS: tuple[_Pair, ...] = (
    _tokens_cross,
    _sizes_cross,
    _idle("injection_policy", "which replaces no layer", lambda value: value is not None),
    _idle("use_triton", "which runs no kernel", lambda value: value is True),
    _idle("strict", "which leaves every layer as it was", lambda value: value is True),
)


def pair_faults(given: Given) -> list[str]:
    """A line for each two options of `given`, under full names, that contradict each other."""
    return [fault for pair in _PAIRS if (fault := pair(given)) is not None]
