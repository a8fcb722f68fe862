"""Small models with one setting of the config changed: those whose outputs are other ones for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch import nn

from dsi.drafting.specimen import FIRST, Species, Specimen
from dsi.errors import UnsupportedModelError
from dsi.testing.compare import distance, forward


@attrs.frozen(kw_only=True, eq=False)
class Variant:
    """One setting, changed.

    Args:
        name: of the config's attribute.
        before, value: what it was and what it is.
        specimen: the model.
    """

    name: str
    before: Any
    value: Any
    specimen: Specimen


def variants(species: Species, first: Specimen, *, inside: str, owner: Callable[[nn.Module], Any]) -> Iterator[Variant]:
    """Every variant that can be built and that computes something else than the first model.

    Args:
        species: what to build of.
        first: the model with nothing changed.
        inside: the name of the inner config that the layers stand under, or "".
        owner: gives that config.
    """
    from transformers import PretrainedConfig

    config = owner(first.model)
    passed_over = {*vars(PretrainedConfig()), *FIRST, "use_sliding_window", "max_window_layers"}
    passed_over -= {"use_sliding_window"}
    for name, before in list(vars(config).items()):
        if name.startswith("_") or name in passed_over or name.endswith(("_token_id", "_token_ids")):
            continue
        for value in _others(before):
            found = _variant(species, first, name, value, inside)
            if found is not None:
                yield Variant(name=name, before=before, value=value, specimen=found)


def _others(value: Any) -> Iterator[Any]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value + 1
    elif isinstance(value, float):
        yield value * 0.5 + 0.01 if value <= 1 else 2.0


def _variant(species: Species, first: Specimen, name: str, value: Any, inside: str) -> Specimen | None:
    try:
        found = species.specimen(changes={name: value}, inside=inside)
    except UnsupportedModelError:
        return None
    inputs = first.reads.inputs(2, 9, "left")
    try:
        ours, theirs = forward(found.model, inputs), forward(first.model, inputs)
    # a setting under which stock itself does not run
    except Exception:  # noqa: BLE001
        return None
    return None if distance(_numbers(ours), _numbers(theirs))[0] < 1e-7 and _same_modules(found, first) else found


def _numbers(output: Any) -> dict[str, torch.Tensor]:
    return {k: v for k, v in copy.copy(output).items() if isinstance(v, torch.Tensor)}


def _same_modules(one: Specimen, other: Specimen) -> bool:
    return one.model.state_dict().keys() == other.model.state_dict().keys()
