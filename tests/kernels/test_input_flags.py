from __future__ import annotations

import pytest
import torch

from dsi_kernels import input_flags, input_flags_reference
from dsi_kernels.input_flags import BLOCK, COUNT_AT, NUMBER_AT, NUMBER_BITS


def both(device, ids=None, mask=None, number=4, vocab=50):
    """(number, visible, hidden, bad) and the safe ids, by the kernel, which must agree with the reference."""
    found = []
    for function in (input_flags, input_flags_reference):
        given = None if ids is None else ids.to(device)
        safe = None if ids is None else torch.full_like(given, -7)
        counter, word = torch.tensor([number], device=device), torch.zeros(1, dtype=torch.int64, device=device)
        function(given, safe, None if mask is None else mask.to(device), counter, word, vocab)
        found.append((int(word), int(counter), safe))
    (word, counter, safe), (wanted, *_, safe_too) = found
    assert word == wanted
    assert counter == number + 1
    assert safe is None or torch.equal(safe, safe_too)
    visible = (word >> COUNT_AT) & (2 ** (NUMBER_AT - COUNT_AT) - 1)
    return (word >> NUMBER_AT, visible, word >> 1 & 1, word & 1), safe


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("bad", [None, -1, 50, 2**31 - 1])
@pytest.mark.parametrize("at", [0, 5, BLOCK + 3])
def test_ids(dtype, bad, at, device):
    ids = torch.randint(0, 50, (3, BLOCK // 2), dtype=dtype)
    ids[0, 0], ids[0, 1] = 0, 49
    if bad is not None:
        ids.view(-1)[at] = bad
    (number, visible, hidden, wrong), safe = both(device, ids)
    assert (number, visible, hidden, wrong) == (5, 0, 0, int(bad is not None))
    assert torch.equal(safe.cpu(), ids.clamp(0, 49))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (4, BLOCK - 1)], ids=str)
def test_mask(dtype, shape, device):
    mask = torch.ones(shape, dtype=dtype)
    assert both(device, mask=mask)[0] == (5, mask.numel(), 0, 0)
    if shape[1] > 1:
        mask[-1, 1:] = 0
        assert both(device, mask=mask)[0] == (5, mask.numel() - shape[1] + 1, 0, 0)
    mask[-1, 0] = 0
    assert both(device, mask=mask)[0][2] == 1


def test_the_number_begins_anew(device):
    ids = torch.full((1, 2), 99)
    assert both(device, ids, torch.ones(1, 2), number=2**NUMBER_BITS - 1)[0] == (0, 2, 0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"safe": None}, "must be of one shape"),
        ({"ids": torch.zeros(2, 3), "safe": torch.zeros(2, 3)}, "ids is torch.float32; int64 or int32"),
        ({"mask": torch.ones(2)}, r"mask \(2,\) must be \[B, S\]"),
        ({"word": torch.zeros(1)}, "word is torch.float32 of 1; one int64"),
        ({"mask": torch.ones(3, 2).T}, "mask must be contiguous"),
    ],
)
def test_refuses_and_says_why(change, message, device):
    ids = torch.zeros(2, 3, dtype=torch.int64)
    one = torch.zeros(1, dtype=torch.int64)
    given = {"ids": ids, "safe": ids.clone(), "mask": None, "number": one, "word": one.clone(), **change}
    with pytest.raises(ValueError, match=message):
        input_flags(**{name: None if t is None else t.to(device) for name, t in given.items()}, vocab=5)
