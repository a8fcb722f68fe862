"""Every kernel compiles for a GPU that is not here, into what was meant; the interpreter can tell neither."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the compiler made of each kernel for sm_90: a list of facts."""
    return facts_of(tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def dependent(tmp_path_factory):
    """The same, of kernels that begin while those before them end."""
    return facts_of(tmp_path_factory.mktemp("dependent"), "--dependent")


def facts_of(cache, *options):
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("offline_compiler.py")), *options],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "kernels"),
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(cache),
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_kernel_compiles(compiled):
    assert {facts["kernel"] for facts in compiled} == {
        "_add_layer_norm_kernel",
        "_add_map_kernel",
        "_add_rms_norm_kernel",
        "_advance_kernel",
        "_attention_kernel",
        "_bias_activation_kernel",
        "_decode_attention_kernel",
        "_draw_kernel",
        "_gated_activation_kernel",
        "_geglu_kernel",
        "_input_flags_kernel",
        "_largest_kernel",
        "_layer_norm_kernel",
        "_linear_kernel",
        "_matvec_kernel",
        "_merge_splits_kernel",
        "_narrow_kernel",
        "_prompt_linear_kernel",
        "_rms_norm_kernel",
        "_rope_kv_write_kernel",
        "_scores_kernel",
        "_skinny_kernel",
        "group_apply_kernel",
        "group_merge_kernel",
        "group_moments_kernel",
        "group_norm_held_kernel",
        "group_norm_kernel",
        "step_attention_kernel",
        "_sum_kernel",
        "_sum_norm_kernel",
        "_sum_parts_kernel",
        "_upsample_map_kernel",
        "_weights_kernel",
    }


def test_nothing_is_added_up_in_the_order_it_arrives(compiled):
    # but for the tickets of a split context
    assert all(facts["atomics"] == 0 for facts in compiled if facts["kernel"] != "step_attention_kernel")


def test_a_step_of_a_split_context_draws_one_ticket(compiled):
    found = {facts["case"]: facts for facts in compiled if facts["kernel"] == "step_attention_kernel"}
    assert [facts["atomics"] for facts in found.values()] == [1, 1, 0]
    assert all(facts["async_copies"] and facts["wide_loads"] and not facts["tf32"] for facts in found.values())
    assert [bool(facts["tensor_core"]) for facts in found.values()] == [False, True, True]


def test_rows_are_read_sixteen_bytes_at_a_time(compiled):
    assert all(facts["wide_loads"] for facts in compiled if facts["case"] == "norms")


def test_maps_are_read_sixteen_bytes_at_a_time(compiled):
    # but for the sums, which are few
    found = [
        f for f in compiled if f["case"] == "maps" and f["kernel"] not in ("group_merge_kernel", "_weights_kernel")
    ]
    assert len(found) == 15
    assert all(facts["wide_loads"] for facts in found)


def test_attention_reads_ahead_and_uses_the_tensor_cores_in_halves_alone(compiled):
    attention = [facts for facts in compiled if facts["kernel"] == "_decode_attention_kernel"]
    assert all(facts["async_copies"] for facts in attention)
    assert not any(facts["tf32"] for facts in attention)
    tensor_cores = {facts["case"]: bool(facts["tensor_core"]) for facts in attention}
    assert tensor_cores == {
        "attention, 1 to a KV head": False,
        "attention, 4 to a KV head": True,
        "attention, fp32": False,
    }


def test_one_head_exchanges_nothing_between_warps_in_its_loop(compiled):
    """Its shared memory is two tiles of K and two of V, 8 KiB each; a score summed over warps takes more."""
    shared = {facts["shared"] for facts in compiled if facts["case"] == "attention, 1 to a KV head"}
    assert max(shared) == 4 * 8192


def test_a_matrix_is_read_sixteen_bytes_at_a_time(compiled):
    assert all(facts["wide_loads"] for facts in compiled if facts["kernel"] == "_matvec_kernel")


def test_a_forwards_products_and_attention_read_ahead_for_the_tensor_cores(compiled):
    found = [facts for facts in compiled if facts["kernel"] in ("_linear_kernel", "_attention_kernel")]
    assert len(found) == 7
    assert all(facts["tensor_core"] and facts["async_copies"] and not facts["tf32"] for facts in found)


def test_a_prompts_products_are_fed_by_the_accelerator(compiled):
    found = [facts for facts in compiled if facts["case"] == "prompts"]
    assert len(found) == 2
    assert all(facts["tensor_core"] and facts["accelerated"] and not facts["tf32"] for facts in found)


def test_a_few_rows_are_read_ahead_and_go_through_the_tensor_cores(compiled):
    few = [facts for facts in compiled if facts["kernel"] == "_skinny_kernel"]
    assert len(few) == 6
    assert all(facts["async_copies"] and facts["tensor_core"] for facts in few)


def test_what_begins_early_waits_before_it_writes(dependent):
    early = [facts for facts in dependent if facts["dependent"]]
    assert {facts["kernel"] for facts in early} >= {"_matvec_kernel", "_skinny_kernel", "_rms_norm_kernel"}
    assert all(facts["waits"] for facts in early)
    assert not any(facts["stores_before_wait"] for facts in early)


def test_nothing_begins_early_unless_asked(compiled):
    assert not any(facts["dependent"] or facts["waits"] for facts in compiled)
