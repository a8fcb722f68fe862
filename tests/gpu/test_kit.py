"""The conformance kit's checks that need CUDA: they pass on what is whole, and find what is broken."""

from __future__ import annotations

import pytest

from dsi.registry import Registry
from dsi.testing import conformance, tiny_config
from tests.kit.matrix import judge
from tests.kit.mutants import MUTANTS

pytestmark = pytest.mark.gpu

CHECKS = ("applies", "device_moves", "cuda_graph_replay")


@pytest.mark.parametrize("name", ["llama:llama", "gpt2:gpt2", "opt:opt", "bert:bert", "clip:clip"])
def test_a_built_in_policy(name):
    policy = Registry.load().policies[name]
    report = conformance(name, lambda: tiny_config(policy), only=CHECKS, require="all")
    assert report.ok, str(report)


@pytest.mark.parametrize("name", ["unet:unet", "vae:vae"])
def test_a_policy_of_maps(name):
    policy = Registry.load().policies[name]
    report = conformance(name, lambda: tiny_config(policy), only=(*CHECKS, "denoising_steps"), require="all")
    assert report.ok, str(report)


@pytest.mark.parametrize("mutant", [one for one in MUTANTS if one.needs == "cuda"], ids=lambda one: one.name)
def test_a_mutant_dies(mutant):
    assert list(judge(mutant, only=CHECKS).faults) == []
