from __future__ import annotations

import pytest
import torch

from dsi_kernels import greedy_token, greedy_token_reference
from dsi_kernels.greedy_token import _advance_kernel
from tests.kernels.tolerance import DTYPES


def state(device, rows=3, T=6):
    made = {
        "tokens": torch.full((rows, 1), -7),
        "history": torch.zeros(rows, T, dtype=torch.int64),
        "positions": torch.arange(rows)[:, None] + 10,
        "counters": torch.tensor([20, 21, 2]),
    }
    return {name: t.to(device) for name, t in made.items()}


def both(logits, given, **ending):
    """The state after the kernel, checked against the state after the reference."""
    wanted = {name: t.clone() for name, t in {**given, **ending}.items()}
    greedy_token(logits, **given, **ending)
    greedy_token_reference(logits, **wanted)
    for name, t in wanted.items():
        assert torch.equal({**given, **ending}[name], t), name
    return given["tokens"][:, 0].tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "V"), [(1, 1), (1, 2049), (3, 67), (5, 6000), (64, 300), (65, 9000), (256, 40)], ids=str
)
def test_matches_reference(rows, V, dtype, device):
    given = state(device, rows)
    for _ in range(3):
        both(torch.randn(rows, V).to(device, dtype), given)


def test_the_first_of_equals(device):
    logits = torch.zeros(2, 5000, device=device)
    logits[0, [700, 4100]] = 3.0
    logits[1, [2047, 2048]] = 3.0
    assert both(logits, state(device, 2)) == [700, 2047]


def test_infinities_and_nan(device):
    logits = torch.full((3, 40), float("-inf"), device=device)
    logits[1, 9] = float("inf")
    logits[2, 5] = float("nan")
    assert both(logits, state(device)) == [0, 9, 5]


def test_rows_end_once_and_for_all(device):
    given = state(device)
    ending = {
        "finished": torch.tensor([False, True, False]).to(device),
        "ends": torch.tensor([4, 8]).to(device),
        "pad": torch.tensor(1).to(device),
    }
    logits = torch.zeros(3, 10, device=device)
    for row, token in enumerate((8, 3, 5)):
        logits[row, token] = 1.0
    assert both(logits, given, **ending) == [8, 1, 5]
    assert ending["finished"].tolist() == [True, True, False]
    assert both(logits, given, **ending) == [1, 1, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(257, 4)}, r"logits \(257, 4\) must be \[1 to 256, V\]"),
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, r"tokens \(3,\)"),
        ({"counters": torch.zeros(2, dtype=torch.int64)}, r"counters have shape \(2,\)"),
        ({"positions": torch.zeros(3, 1)}, "positions is torch.float32; int64"),
        ({"finished": torch.zeros(3, dtype=torch.bool)}, "comes with ends and pad"),
        ({"logits": torch.zeros(3, 4).double()}, "logits is torch.float64"),
    ],
)
def test_refuses_and_says_why(change, message, device):
    given = {"logits": torch.zeros(3, 4), **state(device), **change}
    with pytest.raises(ValueError, match=message):
        greedy_token(**{name: t.to(device) for name, t in given.items()})


@pytest.mark.parametrize("left", [-5, 1 << 30])
def test_what_was_never_computed_is_no_token(left, device):
    """Before all kernels are compiled, one may run on what another did not write; the next step looks its token up."""
    value, index = torch.zeros(2, 1, device=device), torch.full((2, 1), left, dtype=torch.int32, device=device)
    tokens, history = (
        torch.zeros(2, 1, dtype=torch.int64, device=device),
        torch.zeros(2, 4, dtype=torch.int64, device=device),
    )
    positions, counters = torch.zeros_like(tokens), torch.zeros(3, dtype=torch.int64, device=device)
    _advance_kernel[(1,)](
        value, index, tokens, history, positions, counters, None, None, None, None, 2, 1, 7, history.stride(0), 0,
        BLOCK_B=2, BLOCK_P=1, BLOCK_E=1, PDL=False,
    )  # fmt: skip
    assert ((tokens >= 0) & (tokens < 7)).all()
