"""Settings measured on the device are settings that launch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsi.attention_tuning import Heads, tune_attention
from dsi.tuning import Product, tune, write
from dsi_kernels.tuned import launch_config

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rows", [1, 8])
def test_what_is_found_is_what_is_launched(rows: int, tmp_path: Path) -> None:
    with torch.no_grad():
        one = tune(Product(rows=512, columns=512), rows, torch.bfloat16)
    assert one is not None
    assert one.time > 0 < one.library
    name = torch.cuda.get_device_name()
    write([one], tmp_path, name)
    assert one.settings.items() <= launch_config(one.op, one.shape, name, user=tmp_path).items()


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_settings_of_a_steps_attention_are_what_is_launched(kv_heads: int, tmp_path: Path) -> None:
    with torch.no_grad():
        one = tune_attention(Heads(heads=4, kv_heads=kv_heads, head_dim=64), 1, 256, torch.bfloat16)
    assert one is not None
    name = torch.cuda.get_device_name()
    write([one], tmp_path, name)
    assert one.settings == launch_config("step_attention", one.shape, name, user=tmp_path)
