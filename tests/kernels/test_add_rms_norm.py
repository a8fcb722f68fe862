from __future__ import annotations

import pytest
import torch

from dsi_kernels import add_rms_norm, add_rms_norm_reference
from tests.kernels.tolerance import DTYPES, HALVES, assert_close, share_equal


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# at 1e-3, eps is as large as the mean square
@pytest.mark.parametrize("scale", [1.0, 1e-3], ids="scale{}".format)
@pytest.mark.parametrize("shape", [(1, 64), (3, 100), (2, 5, 129), (1, 1, 4096)], ids=str)
def test_matches_reference(shape, scale, dtype, device):
    x, r = (torch.randn(2, *shape) * scale).to(device, dtype)
    w = torch.randn(shape[-1]).to(device, dtype)
    before = x.clone(), r.clone()
    y, r2 = add_rms_norm(x, r, w, 1e-6)
    ref_y, ref_r = add_rms_norm_reference(x, r, w, 1e-6)
    assert torch.equal(r2, ref_r)
    assert_close(y, ref_y)
    assert torch.equal(x, before[0])
    assert torch.equal(r, before[1])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_casts_twice_before_the_weight_multiply(dtype, device):
    """The sum is rounded before it is normalised, the row before it meets the weight; within a unit, so count bits."""
    x, r = torch.randn(2, 32, 1024).to(device, dtype)
    w = torch.randn(1024).to(device, dtype)
    y, _ = add_rms_norm(x, r, w, 1e-6)
    ref, ref_r = add_rms_norm_reference(x, r, w, 1e-6)
    one_rounding = (torch.nn.functional.rms_norm(ref_r.float(), (1024,), None, 1e-6) * w.float()).to(dtype)
    exact_sum = w * torch.nn.functional.rms_norm(x.float() + r.float(), (1024,), None, 1e-6).to(dtype)
    assert share_equal(y, ref) > 0.99
    assert share_equal(one_rounding, ref) < 0.9
    assert share_equal(exact_sum, ref) < 0.9


@pytest.mark.parametrize("wrong_residual", [False, True], ids=["eps outside the root", "residual without x"])
def test_a_wrong_rival_does_not_pass(wrong_residual, device):
    x, r = torch.randn(2, 3, 100, device=device)
    w = torch.randn(100, device=device)
    y, _ = add_rms_norm(x, r, w, 1e-2)
    h = r if wrong_residual else x + r
    outside = 0.0 if wrong_residual else 1e-2
    rival = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-2 - outside) / (1 + outside) * w
    with pytest.raises(AssertionError):
        assert_close(y, rival)


def test_no_rows(device):
    empty = torch.ones(0, 64, device=device)
    y, r = add_rms_norm(empty, empty, torch.ones(64, device=device))
    assert y.shape == r.shape == (0, 64)


@pytest.mark.parametrize(
    ("x", "r", "w", "message"),
    [
        (torch.ones(2, 64), torch.ones(2, 64), torch.ones(32), r"add_rms_norm: .* and weight \(32,\) must be"),
        (torch.ones(2, 64), torch.ones(1, 64), torch.ones(64), r"residual \(1, 64\)"),
        (torch.ones(2, 64), torch.ones(2, 64), torch.ones(64).half(), "weight torch.float16"),
        (torch.ones(2, 64), torch.ones(2, 64).half(), torch.ones(64), "residual torch.float16"),
        (torch.ones(2, 64), torch.ones(2, 64, device="meta"), torch.ones(64), "devices differ: .* residual meta"),
        (torch.ones(64, 2).t(), torch.ones(2, 64), torch.ones(64), "x must be contiguous"),
        (torch.ones(2, 64), torch.ones(64, 2).t(), torch.ones(64), "residual must be contiguous"),
        (torch.ones(1, 20000), torch.ones(1, 20000), torch.ones(20000), "20000 x torch.float32 exceeds"),
    ],
)
def test_refuses_and_says_why(x, r, w, message, device):
    x, r, w = (t if t.is_meta else t.to(device) for t in (x, r, w))
    with pytest.raises(ValueError, match=message):
        add_rms_norm(x, r, w)
