"""Triton's interpreter where there is no CUDA device, and outputs that are born NaN.

The interpreter is chosen once for a process, before the first import of triton, so the whole pytest run shares it; no
other test launches a kernel or has Triton compile on a CPU. Where CUDA is there, the same tests run compiled and carry
the mark `gpu`.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        # transformers' models import it; what it has decorated by then is for a GPU, and cannot be interpreted
        raise pytest.UsageError(
            "triton was imported before TRITON_INTERPRET=1; set it in tests/conftest.py, at the top"
        )
    os.environ["TRITON_INTERPRET"] = "1"

if not ON_GPU:
    from tests.kernels.hardware_bf16 import interpret_bf16_as_hardware_does

    interpret_bf16_as_hardware_does()


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if ON_GPU else "cpu"])
def device(request):
    """Where the kernels run: "cuda" compiled, "cpu" interpreted."""
    return request.param


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Uninitialised floats are NaN, so an element that a kernel forgets cannot pass."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(t):
        return t.fill_(float("nan")) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda t, **k: poisoned(empty_like(t, **k)))
