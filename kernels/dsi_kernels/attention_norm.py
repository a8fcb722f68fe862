"""Attention, its output projection, the residual and the norm after it, for few tokens (forward only).

    s = softmax(scale * q k^T, over the keys that a query sees) v W^T + b + residual     (one rounding to the dtype)
    y = norm(s)                                                                          layer or rms

Two kernels. A program of attention.py's multiplies its head's output by the head's columns of W and leaves the product,
fp32, [heads, B * S, N]; the second adds the heads up in a fixed order, then bias and residual, and normalises the row.
The projection costs no launch of its own, and 8 * heads * B * S * N bytes of parts, written and read: for few tokens.

Casting: the attention's output is rounded to the dtype, as it is between two kernels; then everything up to s in fp32,
and one rounding.

Source: Dao 2023, https://arxiv.org/abs/2307.08691.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsi_kernels._launch import Launch, Launches, kind_of
from dsi_kernels._pdl import SWITCH
from dsi_kernels.attention import attention_reference, check_attention, launch_of
from dsi_kernels.linear_fused import check_product
from dsi_kernels.linear_norm import check_norm, linear_norm_reference, sum_norm
from dsi_kernels.tuned import device_facts, launch_config

# values of the setting `choice`: attention and product each by its own op, or this op
APART, TOGETHER = 1, 2
# a bucket holds the token counts up to a power of two, from the first to the last
FIRST_BUCKET, LAST_BUCKET = 64, 16384


def attention_norm_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """What the kernels must compute, in plain torch. The tests' oracle and the CPU path."""
    attended = attention_reference(q, k, v, mask, causal=causal, scale=scale).flatten(2)
    return linear_norm_reference(attended, weight, bias, residual, norm, norm_weight, norm_bias, eps)


def attention_norm_config(q: Tensor, columns: int) -> Mapping[str, int]:
    """The tuned settings for these queries, `choice` among them: APART or TOGETHER.

    Args:
        q: [B, heads, S, head_dim].
        columns: of the projection.
    """
    B, heads, S, head_dim = q.shape
    bucket = min(max(FIRST_BUCKET, 1 << (B * S - 1).bit_length()), LAST_BUCKET)
    shape = f"m={bucket},heads={heads},head_dim={head_dim},n={columns},bytes={q.element_size()}"
    return launch_config("attention_norm", shape, device_facts(q.device)[0])


_LAUNCHES: Launches[Launch] = Launches()


def attention_norm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    keep_sum: bool = True,
    config: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The norm of the projected attention plus bias and residual, and that sum.

    Args:
        q, k, v, mask, causal, scale: as `attention` has them; S 1 or more.
        weight: [N, heads * head_dim], same dtype, contiguous.
        bias: [N], or None.
        residual: [B, S, N], contiguous.
        norm: "layer" or "rms".
        norm_weight, norm_bias: [N] or None; rms needs a weight and has no bias.
        eps: added to the variance or mean square.
        keep_sum: the sum is wanted too.
        config: all settings of tuned/attention_norm/default.json, in the place of the tuned ones.

    Returns:
        (y, s): both [B, S, N], in q's dtype; s None where it is not wanted. Inputs are not modified.

    Raises:
        ValueError: shapes, dtypes, layout, devices or norm do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    op = "attention_norm"
    B, heads, S, head_dim = q.shape
    N = weight.shape[0]

    def make() -> Launch:
        check_attention(op, q, k, v, mask)
        check_product(op, q.new_empty(1).expand(B, S, heads * head_dim).contiguous(), weight, bias, residual)
        sizes = attention_norm_config(q, N) if config is None else config
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], S * N, B * S * N, N)
        grid = (S, heads, B)
        return launch_of(q, k, mask, grid, strides, causal=causal, scale=scale, config=sizes, columns=N)

    settings = None if config is None else tuple(config.items())
    kinds = kind_of(q, k, v, mask, weight, bias, residual)
    launch = _LAUNCHES.get((causal, scale, settings, SWITCH.get(), kinds), make)
    check_norm(op, residual, norm, norm_weight, norm_bias)
    parts = torch.empty((heads, B * S, N), dtype=torch.float32, device=q.device)
    launch(q, k, v, mask, None, parts, weight, S, k.shape[2])
    return sum_norm(parts, bias, residual, norm, norm_weight, norm_bias, eps, keep_sum=keep_sum)
