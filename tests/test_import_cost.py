"""What is light stays light: neither `import dsi` nor `dsi plugins` imports torch or what builds on it."""

from __future__ import annotations

import json
import time

import pytest

HEAVY = ("torch", "transformers", "diffusers", "triton", "accelerate", "huggingface_hub", "numpy")

CODE = """
import json, sys
before = set(sys.modules)
{statement}
print()
print(json.dumps([name for name in {heavy} if name in sys.modules]))
"""


def imported(fresh_python, statement, **env):
    """The heavy packages that `statement` leaves in sys.modules."""
    done = fresh_python(CODE.format(statement=statement, heavy=HEAVY), **env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "statement",
    [
        "import dsi",
        "import dsi; dsi.InferenceConfig(); dsi.default_inference_config()",
        "import dsi.policy, dsi.errors, dsi.config",
        "import dsi.registry, dsi.cli, dsi.skeleton",
        "from dsi.config import load_config; load_config({'dtype': 'fp16', 'tp': {'tp_size': 1}})",
        "from dsi.registry import Registry; Registry.load()",
        "from dsi.registry import Registry; Registry.load().digest()",
        "from dsi.cli import main; assert main(['plugins']) == 0",
        "from dsi.cli import main; assert main(['plugins', '--json']) == 0",
        "from dsi.cli import main; assert main(['--help']) == 0",
        "from dsi.cli import main; assert main(['plan', 'x', '--dtype', 'int8']) == 2",
        "from dsi.cli import main; assert main(['plan', 'x', '--policy', 'a:b']) == 2",
    ],
)
def test_it_is_light(fresh_python, statement):
    assert imported(fresh_python, statement) == []


def test_the_check_sees_what_is_heavy(fresh_python):
    assert "torch" in imported(fresh_python, "import torch")


def test_what_needs_torch_imports_it_when_asked_for(fresh_python):
    assert "torch" in imported(fresh_python, "import dsi; dsi.plan, dsi.init_inference, dsi.InferenceEngine")


def test_a_name_that_is_not_there():
    import dsi

    with pytest.raises(AttributeError, match="module 'dsi' has no attribute 'nope'"):
        dsi.nope  # noqa: B018 - reading it is the test


@pytest.mark.parametrize("command", ["--help", "plugins"])
def test_the_command_line_starts_fast(fresh_python, command):
    """The bar is 0.5 s over the interpreter's own start, by the best of three; a busy machine gets double."""

    def seconds(code):
        started = time.perf_counter()
        assert fresh_python(code).returncode == 0
        return time.perf_counter() - started

    bare = min(seconds("pass") for _ in range(3))
    ours = min(seconds(f"from dsi.cli import main; main(['{command}'])") for _ in range(3))
    assert ours - bare < 1.0
