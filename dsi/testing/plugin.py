"""dsi's own checks, registered as anyone's are: the entry point `kit`."""

from __future__ import annotations

from collections.abc import Callable

from dsi.policy import Check, hookimpl

DSI_API = (1, 0)

# check -> module of dsi.testing.checks that holds the function of its name, in the order in which they run
CHECKS = {
    "applies": "plan",
    "parameters_once": "plan",
    "plan_is_true": "plan",
    "light_import": "light",
    "hook_signatures": "light",
    "numerics_fp32": "numerics",
    "numerics_bf16": "numerics",
    "numerics_fp16": "numerics",
    "batch_of_one": "numerics",
    "left_padding": "padding",
    "right_padding": "padding",
    "ragged_padding": "padding",
    "fully_masked_rows": "padding",
    "map_sizes": "maps",
    "map_layouts": "maps",
    "denoising_steps": "maps",
    "sliding_window": "decoding",
    "decode_equals_full": "decoding",
    "chunked_prefill": "decoding",
    "greedy_generate": "decoding",
    "beam_generate": "decoding",
    "hidden_states": "capture",
    "attentions": "capture",
    "state_dict_round_trip": "weights",
    "save_pretrained_round_trip": "weights",
    "meta_load": "weights",
    "no_second_copy": "weights",
    "restore": "lifecycle",
    "apply_twice": "lifecycle",
    "instance_only": "lifecycle",
    "deepcopy": "lifecycle",
    "pickling": "lifecycle",
    "dtype_moves": "moves",
    "device_moves": "moves",
    "cuda_graph_replay": "moves",
    "quantized": "quantized",
    "tp_shards_reassemble": "tensor_parallel",
    "tp_equals_single": "tensor_parallel",
    "tp_indivisible_refused": "tensor_parallel",
    "tp_processes": "tensor_parallel",
}


@hookimpl
def dsi_register_checks(register: Callable[[Check], None]) -> None:
    """Register the checks that every policy is held to."""
    for name, module in CHECKS.items():
        register(Check(name=name, impl=f"dsi.testing.checks.{module}:{name}"))
