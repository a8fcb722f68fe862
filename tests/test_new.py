"""`dsi new`: the package it writes installs, and passes the kit once the mapping is filled in, and not before."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dsi.cli import main
from dsi.policy import API_VERSION

SEED = "transformers.models.seed_oss.modeling_seed_oss:SeedOssDecoderLayer"
# in the order in which the places stand in the file
MAPPING = (
    *("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
PLACE = re.compile(r'"FILL IN[^"]*"')


def new(capsys, *argv):
    """(exit code, standard output, standard error)"""
    code = main(["new", *map(str, argv)])
    out = capsys.readouterr()
    return code, out.out, out.err


def python(*argv, cwd, path):
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(path), *filter(None, sys.path)]), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The folder of a package for a LLaMA-like family that dsi does not know."""
    into = tmp_path_factory.mktemp("new")
    assert main(["new", "seed-oss", "--layer", SEED, "--into", str(into)]) == 0
    return into / "dsi-seed-oss"


def install(package: Path, target: Path) -> None:
    argv = [
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--disable-pip-version-check",
        "--target",
    ]
    done = python(*argv, target, package, cwd=target.parent, path="")
    assert done.returncode == 0, done.stderr


def test_what_is_written(package):
    found = sorted(str(path.relative_to(package)) for path in package.rglob("*") if path.is_file())
    assert found == [
        "README.md",
        "dsi_seed_oss/__init__.py",
        "dsi_seed_oss/py.typed",
        "pyproject.toml",
        "tests/test_conformance.py",
    ]
    source = (package / "dsi_seed_oss" / "__init__.py").read_text()
    assert f"DSI_API = {API_VERSION}" in source
    assert len(PLACE.findall(source)) == len(MAPPING)
    # what the class tells stands there already
    for line in (
        'layer=FAMILY + "SeedOssDecoderLayer"',
        'RMS = {"kind": "rms", "eps": "variance_epsilon", "cls": FAMILY + "SeedOssRMSNorm"}',
        'call=Call(rope="position_embeddings")',
        "#   self_attn.o_proj: Linear [64, 128]",
        '"scale": Attr("self_attn.scaling")',
        'norm=Norm("model.norm", **RMS)',
        'rotary=Rotary(path="model.rotary_emb")',
    ):
        assert line in source


def test_before_it_is_filled_in_the_test_says_where_it_stops(package, tmp_path):
    install(package, tmp_path / "target")
    done = python("-m", "pytest", "-q", "-k", "applies", cwd=package, path=tmp_path / "target")
    assert done.returncode == 1
    assert "has no submodule 'FILL IN" in done.stdout


def test_once_it_is_filled_in_it_installs_and_passes_the_kit(package, tmp_path):
    module = package / "dsi_seed_oss" / "__init__.py"
    source = module.read_text()
    filled = source
    for path in MAPPING:
        filled = PLACE.sub(f'"{path}"', filled, count=1)
    module.write_text(filled)
    try:
        install(package, tmp_path / "target")
    finally:
        module.write_text(source)
    listed = python("-m", "dsi.cli", "plugins", "--json", cwd=tmp_path, path=tmp_path / "target")
    found = {one["name"]: one for one in json.loads(listed.stdout)["plugins"]}["seed-oss"]
    assert (found["state"], found["reason"]) == ("loaded", "")
    assert found["policies"] == ["seed-oss:seed-oss"]
    # ranks in processes of their own are the kit's longest check, and its own tests run it
    argv = ("-m", "pytest", "-q", "-k", "not tp_processes", package / "tests")
    done = python(*argv, cwd=tmp_path, path=tmp_path / "target")
    assert done.returncode == 0, done.stdout
    counts = re.search(r"(\d+) checks: (\d+) pass", done.stdout)
    assert counts is not None
    assert int(counts[2]) >= 25


TOLD = {
    "gpt_neox:GPTNeoXLayer": ["Packed(", 'cache="layer_past"', '"up": Linear(', 'Norm("gpt_neox.final_layer_norm")'],
    "starcoder2:Starcoder2DecoderLayer": ["Concat(", '"up": Linear(', 'Attr("self_attn.head_dim")', "DecoderLayer"],
    "clip:CLIPEncoderLayer": ["dsi.containers:EncoderLayer", 'Call(cache="")', '"causal": Const(False)', "#   mlp.fc2"],
}


@pytest.mark.parametrize("layer", TOLD)
def test_what_a_layer_tells(capsys, tmp_path, layer):
    module, _, cls = layer.partition(":")
    name = f"transformers.models.{module}.modeling_{module}:{cls}"
    assert new(capsys, "acme", "--layer", name, "--into", tmp_path)[0] == 0
    source = (tmp_path / "dsi-acme" / "dsi_acme" / "__init__.py").read_text()
    compile(source, "acme", "exec")
    for line in TOLD[layer]:
        assert line in source


def test_without_a_layer_everything_is_to_be_filled_in(capsys, tmp_path):
    code, out, _ = new(capsys, "acme", "--into", tmp_path)
    assert code == 0
    assert "fill in the 14 places marked 'FILL IN'" in out
    compile((tmp_path / "dsi-acme" / "dsi_acme" / "__init__.py").read_text(), "acme", "exec")


def test_it_overwrites_nothing(capsys, tmp_path):
    assert new(capsys, "acme", "--into", tmp_path)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, _, err = new(capsys, "dsi-acme", "--into", tmp_path)
    assert code == 2
    assert "is there already; dsi new overwrites nothing" in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "name", ["", "A", "a_b", "../x", "a--b", "-a", "a-", "1a", "a b", "a/b", "ä", "x" * 61, "dsi-"]
)
def test_a_name_that_is_none(capsys, tmp_path, name):
    code, _, err = new(capsys, "--into", tmp_path, "--", name)
    assert code == 2
    assert "is no name for a package" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llama", "dsi-llama"])
def test_a_name_that_is_taken(capsys, tmp_path, name):
    code, _, err = new(capsys, name, "--into", tmp_path)
    assert code == 2
    assert "the plugin llama is that of dsi" in err


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("nope", "'nope' cannot be imported"),
        ("json:nope", "'json:nope' cannot be imported"),
        ("json:dumps", "is no torch.nn.Module class"),
        ("torch.nn:Linear", "no model whose config"),
        ("transformers.models.llama.modeling_llama:LlamaRotaryEmbedding2", "cannot be imported"),
    ],
)
def test_a_layer_that_is_none(capsys, tmp_path, layer, words):
    code, _, err = new(capsys, "acme", "--layer", layer, "--into", tmp_path)
    assert code == 2
    assert words in err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = new(capsys, "acme", "--into", tmp_path / "file")
    assert code == 2
    assert "cannot be written" in err
