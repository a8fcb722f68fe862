"""Whose attention a prompt gets: cuDNN's, which plans anew for every shape, only where its plan is used again."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
import torch

from dsi.containers.launches import graph_kernels, without_plans
from dsi.containers.triton_ops import CUDNN, OWN, _attention


@pytest.mark.parametrize(
    ("graph", "planned", "choice"), [(False, True, OWN), (True, True, CUDNN), (True, False, OWN), (False, False, OWN)]
)
def test_cudnn_plans_for_graphs_that_pay_for_it(graph, planned, choice, monkeypatch):
    import dsi_kernels  # noqa: F401 - the package has the op under its module's name

    told = {"choice": CUDNN, "block_s": 64}
    monkeypatch.setattr(sys.modules["dsi_kernels.attention"], "attention_config", lambda *_, **__: told)
    q = torch.zeros(1, 2, 5, 16)
    with graph_kernels() if graph else nullcontext(), nullcontext() if planned else without_plans():
        assert _attention(q, q, None, True) == {**told, "choice": choice}
