"""Which modules normalize, and how: found by what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from dsi.fit import class_name
from dsi.policy import Norm

_PROBE = 0.05
LAYER_NORM = "torch.nn.modules.normalization:LayerNorm"


@attrs.frozen(kw_only=True)
class NormKind:
    """What a norm computes; see `dsi.policy.Norm`."""

    kind: Any
    eps: str
    cls: str
    offset: float

    def slot(self, path: str) -> Norm:
        """A slot for a norm of this kind."""
        return Norm(path, kind=self.kind, eps=self.eps, cls=self.cls, offset=self.offset)


def looks_like_norm(module: nn.Module) -> bool:
    """Whether all that a module holds are one or two vectors of one length."""
    held = [p for p in module._parameters.values() if p is not None]
    plain = bool(held) and not list(module.children()) and all(p.dim() == 1 for p in held)
    return plain and len({p.shape for p in held}) == 1 and isinstance(getattr(module, "weight", None), Tensor)


def read_norm(module: Any) -> NormKind | None:
    """What a norm computes, by trying its epsilons; None where it is no norm that dsi knows. Leaves it as it was."""
    if not looks_like_norm(module):
        return None
    for eps in [name for name, value in vars(module).items() if isinstance(value, float) and 0 < value < 1]:
        before = getattr(module, eps)
        setattr(module, eps, _PROBE)
        try:
            found = _kind(module)
        finally:
            setattr(module, eps, before)
        if found is not None:
            kind, offset = found
            return NormKind(kind=kind, eps=eps, cls=class_name(module), offset=offset)
    return None


@torch.no_grad()
def _kind(module: Any) -> tuple[str, float] | None:
    weight = module.weight.detach().float()
    generator = torch.Generator().manual_seed(0)
    # small enough for an epsilon of 0.05 to be felt, off centre for a mean to be
    x = 0.3 * torch.randn(2, 3, weight.shape[0], generator=generator) + 0.2
    try:
        found = module(x)
    # whatever a module raises that is no norm
    except Exception:  # noqa: BLE001
        return None
    bias = module._parameters.get("bias")
    layer = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, _PROBE)
    if class_name(module) == LAYER_NORM:
        return ("layer", 0.0) if _near(found, layer) else None
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _PROBE)
    return next((("rms", one) for one in (0.0, 1.0) if bias is None and _near(found, normed * (weight + one))), None)


def _near(found: Any, wanted: Tensor) -> bool:
    return isinstance(found, Tensor) and found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-5)


def epsilons(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every norm of a model with the name of its epsilon's attribute."""
    for module in model.modules():
        kind = read_norm(module)
        if kind is not None:
            yield module, kind.eps
