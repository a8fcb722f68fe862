"""Convolutions of channels-last maps: every form computes what torch does and gives its weight back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from dsi.containers.conv import FusedConv, Window, channels_last, choose_conv_form

CASES = [
    # out, in, kernel, stride, padding
    (32, 16, 3, 1, 1),
    (48, 32, 3, 2, 1),
    (16, 16, 3, 2, 0),
    (64, 24, 1, 1, 0),
    # packed as a linear layer, and one that moves by two
    (128, 64, 1, 1, 0),
    (128, 64, 1, 2, 0),
    (17, 6, 3, 1, 1),
    (4, 32, 3, 1, 1),
    (16, 3, 3, 1, 1),
]


def made(case, dtype, *, bias=True):
    out, channels, kernel, stride, padding = case
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, channels, kernel, kernel, generator=generator).to(dtype)
    added = torch.randn(out, generator=generator).to(dtype) if bias else None
    window = Window(stride=(stride,) * 2, padding=(padding,) * 2, dilation=(1, 1), groups=1)
    conv = FusedConv(weight.clone(), None if added is None else added.clone(), "conv", window)
    x = torch.randn(3, channels, 9, 11, generator=generator).to(dtype)
    return conv, weight, added, x, window


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_form_is_torchs_convolution(case, dtype):
    conv, weight, bias, x, window = made(case, dtype)
    wanted = F.conv2d(x.double(), weight.double(), bias.double(), window.stride, window.padding)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype] * wanted.abs().max()
    forms = set()
    for _ in range(2):
        y = conv.forward(channels_last(x))
        assert (y - wanted).abs().max() <= tolerance
        assert y.is_contiguous(memory_format=torch.channels_last)
        without = conv.forward(channels_last(x), bias=False) + bias.view(1, -1, 1, 1)
        assert (without - wanted).abs().max() <= 2 * tolerance
        forms.add(conv.form)
        exported = conv.export()
        assert exported.keys() == {"conv.weight", "conv.bias"}
        assert torch.equal(exported["conv.weight"], weight)
        assert torch.equal(exported["conv.bias"], bias)
        conv.choose_form_()
    assert choose_conv_form(x.device, dtype, tuple(weight.shape), 1) == conv.form
    assert "channels_last" in forms


def test_a_packed_weight_is_the_only_one():
    conv, weight, *_ = made((32, 16, 3, 1, 1), torch.float32)
    conv.choose_form_()
    assert conv.form == "packed"
    assert torch.ops.mkldnn._nbytes(conv.weight) == weight.nbytes
    assert [tuple(parameter.shape) for parameter in conv.parameters()] == [(32,), (32, 16, 3, 3)]


def test_what_would_be_padded_is_not_packed():
    conv, *_ = made((17, 6, 3, 1, 1), torch.float32)
    conv.choose_form_()
    assert conv.form == "channels_last"
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_loads_copies_and_pickles():
    conv, _, _, x, _ = made((32, 16, 3, 1, 1), torch.float32)
    conv.choose_form_()
    x = channels_last(x)
    wanted = conv.forward(x)
    copies = [copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))]  # noqa: S301 - our own bytes
    conv.load({name: 2.0 * tensor for name, tensor in conv.export().items()})
    assert conv.form == "packed"
    torch.testing.assert_close(conv.forward(x), 2.0 * wanted)
    for one in copies:
        assert one.form == "packed"
        assert torch.equal(one.forward(x), wanted)
    moved = copies[0].to(torch.bfloat16)
    torch.testing.assert_close(moved.forward(x.bfloat16()).float(), wanted, atol=0.2, rtol=0.02)
