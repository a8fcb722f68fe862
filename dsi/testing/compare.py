"""How far apart two outputs are."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dsi.testing.report import Failed, number


def tensors(output: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every floating tensor of an output, nested ones and the contents of caches included."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield name, output
        return
    for key, item in _parts(output, name):
        yield from tensors(item, key)


def _parts(output: Any, name: str) -> Iterator[tuple[str, Any]]:
    if hasattr(output, "layers") and hasattr(output, "update"):
        for index, layer in enumerate(output.layers):
            yield from ((f"{name}[{index}].keys", layer.keys), (f"{name}[{index}].values", layer.values))
    elif isinstance(output, Mapping):
        yield from ((str(key), item) for key, item in output.items())
    elif isinstance(output, tuple | list):
        yield from ((f"{name}[{index}]", item) for index, item in enumerate(output))


def distance(found: Any, wanted: Any) -> tuple[float, str]:
    """(the largest difference as a share of the largest value, where it is), the worst of all tensors.

    The share is infinite, and the place says why, where the outputs are not of one form.
    """
    ours, theirs = list(tensors(found)), list(tensors(wanted))
    if [name for name, _ in ours] != [name for name, _ in theirs]:
        return math.inf, f"outputs {_names(ours)} instead of {_names(theirs)}"
    worst, where = 0.0, ""
    for (name, one), (_, other) in zip(ours, theirs, strict=True):
        share, place = _share(name, one.detach(), other.detach())
        if share > worst or not where:
            worst, where = share, place
    return worst, where


def _names(pairs: list[tuple[str, Tensor]]) -> str:
    return ", ".join(name for name, _ in pairs) or "nothing"


def _share(name: str, one: Tensor, other: Tensor) -> tuple[float, str]:
    if one.shape != other.shape:
        return math.inf, f"{name} is {tuple(one.shape)} instead of {tuple(other.shape)}"
    if one.dtype != other.dtype:
        return math.inf, f"{name} is {one.dtype} instead of {other.dtype}"
    if not one.numel():
        return 0.0, name
    finite = torch.isfinite(other)
    if not bool((torch.isfinite(one) == finite).all()):
        return math.inf, f"{name} has NaN or infinity where stock has none"
    one, other = one[finite], other[finite]
    if not one.numel():
        return 0.0, name
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-30)), name


def check_same(found: Any, wanted: Any, allowed: float, *, what: str, mend: str) -> float:
    """The distance of two outputs of one class.

    Raises:
        Failed: it is more than `allowed`, or the outputs are of different classes.
    """
    if type(found) is not type(wanted):
        raise Failed(what, measured=type(found).__name__, allowed=type(wanted).__name__, mend=mend)
    worst, where = distance(found, wanted)
    if not worst <= allowed:
        raise Failed(what, measured=f"{number(worst)} at {where}", allowed=allowed, mend=mend)
    return worst


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, in shape and dtype too."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    plain = [t.detach().to_dense() if t.is_mkldnn else t.detach() for t in (one, other)]
    return torch.equal(*(t.cpu().contiguous().view(-1).view(torch.uint8) for t in plain))


@contextlib.contextmanager
def whole_fp32() -> Iterator[None]:
    """Convolutions on CUDA in fp32 as on a CPU: by torch's default they round their inputs to TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@torch.no_grad()
def forward(model: Any, inputs: Mapping[str, Any], **more: Any) -> Any:
    """One forward without gradients, of inputs that it may not change."""
    return model(**copy.deepcopy(dict(inputs)), **more)
