"""Launch configurations out of committed JSON, by op, device and shape, with a default that is safe on any device.

    tuned/<op>/default.json          {"*": {every setting}, "<shape>": {some settings}}
    tuned/<op>/<device name>.json    {"*": {some settings}, "<shape>": {some settings}}

Later and more particular wins: default "*", default shape, device "*", device shape, and after them the same two of the
user's own file, which `dsi tune` writes: $XDG_CACHE_HOME/dsi/tuned/<op>/<device name>.json (~/.cache where that is not
set). A device is named as CUDA names
it, every run of other characters than letters and digits an underscore: NVIDIA_H200. A shape is named by its op. Files
are read once a process. Nothing is tuned here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

import torch

FOLDER = Path(__file__).with_name("tuned")
# what stands in for a device without multiprocessors of its own: the interpreter's CPU
INTERPRETED_SMS = 8


@cache
def device_facts(device: torch.device) -> tuple[str, int]:
    """The device's name and its number of multiprocessors."""
    if device.type != "cuda":
        return device.type, INTERPRETED_SMS
    facts = torch.cuda.get_device_properties(device)
    return facts.name, facts.multi_processor_count


def read_settings(path: Path, known: frozenset[str] | None = None) -> dict[str, dict[str, int]]:
    """The settings in a file, by shape; none where there is no file.

    Raises:
        ValueError: a setting that the default does not have, or one that is no positive int; file and shape are named.
    """
    if not path.exists():
        return {}
    settings: dict[str, dict[str, int]] = json.loads(path.read_text())
    for shape, config in settings.items():
        for key, value in config.items():
            if known is not None and key not in known:
                raise ValueError(f"{path}: {shape!r}: unknown setting {key!r}; known are {', '.join(sorted(known))}")
            if type(value) is not int or value < 1:
                raise ValueError(f"{path}: {shape!r}: {key} is {value!r}; a positive int is needed")
    return settings


def user_folder() -> Path:
    """Where this user's own settings are: $XDG_CACHE_HOME/dsi/tuned, of ~/.cache where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsi" / "tuned"


def device_slug(device_name: str) -> str:
    """The device's name as its file has it."""
    return re.sub(r"[^A-Za-z0-9]+", "_", device_name)


@cache
def launch_config(
    op: str, shape: str, device_name: str, folder: Path = FOLDER, user: Path | None = None
) -> Mapping[str, int]:
    """Every setting of an op for a shape on a device; `user`, where the user's own are, None for `user_folder()`.

    Raises:
        ValueError: a file has an unknown or unusable setting.
    """
    default = read_settings(folder / op / "default.json")
    known, file = frozenset(default["*"]), Path(op) / f"{device_slug(device_name)}.json"
    device, own = (read_settings(root / file, known) for root in (folder, user or user_folder()))
    named = (device.get("*", {}), device.get(shape, {}), own.get("*", {}), own.get(shape, {}))
    layers = (default["*"], default.get(shape, {}), *named)
    return MappingProxyType({key: value for layer in layers for key, value in layer.items()})
