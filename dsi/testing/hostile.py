"""Weights at which every parameter matters.

A freshly initialised model forgives almost everything: biases are 0, norms are 1, every epsilon is the same and far too
small to show. Here matrices keep the scale of what they multiply, every vector is off its neutral value, and each norm
has an epsilon of its own that is felt.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

EPSILON = 0.03
"""The first norm's epsilon; the others are multiples."""


def make_hostile_(model: nn.Module, *, seed: int, norms: Iterable[tuple[nn.Module, str]] = ()) -> None:
    """Fill every parameter with values at which it matters; a tied one is filled once.

    Args:
        model: changed in place.
        seed: of the values.
        norms: (module, name of its epsilon's attribute) of every norm that shall have its own.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    scales = _scales(model)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if parameter.ndim < 2:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(scales[id(parameter)] * noise)
    for index, (norm, attribute) in enumerate(norms):
        if isinstance(getattr(norm, attribute, None), float):
            setattr(norm, attribute, EPSILON * (index + 1))


def _scales(model: nn.Module) -> dict[int, float]:
    """Parameter id -> the standard deviation that keeps the scale of what it multiplies."""
    scales = {id(p): _fan_in(p) ** -0.5 for p in model.parameters() if p.ndim >= 2}
    for module in model.modules():
        if isinstance(module, Conv1D):
            # its weight is [in, out]
            scales[id(module.weight)] = module.weight.shape[0] ** -0.5
        elif isinstance(module, nn.Embedding):
            scales[id(module.weight)] = 0.5
    return scales


def _fan_in(parameter: nn.Parameter) -> int:
    # of three dimensions are the stacked weights of experts, [experts, out, in]
    return parameter.shape[-1] if parameter.ndim == 3 else max(parameter[0].numel(), 1)
