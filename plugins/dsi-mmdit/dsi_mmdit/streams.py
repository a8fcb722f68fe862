"""What the layers of two streams, image and text, have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsi.policy import Concat, Linear, Norm, Slot


def joint_slots(head_norm: Callable[[str], Norm]) -> dict[str, Slot]:
    """The slots of a joint layer, whose norms over the heads are `head_norm`'s."""
    return {
        "modulation": Concat("norm1.linear", "norm1_context.linear"),
        "norm_attn": Norm("norm1.norm"),
        "norm_attn_context": Norm("norm1_context.norm"),
        "qkv": Concat("attn.to_q", "attn.to_k", "attn.to_v"),
        "qkv_context": Concat("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "q_norm": head_norm("attn.norm_q"),
        "k_norm": head_norm("attn.norm_k"),
        "q_norm_context": head_norm("attn.norm_added_q"),
        "k_norm_context": head_norm("attn.norm_added_k"),
        "out": Linear("attn.to_out.0"),
        "out_context": Linear("attn.to_add_out"),
        "norm_mlp": Norm("norm2"),
        "up": Linear("ff.net.0.proj"),
        "down": Linear("ff.net.2"),
        "norm_mlp_context": Norm("norm2_context"),
        "up_context": Linear("ff_context.net.0.proj"),
        "down_context": Linear("ff_context.net.2"),
    }


def feed_forward(name: str) -> dict[str, Any]:
    """What a feed-forward must be like."""
    return {f"{name}.net.0.__class__.__name__": "GELU", f"{name}.net.0.approximate": "tanh"}
