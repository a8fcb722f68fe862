"""The products of a prompt whose epilogue dsi_kernels takes over, and which of them it is the faster for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dsi.containers.linear import FusedLinear


def prompt_product(linear: Any, x: Tensor, follows: str) -> Mapping[str, int] | None:
    """The settings of `dsi_kernels.prompt_linear` for what follows a product; None where a library's is the faster.

    Args:
        linear: its weight is x's right factor, transposed.
        x: [B, S, K]; a step's rows, two dimensions, have kernels of their own.
        follows: "nothing", "activation", "gate" or "add".
    """
    # a rank's part of a layer has a class of its own
    if x.dim() < 3 or type(linear) is not FusedLinear or linear.form != "aten" or not x.numel():
        return None
    from dsi_kernels.prompt_linear import OWN, prompt_config, takes

    if not takes(x, linear.weight):
        return None
    config = prompt_config(x, linear.weight, follows)
    return config if config["choice"] == OWN else None
