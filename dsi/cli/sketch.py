"""What can be read off a layer class without running it: a `Sketch` for the policy to be written.

A tiny model of the architecture is built on the meta device. Which projection is which is not guessed here.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dsi.cli.package_template import FILL, Sketch
from dsi.errors import ConfigError
from dsi.policy import Block, Policy
from dsi.testing import tiny_config

# config attribute that holds the fact, in the order in which they are tried
_CONFIG_FACTS = {
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "num_attention_heads", "n_head", "n_heads"),
    "activation": ("hidden_act", "activation_function", "hidden_activation", "activation"),
}
# argument of the layer that is its cache, likewise
_CACHES = ("past_key_values", "past_key_value", "layer_past")
# attribute of a submodule, likewise
_ATTRIBUTE_FACTS = {
    "head_dim": ("head_dim", "head_size", "attention_head_size"),
    "scale": ("scaling", "scale"),
    "layer_idx": ("layer_idx", "layer_id"),
}


def sketch_of(layer: str) -> Sketch:
    """The sketch of the layer class "module:Class".

    Raises:
        ConfigError: there is no such class, or no model of its module can be built with it.
    """
    cls = _load(layer)
    config = tiny_config(Policy(name="x", blocks=[Block(layer=layer, container="x:X", slots={})]))
    model = _model_with(cls, config)
    path, one = next((path, module) for path, module in model.named_modules() if type(module) is cls)
    norms = [module for module in one.modules() if _is_norm(module)]
    lines = tuple(_lines(one))
    decodes = any(name in inspect.signature(cls.forward).parameters for name in _CACHES)
    return Sketch(
        container="DecoderLayer" if decodes else "EncoderLayer",
        family=cls.__module__,
        layer=cls.__qualname__,
        modules=lines,
        linears=len(lines) - len(norms),
        norm=_rms(norms[0]) if norms else (),
        call=_call(one, decodes=decodes),
        facts=tuple(_facts(one, config, decodes=decodes)),
        model=tuple(_causal_lm(model, path)),
        requires=_requires(),
    )


def _load(layer: str) -> type[nn.Module]:
    module, _, name = layer.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError([f"--layer: {layer!r} cannot be imported: {error}"]) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError([f"--layer: {layer!r} is no torch.nn.Module class"])
    return found


def _model_with(cls: type[nn.Module], config: Any) -> nn.Module:
    """A model of the layer's module that has such layers; a language model before others."""
    from transformers import PreTrainedModel

    module = importlib.import_module(cls.__module__)
    classes: list[Any] = [one for one in vars(module).values() if isinstance(one, type)]
    models = [one for one in classes if issubclass(one, PreTrainedModel) and one.config_class is type(config)]
    for one in sorted(models, key=lambda one: (not one.__name__.endswith("ForCausalLM"), one.__name__)):
        try:
            with torch.device("meta"):
                built: nn.Module = one(config)
        # the abstract base of the family cannot be built, and raises what it likes
        except Exception:  # noqa: BLE001
            continue
        if any(type(part) is cls for part in built.modules()):
            return built
    raise ConfigError([f"--layer: no model in {cls.__module__} has layers of the class {cls.__name__}"])


def _is_norm(module: nn.Module) -> bool:
    parameters = [p for p in module._parameters.values() if p is not None]
    return bool(parameters) and all(p.dim() == 1 for p in parameters)


def _rms(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """Arguments of `Norm` after the path; none for torch's LayerNorm."""
    if isinstance(module, nn.LayerNorm):
        return ()
    epsilons = [name for name, value in vars(module).items() if isinstance(value, float) and 0 < value < 1e-2]
    eps = epsilons[0] if epsilons else FILL
    return ("kind", '"rms"'), ("eps", f'"{eps}"'), ("cls", f'FAMILY + "{type(module).__qualname__}"')


def _lines(layer: nn.Module) -> Iterator[str]:
    for path, module in layer.named_modules():
        shapes = [list(p.shape) for p in module._parameters.values() if p is not None]
        if shapes:
            yield f"{path}: {type(module).__name__} {shapes[0]}{', with a bias' if len(shapes) > 1 else ''}"


def _call(layer: nn.Module, *, decodes: bool) -> str:
    parameters = inspect.signature(layer.forward).parameters
    arguments = [
        f'{role}="{name}"'
        for role, names, usual in (
            ("mask", ("attention_mask",), "attention_mask"),
            ("cache", _CACHES, "past_key_values"),
            ("rope", ("position_embeddings",), ""),
        )
        for name in names
        if name in parameters and name != usual
    ]
    return ", ".join(arguments if decodes else [*arguments, 'cache=""'])


def _facts(layer: nn.Module, config: Any, *, decodes: bool) -> Iterator[tuple[str, str]]:
    for fact, names in _CONFIG_FACTS.items():
        found = next((name for name in names if hasattr(config, name)), FILL)
        yield fact, f'Config("{found}")'
    for fact, names in _ATTRIBUTE_FACTS.items():
        if fact == "layer_idx" and not decodes:
            continue
        yield fact, f'Attr("{next(_attributes(layer, names), FILL)}")'
    yield "pre_norm", "Const(True)"
    yield "causal", f"Const({decodes})"


def _attributes(layer: nn.Module, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        for path, module in layer.named_modules():
            if isinstance(vars(module).get(name), int | float):
                yield f"{path}.{name}" if path else name


def _causal_lm(model: nn.Module, layer: str) -> Iterator[tuple[str, str]]:
    """Arguments of `CausalLM`; none where the model does not generate."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or not callable(getattr(model, "generate", None)):
        return
    paths = {id(module): path for path, module in model.named_modules()}
    layers = layer.rpartition(".")[0]
    around = layers.rpartition(".")[0]
    beside = dict(model.get_submodule(around).named_children())
    yield "model", f'FAMILY + "{type(model).__qualname__}"'
    yield "embed", f'"{paths[id(model.get_input_embeddings())]}"'  # type: ignore[operator]
    yield "layers", f'"{layers}"'
    for name, module in beside.items():
        if _is_norm(module):
            yield "norm", f'Norm("{around}.{name}"{", **RMS" if _rms(module) else ""})'
        elif hasattr(module, "inv_freq"):
            yield "rotary", f'Rotary(path="{around}.{name}")'
    yield "head", f'"{paths[id(head)]}"'


def _requires() -> str:
    from importlib.metadata import version

    major, minor = version("transformers").split(".")[:2]
    return f"transformers>={major}.{minor}"
