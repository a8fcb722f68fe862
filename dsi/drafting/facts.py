"""Where a layer's numbers can be read: the attributes of config and layer that hold the value measured.

An attribute counts where it agrees in every small model at hand, each of other sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
from torch import nn

from dsi.containers.activations import KIND_OF_NAME
from dsi.drafting.anatomy import Anatomy
from dsi.errors import UnsupportedModelError
from dsi.policy import Attr, Config, Const, Fact, Inverse

Value = bool | int | float | str | None


@attrs.frozen(kw_only=True, eq=False)
class Sample:
    """One layer of a small model that was measured.

    Args:
        layer: the layer.
        index: its place in its stack.
        config: that it stands under.
        anatomy: what it is made of.
    """

    layer: nn.Module
    index: int
    config: Any
    anatomy: Anatomy


def sources(sample: Sample) -> Iterator[Config | Attr]:
    """Every plain value that a policy could read: of the layer and its modules first, then of the config."""
    for path, module in sample.layer.named_modules():
        for name, value in vars(module).items():
            if not name.startswith("_") and _is_plain(value) and name != "training":
                yield Attr(f"{path}.{name}" if path else name)
    # names that stand for another attribute are the ones that people know
    for name in (*vars(sample.config), *getattr(type(sample.config), "attribute_map", {})):
        if not name.startswith("_") and _is_plain(getattr(sample.config, name, _ABSENT)):
            yield Config(name)


_ABSENT = object()


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def read(source: Fact, sample: Sample) -> Value:
    """The value of a fact for a layer.

    Raises:
        AttributeError: there is none.
    """
    if isinstance(source, Inverse):
        return 1.0 / float(read(source.of, sample))  # type: ignore[arg-type]
    if isinstance(source, Const):
        constant: Value = source.value
        return constant
    found: Any = sample.config if isinstance(source, Config) else sample.layer
    for name in (source.name if isinstance(source, Config) else source.path).split("."):
        found = getattr(found, name)
    value: Value = found
    return value


def holding(samples: Sequence[Sample], measured: Callable[[Sample], Value]) -> list[Config | Attr]:
    """The sources that hold the measured value in every sample."""
    return [one for one in sources(samples[0]) if all(_holds(one, sample, measured(sample)) for sample in samples)]


def _holds(source: Fact, sample: Sample, wanted: Value) -> bool:
    try:
        found = read(source, sample)
    except (AttributeError, TypeError, ZeroDivisionError):
        return False
    if isinstance(wanted, float) and isinstance(found, float):
        return math.isclose(found, wanted, rel_tol=1e-6)
    return found == wanted and isinstance(found, bool) == isinstance(wanted, bool)


def one_source(samples: Sequence[Sample], fact: str, measured: Callable[[Sample], Value], like: str = "") -> Fact:
    """The best source of a fact.

    Args:
        samples: measured layers.
        fact: for the message.
        measured: the value that each must give.
        like: a part of a name that speaks for a source.

    Raises:
        UnsupportedModelError: nothing holds the value in all samples.
    """
    found = holding(samples, measured)
    if not found:
        values = ", ".join(str(measured(sample)) for sample in samples)
        raise UnsupportedModelError(f"no attribute of config or layer holds the fact {fact!r}, measured as {values}")
    return min(found, key=lambda one: _rank(one, like))


def _rank(source: Fact, like: str) -> tuple[bool, bool, int]:
    """What is read of the layer comes first: it is what the layer itself computes with."""
    text = source.path if isinstance(source, Attr) else getattr(source, "name", "")
    return like not in text, isinstance(source, Config), len(text)


def scales(samples: Sequence[Sample]) -> list[Fact]:
    """Where the factor of q.k could be read, the likeliest first."""
    usual = holding(samples, lambda one: one.anatomy.count.head_dim**-0.5)
    divisors = holding(samples, lambda one: one.anatomy.count.head_dim**0.5)
    floats = [s for s in sources(samples[0]) if _is_factor(s, samples)]
    attention = samples[0].anatomy.out.rpartition(".")[0]
    near = [s for s in floats if isinstance(s, Attr) and s.path.startswith(attention)]
    found: list[Fact] = [*_near_first(usual), *(Inverse(one) for one in _near_first(divisors)), *near]
    found += [Inverse(one) for one in near]
    return list(dict.fromkeys(found))


def _near_first(found: list[Config | Attr]) -> list[Config | Attr]:
    return sorted(found, key=lambda one: (isinstance(one, Config), "scal" not in str(one), -len(str(one))))


def _is_factor(source: Fact, samples: Sequence[Sample]) -> bool:
    try:
        values = [read(source, sample) for sample in samples]
    except AttributeError:
        return False
    return all(isinstance(value, float) and value > 0 for value in values)


def caps(samples: Sequence[Sample]) -> list[Fact]:
    """Where a cap of the scores could be read."""
    attention = samples[0].anatomy.out.rpartition(".")[0]
    found = [s for s in sources(samples[0]) if _is_factor(s, samples)]
    near = [s for s in found if isinstance(s, Attr) and s.path.startswith(attention)]
    return [*near, *(s for s in found if isinstance(s, Config))]


def activations(sample: Sample) -> list[Config]:
    """The config attributes that name an activation."""
    names = [s for s in sources(sample) if isinstance(s, Config)]
    wanted = sample.anatomy.activation
    found = [s for s in names if KIND_OF_NAME.get(str(read(s, sample)))]
    return [s for s in found if not wanted or KIND_OF_NAME[str(read(s, sample))] in wanted]


CANONICAL = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}
"""Kind -> the config name to write where no config names it."""
