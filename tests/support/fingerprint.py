"""What a model is, down to its bits and object identities, in a form that tells where two states differ.

    before = fingerprint(model)
    ...
    assert difference(before, fingerprint(model)) == []

Keep the model alive between the two: objects are told apart by their ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

_EVERY_MODULE = vars(nn.Module()).keys()


def fingerprint(model: nn.Module, *, identity: bool = True) -> dict[str, str]:
    """Everything about `model` that a caller could notice, each under its own key.

    Args:
        model: any module.
        identity: tell objects apart too. Then a copy differs from its original, and a module put back must be the very
            one that was there; two states of one model are only comparable while it is alive.

    Returns:
        One entry each for the value, the layout and the identity of every parameter and buffer; for the class, the
        children, the hooks, the attributes and the training flag of every module; and for the configs.
    """
    found = dict(_tensors(model, identity=identity))
    for name, module in model.named_modules(remove_duplicate=False):
        found.update(_module(name or "<root>", module, identity=identity))
    found.update(_configs(model))
    return found


def difference(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """One line for each entry in which the two fingerprints differ, in the order of their keys."""
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _tensors(model: nn.Module, *, identity: bool) -> Iterator[tuple[str, str]]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    for name, tensor in named:
        first.setdefault(id(tensor), name)
        yield f"value {name}", _digest(tensor)
        yield f"layout {name}", _layout(tensor)
        yield f"tie {name}", first[id(tensor)]
        if identity:
            yield f"object {name}", f"{id(tensor):#x}"
    # the order in which an optimizer or a checkpoint would see them
    yield "order of tensors", _sha(" ".join(name for name, _ in named).encode())


def _digest(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "meta"
    # oneDNN's blocked weights have no storage to read
    dense = tensor.detach().to_dense() if tensor.is_mkldnn else tensor.detach()
    plain = dense.cpu().contiguous().reshape(-1)
    return _sha(plain.view(torch.uint8).numpy().tobytes())


def _layout(tensor: Tensor) -> str:
    return " ".join(
        [
            type(tensor).__name__,
            str(tensor.dtype),
            f"shape={tuple(tensor.shape)}",
            f"stride={None if tensor.is_mkldnn else tensor.stride()}",
            f"device={tensor.device}",
            f"requires_grad={tensor.requires_grad}",
        ]
    )


def _module(name: str, module: nn.Module, *, identity: bool) -> Iterator[tuple[str, str]]:
    cls = type(module)
    yield f"class {name}", f"{cls.__module__}:{cls.__qualname__}"
    yield f"children {name}", ", ".join(module._modules)
    yield f"hooks {name}", ", ".join(f"{key}={len(getattr(module, key))}" for key in _HOOKS if hasattr(module, key))
    # an override such as `module.forward = ...` shows as a key
    yield f"attributes {name}", ", ".join(sorted(vars(module).keys() - _EVERY_MODULE))
    yield f"training {name}", str(module.training)
    if identity:
        yield f"object <module> {name}", f"{id(module):#x}"


def _configs(model: nn.Module) -> Iterator[tuple[str, str]]:
    for attribute in ("config", "generation_config"):
        config = getattr(model, attribute, None)
        if config is None:
            continue
        settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        for key, value in settings.items():
            yield f"{attribute}.{key}", _plain(value)
        yield f"{attribute}._attn_implementation", str(getattr(config, "_attn_implementation", None))


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
