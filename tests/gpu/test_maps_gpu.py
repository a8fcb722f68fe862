"""Kernels of image layers on the device: maps past 2**31 elements, and the same bits at every call and replay."""

from __future__ import annotations

import pytest
import torch

import dsi_kernels as dk
from dsi_kernels._pdl import dependent_launches

pytestmark = pytest.mark.gpu


def image(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last)


def test_maps_past_two_to_the_31_elements():
    """The last of the batch, whose elements 32 bits do not count, is the first one's equal."""
    one = image(1, 512, 1200, 1200)
    x = one.expand(3, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    assert x.numel() > 2**31
    bias = torch.randn(512, device="cuda", dtype=torch.float16)
    y, _ = dk.group_norm(x, bias, bias, 32, silu=True)
    assert torch.equal(y[2], dk.group_norm(one, bias, bias, 32, silu=True)[0][0])
    assert torch.equal(dk.add_map(x, bias, x, out=y)[2], dk.add_map(one, bias, one)[0])
    del x, y
    quarter = one[:, :, :600, :600].contiguous(memory_format=torch.channels_last)
    wide = dk.upsample_map(quarter.expand(3, -1, -1, -1).contiguous(memory_format=torch.channels_last))
    assert wide.numel() > 2**31
    assert torch.equal(wide[2], dk.upsample_map(quarter)[0])


@pytest.mark.parametrize(("channels", "side"), [(1280, 8), (640, 32), (320, 64), (128, 512)])
def test_kernels_that_begin_early_give_the_same_bits(channels, side):
    x, residual = image(2, channels, side, side), image(2, channels, side, side)
    weight, bias = torch.randn(2, channels, device="cuda", dtype=torch.float16)
    time = torch.randn(2, channels, device="cuda", dtype=torch.float16)

    def block():
        y, _ = dk.group_norm(x, weight, bias, 32, x_bias=bias, addend=time, silu=True)
        total, moments = dk.summed_map(y, 32, bias, None, residual)
        return dk.group_norm(total, weight, bias, 32, silu=True, moments=moments)[0]

    expected = block()
    graph = torch.cuda.CUDAGraph()
    with dependent_launches(True):
        block()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            found = block()
    for _ in range(20):
        graph.replay()
        assert torch.equal(found, expected)
