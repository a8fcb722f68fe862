"""A model without weights: `build_skeleton` reads one config.json and gives the module on the meta device.

Nothing is fetched and no code of a checkpoint runs. What a config.json can say to select code (`auto_map`, an attention
implementation, private keys) is taken out before transformers sees it.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsi.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 4 << 20

# an attention or expert implementation may name a kernel repository, which is code; a pretrained backbone is fetched
_TAKEN_OUT = frozenset({"auto_map", "attn_implementation", "experts_implementation", "custom_pipelines", "use_kernels"})
_PUT_OFF = frozenset({"use_pretrained_backbone"})


def build_skeleton(model: str) -> nn.Module:
    """The model that a config describes, on the meta device, in eval mode, its parameters in the config's dtype.

    Args:
        model: a config.json, a folder that holds one, or a model id whose config.json is in the Hugging Face cache.

    Raises:
        ConfigError: nothing is there, or it is no model config.
        UnsupportedModelError: a model that only code from elsewhere could build, or that transformers does not know.
    """
    path = find_config(model)
    facts = _read(path)
    _refuse_foreign(path, facts)
    import torch

    config = _config(path, facts)
    with torch.device("meta"):
        skeleton = _build(path, config)
    dtype = _dtype(config)
    for parameter in skeleton.parameters():
        if dtype is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return skeleton.eval()


def find_config(model: str) -> Path:
    """The config.json that `model` means; see `build_skeleton`.

    Raises:
        ConfigError: there is none.
    """
    path = Path(model)
    if "\0" in model or not model:
        raise ConfigError([f"MODEL: {model!r} is no path and no model id"])
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return path
    if path.parent.is_dir() and path.name == "config.json":
        found = ", ".join(sorted(one.name for one in path.parent.glob("*.json"))) or "no JSON file"
        raise ConfigError([f"MODEL: {str(path.parent)!r} has no config.json (it has {found}); use a model's folder"])
    return _cached(model)


def _cached(model: str) -> Path:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        raise ConfigError([f"MODEL: {model!r} does not exist and is no model id"]) from None
    # the cache remembers files that it knows to be absent by an object that is no path
    if not isinstance(found, str):
        raise ConfigError(
            [f"MODEL: {model!r} is no file or folder and not in the Hugging Face cache; download it first"]
        )
    return Path(found)


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError([f"MODEL: {str(path)!r} holds more than {MAX_FILE_BYTES} bytes; use a config.json"])
        facts = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError([f"MODEL: {str(path)!r} cannot be read: {error.strerror}"]) from None
    except ConfigError:
        raise
    # bad JSON and bad UTF-8 are both ValueErrors
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"MODEL: {str(path)!r} is not JSON: {error}"]) from None
    if not isinstance(facts, dict):
        raise ConfigError([f"MODEL: {str(path)!r} holds no JSON object; use a model's config.json"])
    return facts


def _refuse_foreign(path: Path, facts: dict[str, Any]) -> None:
    """Refuse what is no plain transformers model, by name."""
    from transformers import CONFIG_MAPPING

    if "_class_name" in facts or "_diffusers_version" in facts:
        raise UnsupportedModelError(
            f"{path}: {facts.get('_class_name')} is a diffusers model, and skeletons are built by transformers",
            hint="plan it from Python: dsi.plan(pipe.text_encoder)",
        )
    if facts.get("quantization_config"):
        raise UnsupportedModelError(
            f"{path}: quantization_config: the checkpoint is quantized already, and only its weights say how",
            hint="load it and call dsi.plan(model)",
        )
    kind = facts.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        if "auto_map" in facts:
            logger.warning("%s: auto_map names code of the checkpoint; it is ignored", path)
        return
    if "auto_map" in facts:
        raise UnsupportedModelError(
            f"{path}: model_type {kind!r} needs the code that auto_map names, and dsi runs no code of a checkpoint",
            hint="load the model yourself and call dsi.plan(model)",
        )
    if kind is None:
        raise ConfigError([f"MODEL: {str(path)!r} has no model_type; use a model's config.json"])
    raise UnsupportedModelError(f"{path}: model_type {kind!r} is not in this version of transformers")


def _without_code(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: False if key in _PUT_OFF else _without_code(item)
            for key, item in value.items()
            if key not in _TAKEN_OUT and not key.startswith("_")
        }
    return [_without_code(item) for item in value] if isinstance(value, list) else value


def _config(path: Path, facts: dict[str, Any]) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[facts["model_type"]].from_dict(_without_code(facts))
    # each config class checks its own fields, and raises whatever its checks raise
    except Exception as error:
        logger.debug("%s", path, exc_info=True)
        raise UnsupportedModelError(
            f"{path}: transformers refuses the config: {type(error).__name__}: {error}"
        ) from error


def _build(path: Path, config: PretrainedConfig) -> nn.Module:
    import transformers

    cls = _architecture(path, config)
    try:
        return cls(config) if cls is not None else transformers.AutoModel.from_config(config, trust_remote_code=False)
    # whatever a constructor raises on sizes that do not fit together
    except Exception as error:
        logger.debug("%s", path, exc_info=True)
        name = cls.__name__ if cls is not None else f"model_type {config.model_type!r}"
        raise UnsupportedModelError(
            f"{path}: transformers cannot build {name}: {type(error).__name__}: {error}"
        ) from error


def _architecture(path: Path, config: PretrainedConfig) -> type[nn.Module] | None:
    """The model class that the config names first, if transformers exports one of that name."""
    import transformers

    names = getattr(config, "architectures", None) or [""]
    name = names[0] if isinstance(names, list) and isinstance(names[0], str) else ""
    cls = getattr(transformers, name) if name in transformers.__all__ else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        return None
    if not isinstance(config, getattr(cls, "config_class", None) or object):
        raise UnsupportedModelError(
            f"{path}: architectures names {name}, which is no model of model_type {config.model_type!r}"
        )
    return cls


def _dtype(config: PretrainedConfig) -> torch.dtype | None:
    import torch

    dtype = getattr(config, "dtype", None)
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None
