"""The containers with the Triton table of operations, end to end, in Triton's interpreter."""

from __future__ import annotations

import pytest

from tests.core.probes import run_probe
from tests.core.triton_probe import CASES, HALVES, MIXED, TUNED
from tests.core.twins import FP32

ENCODER = {"add_layer_norm", "bias_activation"}
GPT = ENCODER | {"layer_norm", "rope_kv_write", "decode_attention"}
LLAMA = {"rms_norm", "add_rms_norm", "gated_activation", "rope_kv_write", "decode_attention"}
LAUNCHED = {
    "bert": ENCODER,
    "clip_text": ENCODER | {"layer_norm"},
    "gpt2": GPT,
    "opt without biases": GPT,
    "opt_post_norm": GPT - {"layer_norm"},
    "llama with biases": LLAMA,
    "llama of odd sizes": LLAMA,
}
# a prompt's norms and activations are in the products; a step, outside of a graph, has kernels of its own
TUNED_LAUNCHES = {
    "bert, tuned": {"linear_fused", "linear_norm", "attention"},
    "opt_post_norm, tuned": {"linear_fused", "linear_norm", "attention", "rope_kv_write"},
    "llama, tuned": {"linear_fused", "linear_norm", "attention", "rope_kv_write", "rms_norm"},
}


# and of 16 bits, where the accelerator's products are the fastest
HALF = 2e-3
ACCELERATED = {
    "llama, accelerated": {"prompt_linear", "rope_kv_write", "rms_norm"},
    "opt, accelerated": {"prompt_linear", "rope_kv_write", "layer_norm"},
}


@pytest.fixture(scope="module")
def probed(root):
    """What each case gave."""
    return run_probe("tests.core.triton_probe", root)


@pytest.mark.parametrize("case", [*CASES, *MIXED, *TUNED])
def test_the_triton_table_computes_what_stock_computes(probed, case):
    found = probed[case]
    assert found["ops"] == ["triton, attention aten" if case in MIXED else "triton"]
    assert found["distance"] <= FP32
    assert found["stock_calls"] == 0


@pytest.mark.parametrize(
    "case", [*(name for name, (family, _) in CASES.items() if family not in ("bert", "clip_text")), *MIXED]
)
def test_the_triton_table_decodes_what_stock_decodes(probed, case):
    assert probed[case]["fast"]
    assert probed[case]["tokens"]


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_really_ran(probed, case):
    assert set(probed[case]["launches"]) == LAUNCHED[case]


@pytest.mark.parametrize("case", TUNED)
def test_what_the_tables_choose_runs(probed, case):
    assert TUNED_LAUNCHES[case] <= set(probed[case]["launches"])
    assert probed[case].get("tokens", True)


@pytest.mark.parametrize("case", HALVES)
def test_the_accelerators_products_compute_what_stock_computes(probed, case):
    found = probed[case]
    assert found["ops"] == ["triton"]
    assert found["distance"] <= HALF
    assert found["stock_calls"] == 0
    assert found["tokens"]
    assert ACCELERATED[case] <= set(found["launches"])


@pytest.mark.parametrize("case", MIXED)
def test_kernels_run_around_an_attention_that_they_do_not_know(probed, case):
    assert {"layer_norm", "bias_activation"} <= set(probed[case]["launches"]) <= GPT - {"rope_kv_write"}
    assert "decode_attention" not in probed[case]["launches"]
