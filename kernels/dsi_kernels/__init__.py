"""The floor: one op a file, each a torch reference that runs anywhere beside a Triton kernel for CUDA.

Imports torch and triton only, and torch alone where Triton is not installed; launching then is an ImportError.
"""

from dsi_kernels._triton import INSTALLED, INTERPRETED
from dsi_kernels.activations import KINDS, activate_reference
from dsi_kernels.add_layer_norm import add_layer_norm, add_layer_norm_reference
from dsi_kernels.add_map import add_map, add_map_reference
from dsi_kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from dsi_kernels.ahead import compile_ahead
from dsi_kernels.attention import attention, attention_reference
from dsi_kernels.bias_activation import bias_activation, bias_activation_reference
from dsi_kernels.decode_attention import decode_attention, decode_attention_reference
from dsi_kernels.gated_activation import gated_activation, gated_activation_reference
from dsi_kernels.geglu import geglu, geglu_reference
from dsi_kernels.greedy_token import greedy_token, greedy_token_reference
from dsi_kernels.group_norm import group_norm, group_norm_reference
from dsi_kernels.input_flags import input_flags, input_flags_reference
from dsi_kernels.layer_norm import layer_norm, layer_norm_reference
from dsi_kernels.linear_fused import linear_fused, linear_fused_reference
from dsi_kernels.linear_norm import linear_norm, linear_norm_reference
from dsi_kernels.matvec import matvec, matvec_reference
from dsi_kernels.prompt_linear import prompt_linear, prompt_linear_reference
from dsi_kernels.rms_norm import rms_norm, rms_norm_reference
from dsi_kernels.rope_kv_write import rope_kv_write, rope_kv_write_reference
from dsi_kernels.sample_token import sample_token, sample_token_reference, sampling_settings
from dsi_kernels.skinny import skinny, skinny_reference
from dsi_kernels.step_attention import step_attention, step_attention_reference
from dsi_kernels.summed_map import summed_map, summed_map_reference
from dsi_kernels.upsample_map import upsample_map, upsample_map_reference
from dsi_kernels.varlen_attention import varlen_attention, varlen_attention_reference
from dsi_kernels.wide_attention import wide_attention, wide_attention_reference

__all__ = [
    "INSTALLED",
    "INTERPRETED",
    "KINDS",
    "activate_reference",
    "add_layer_norm",
    "add_layer_norm_reference",
    "add_map",
    "add_map_reference",
    "add_rms_norm",
    "add_rms_norm_reference",
    "attention",
    "attention_reference",
    "bias_activation",
    "bias_activation_reference",
    "compile_ahead",
    "decode_attention",
    "decode_attention_reference",
    "gated_activation",
    "gated_activation_reference",
    "geglu",
    "geglu_reference",
    "greedy_token",
    "greedy_token_reference",
    "group_norm",
    "group_norm_reference",
    "input_flags",
    "input_flags_reference",
    "layer_norm",
    "layer_norm_reference",
    "linear_fused",
    "linear_fused_reference",
    "linear_norm",
    "linear_norm_reference",
    "matvec",
    "matvec_reference",
    "prompt_linear",
    "prompt_linear_reference",
    "rms_norm",
    "rms_norm_reference",
    "rope_kv_write",
    "rope_kv_write_reference",
    "sample_token",
    "sample_token_reference",
    "sampling_settings",
    "skinny",
    "skinny_reference",
    "step_attention",
    "step_attention_reference",
    "summed_map",
    "summed_map_reference",
    "upsample_map",
    "upsample_map_reference",
    "varlen_attention",
    "varlen_attention_reference",
    "wide_attention",
    "wide_attention_reference",
]
