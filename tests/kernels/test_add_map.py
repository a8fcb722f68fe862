from __future__ import annotations

import pytest
import torch

from dsi_kernels import add_map, add_map_reference
from tests.kernels.tolerance import DTYPES, HALVES, ULP, share_equal


def image(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape).to(device, dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divisor", [1.0, 1.5])
@pytest.mark.parametrize("added", ["bias", "residual", "bias residual"])
@pytest.mark.parametrize("shape", [(2, 64, 9, 8), (1, 30, 5, 7), (3, 3, 1, 1)], ids=str)
def test_matches_reference(shape, added, divisor, dtype, device):
    x = image(*shape, dtype=dtype, device=device)
    given = {"bias": torch.randn(shape[1]).to(device, dtype), "residual": image(*shape, dtype=dtype, device=device)}
    bias, residual = (given[name] if name in added.split() else None for name in ("bias", "residual"))
    before = x.clone()
    expected = add_map_reference(x, bias, residual, divisor)
    y = add_map(x, bias, residual, divisor)
    # a division on the device is off by a unit of fp32, and so at times by one of the dtype
    torch.testing.assert_close(y, expected, rtol=0 if divisor == 1.0 else ULP[dtype], atol=0)
    assert y.stride() == x.stride()
    assert torch.equal(x, before)
    assert add_map(x, bias, residual, divisor, out=x) is x
    assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_is_rounded_once(dtype, device):
    x, r = (image(2, 64, 8, 8, dtype=dtype, device=device) for _ in range(2))
    b = torch.randn(64).to(device, dtype)
    y = add_map(x, b, r)
    assert torch.equal(y, (x.float() + b.float()[:, None, None] + r.float()).to(dtype))
    assert share_equal(y, x + b[:, None, None] + r) < 0.9


def test_no_batch(device):
    assert add_map(image(0, 8, 4, 4, device=device), None).shape == (0, 8, 4, 4)


ONES = torch.ones(2, 32, 4, 4).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(2, 32)}, r"add_map: x \(2, 32\) must be \[B, C, pixels ...\]"),
        ({"x": torch.ones(2, 32, 4, 4)}, "x must be channels-last"),
        ({"residual": torch.ones(2, 32, 4, 4)}, "residual must be channels-last"),
        ({"residual": ONES[:1]}, r"residual \(1, 32, 4, 4\) must be"),
        ({"bias": torch.ones(16)}, r"bias \(16,\) must be"),
        ({"bias": torch.ones(32).half()}, "bias torch.float16"),
        ({"bias": torch.ones(32, device="meta")}, "bias meta"),
    ],
)
def test_refuses_and_says_why(changed, message, device):
    given = {"x": ONES, "bias": None, **changed}
    given = {k: v.to(device) if isinstance(v, torch.Tensor) and not v.is_meta else v for k, v in given.items()}
    with pytest.raises(ValueError, match=message):
        add_map(**given)
