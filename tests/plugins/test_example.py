"""The bar for a third party: a family in 60 lines, its pyproject and its test included, and no line of the core."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

FILES = ("dsi_seed_oss.py", "pyproject.toml", "test_seed_oss.py")


@pytest.fixture
def example(root):
    return root / "examples" / "dsi-seed-oss"


def test_it_has_sixty_lines_at_most(example):
    found = [file for file in example.iterdir() if file.name != "__pycache__"]
    assert sorted(file.name for file in found) == sorted(FILES)
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in found) <= 60


def test_it_installs_and_loads(example, tmp_path, fresh_python):
    # built from a copy: a build may leave files behind
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(example, source, ignore=shutil.ignore_patterns("__pycache__"))
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", target, source], check=True, capture_output=True, timeout=120)
    done = fresh_python(
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "from dsi.cli import main; sys.exit(main(['plugins', '--json']))"
    )
    assert done.returncode == 0, done.stderr
    plugins = {one["name"]: one for one in json.loads(done.stdout)["plugins"]}
    assert plugins["seed_oss"]["state"] == "loaded"
    assert plugins["seed_oss"]["policies"] == ["seed_oss:seed_oss"]
