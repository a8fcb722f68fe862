from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dsi_kernels import upsample_map, upsample_map_reference
from tests.kernels.tolerance import DTYPES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 5, 7), (1, 3, 9, 4), (2, 40, 1, 1)], ids=str)
def test_matches_reference(shape, dtype, device):
    x = torch.randn(*shape).to(device, dtype).contiguous(memory_format=torch.channels_last)
    y = upsample_map(x)
    assert torch.equal(y, F.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert torch.equal(y, upsample_map_reference(x))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_no_batch(device):
    x = torch.ones(0, 8, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    assert upsample_map(x).shape == (0, 8, 8, 8)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 8, 4), r"upsample_map: x \(2, 8, 4\) must be \[B, C, H, W\]"),
        (torch.ones(2, 8, 0, 4), "must be"),
        (torch.ones(2, 8, 4, 4), "x must be channels-last"),
        (torch.ones(2, 8, 4, 4, dtype=torch.int64), "x is torch.int64"),
    ],
)
def test_refuses_and_says_why(x, message, device):
    with pytest.raises(ValueError, match=message):
        upsample_map(x.to(device))
