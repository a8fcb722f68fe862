from __future__ import annotations

import json

import pytest
import torch

from dsi_kernels import tuned
from dsi_kernels.tuned import FOLDER, device_facts, launch_config


@pytest.fixture
def folder(tmp_path):
    def write(op, **files):
        (tmp_path / op).mkdir()
        for name, settings in files.items():
            (tmp_path / op / f"{name}.json").write_text(json.dumps(settings))
        return tmp_path

    return write


def test_the_more_particular_wins(folder):
    path = folder(
        "op",
        default={"*": {"a": 1, "b": 2, "c": 3, "d": 4}, "small": {"b": 20, "c": 30, "d": 40}},
        NVIDIA_H200={"*": {"c": 300, "d": 400}, "small": {"d": 4000}},
    )
    assert launch_config("op", "small", "NVIDIA H200", path) == {"a": 1, "b": 20, "c": 300, "d": 4000}
    assert launch_config("op", "large", "NVIDIA H200", path) == {"a": 1, "b": 2, "c": 300, "d": 400}
    assert launch_config("op", "small", "another", path) == {"a": 1, "b": 20, "c": 30, "d": 40}


def test_the_users_own_wins_and_is_held_to_the_same(folder, tmp_path, monkeypatch):
    path = folder("op", default={"*": {"a": 1, "b": 2}}, a_device={"*": {"a": 10}, "small": {"b": 20}})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tuned.user_folder() == tmp_path / "cache" / "dsi" / "tuned"
    (own := tuned.user_folder() / "op").mkdir(parents=True)
    (own / "a_device.json").write_text('{"small": {"a": 7}}')
    assert launch_config("op", "small", "a device", path) == {"a": 7, "b": 20}
    assert launch_config("op", "large", "a device", path) == {"a": 10, "b": 2}
    (own / "another.json").write_text('{"small": {"z": 7}}')
    with pytest.raises(ValueError, match=r"another.json: 'small': unknown setting 'z'"):
        launch_config("op", "small", "another", path)


def test_a_device_is_named_by_letters_and_digits(folder):
    path = folder("op", default={"*": {"a": 1}}, NVIDIA_A100_SXM4_80GB={"*": {"a": 2}})
    assert launch_config("op", "any", "NVIDIA A100-SXM4-80GB", path) == {"a": 2}


def test_what_comes_out_cannot_be_changed(folder):
    config = launch_config("op", "any", "any", folder("op", default={"*": {"a": 1}}))
    with pytest.raises(TypeError, match="does not support item assignment"):
        config["a"] = 2


def test_files_are_read_once(folder):
    path = folder("op", default={"*": {"a": 1}})
    first = launch_config("op", "any", "any", path)
    (path / "op" / "default.json").write_text('{"*": {"a": 2}}')
    assert launch_config("op", "any", "any", path) is first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"small": {"z": 1}}, r"device.json: 'small': unknown setting 'z'; known are a, b"),
        ({"*": {"a": 0}}, "device.json: '\\*': a is 0; a positive int is needed"),
        ({"*": {"a": 1.5}}, "a is 1.5"),
        ({"*": {"a": True}}, "a is True"),
        ({"*": {"a": "1"}}, "a is '1'"),
    ],
)
def test_refuses_and_says_why(settings, message, folder):
    path = folder("op", default={"*": {"a": 1, "b": 1}}, device=settings)
    with pytest.raises(ValueError, match=message):
        launch_config("op", "any", "device", path)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*/*.json")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_committed_file_is_usable(file):
    default = tuned.read_settings(file.parent / "default.json")
    settings = tuned.read_settings(file, frozenset(default["*"]))
    assert settings
    assert file.read_text() == json.dumps(settings, indent=2, sort_keys=True) + "\n"


def test_the_facts_of_a_device(device):
    name, sms = device_facts(torch.device(device))
    assert (name, sms) == ("cpu", 8) if device == "cpu" else sms > 8
