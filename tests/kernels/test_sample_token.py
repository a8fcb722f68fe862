from __future__ import annotations

import sys

import pytest
import torch

from dsi_kernels import sample_token, sample_token_reference, sampling_settings
from tests.kernels.tolerance import DTYPES

# a row of three programs
WIDE = 2500


def state(device, rows=3, T=6):
    made = {
        "tokens": torch.full((rows, 1), -7),
        "history": torch.zeros(rows, T, dtype=torch.int64),
        "positions": torch.arange(rows)[:, None] + 10,
        "counters": torch.tensor([20, 21, 2]),
        "invalid": torch.zeros(1, dtype=torch.bool),
    }
    return {name: t.to(device) for name, t in made.items()}


def both(logits, noise, settings, given=None, **more):
    """The tokens that the kernels chose, their state checked against the state after the reference."""
    given = {**(given or state(logits.device, logits.shape[0])), **more}
    settings = torch.tensor(sampling_settings(**settings)).to(logits.device)
    wanted = {name: t.clone() for name, t in given.items()}
    sample_token(logits, noise, settings, **given)
    sample_token_reference(logits, noise, settings, **wanted)
    for name, t in wanted.items():
        assert torch.equal(given[name], t), name
    return given["tokens"][:, 0].tolist()


def drawn(rows, V, device):
    return torch.empty(rows, V).exponential_().to(device)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"top_p": 0.0},
        {"min_p": 0.3},
        {"temperature": 1.4, "top_k": 50, "top_p": 0.8, "min_p": 0.02},
    ],
    ids=str,
)
@pytest.mark.parametrize(("rows", "V"), [(1, 1), (3, 67), (2, WIDE)], ids=str)
def test_matches_reference(rows, V, settings, device):
    torch.manual_seed(V)
    for dtype in DTYPES:
        both((4 * torch.randn(rows, V)).to(device, dtype), drawn(rows, V, device), settings)


@pytest.mark.parametrize("settings", [{"top_k": 300}, {"top_p": 0.95}, {"top_k": 2000, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_borders_of_flat_rows(settings, dtype, device):
    torch.manual_seed(1)
    both((0.5 * torch.randn(2, WIDE)).to(device, dtype), drawn(2, WIDE, device), settings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_token_that_stays_can_be_drawn_and_no_other(dtype, device):
    """Both signs, both zeros, equals on the borders of k and of p, and what cannot be drawn at all."""
    torch.manual_seed(2)
    x = torch.tensor([2.5] * 3 + [1.0] * 3 + [-0.0] * 4 + [0.0] * 4 + [1e-3, -1e-3, -1.0, -40.0, float("-inf")] * 4)
    logits = x[torch.randperm(len(x))][None].to(device, dtype)
    for settings in ({"top_k": 12}, {"top_p": 0.8}, {"top_k": 24, "top_p": 0.83}, {"top_k": 30, "min_p": 0.3}):
        for value in (0.0, -0.0, 1e-3, 1.0):
            same = (logits[0] == torch.tensor(value, dtype=dtype)) & (logits[0].signbit() == (str(value)[0] == "-"))
            token = int(same.nonzero()[0])
            noise = torch.ones(1, len(x), device=device)
            noise[0, token] = 1e-30
            both(logits, noise, settings)


def test_programs_of_many_tokens(device, monkeypatch):
    # the package's function has the module's name
    monkeypatch.setattr(sys.modules["dsi_kernels.sample_token"], "PROGRAMS", 2)
    torch.manual_seed(3)
    logits = torch.randn(5, 900).to(device, torch.bfloat16)
    both(logits, drawn(5, 900, device), {"top_k": 40, "top_p": 0.8})


@pytest.mark.parametrize("V", [67, WIDE])
def test_equals_on_the_border_of_k_all_stay(V, device):
    logits = torch.full((1, V), -5.0)
    equal = [3, 20, 41, 66]
    logits[0, equal] = 2.0
    for token in equal:
        noise = torch.ones(1, V)
        noise[0, token] = 0.5
        assert both(logits.to(device), noise.to(device), {"top_k": 2}) == [token]


@pytest.mark.parametrize(("V", "rest"), [(67, -50.0), (WIDE, -50.0), (WIDE, 1.0)])
def test_of_equals_on_the_border_of_p_the_last_stay(V, rest, device):
    """`rest`: what all other tokens have; as much as these ten, they reach over all programs."""
    logits = torch.full((1, V), rest)
    logits[0, 1:11] = 1.0
    share = {"top_p": 0.35}
    count = V if rest == 1.0 else 10
    last = V - 1 if rest == 1.0 else 10
    stay = -(-35 * count // 100)
    for token, chosen in ((last, last), (last - stay + 1, last - stay + 1), (last - stay - 3, last)):
        noise = torch.ones(1, V)
        noise[0, last] = 0.9
        noise[0, token] = 0.5
        assert both(logits.to(device), noise.to(device), share) == [chosen]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_penalty_for_what_was_seen(dtype, device):
    logits = torch.zeros(2, 70, device=device, dtype=dtype)
    logits[0, [5, 6]] = torch.tensor([3.0, 2.5], device=device, dtype=dtype)
    logits[1] = torch.arange(70).to(device) - 90.0
    seen = torch.zeros(2, 70, dtype=torch.int8)
    seen[0, 5] = seen[1, 69] = 1
    given = {**state(device, 2), "seen": seen.to(device)}
    greedy = {"penalty": 1.5, "top_k": 1}
    assert both(logits, None, greedy, given) == [6, 68]
    # and for what was chosen since
    assert both(logits, None, greedy, given) == [5, 67]


def test_rows_end_once_and_for_all(device):
    ending = {
        "finished": torch.tensor([False, True, False]).to(device),
        "ends": torch.tensor([4, 8]).to(device),
        "pad": torch.tensor(1).to(device),
    }
    logits = torch.full((3, 10), -9.0, device=device)
    for row, token in enumerate((8, 3, 5)):
        logits[row, token] = 9.0
    given = state(device)
    assert both(logits, torch.ones(3, 10, device=device), {}, given, **ending) == [8, 1, 5]
    assert ending["finished"].tolist() == [True, True, False]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_distribution_is_told(bad, device):
    logits = torch.zeros(2, 70, device=device)
    given, settings = state(device, 2), torch.tensor(sampling_settings()).to(device)
    sample_token(logits, drawn(2, 70, device), settings, **given)
    assert not given["invalid"]
    logits[1, 9] = bad
    sample_token(logits, drawn(2, 70, device), settings, **given)
    assert given["invalid"]


def test_draws_what_multinomial_draws(device):
    logits = torch.randn(4, 70).to(device)
    torch.manual_seed(5)
    wanted = torch.multinomial(logits.softmax(-1), 1)[:, 0].tolist()
    torch.manual_seed(5)
    assert both(logits, torch.empty_like(logits).exponential_(), {}) == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, (1 << 18) + 1)}, "V up to 262144"),
        ({"noise": torch.zeros(2, 4)}, r"noise \(2, 4\) must be float32"),
        ({"settings": torch.zeros(5)}, r"settings \(5,\) must be float32 \[6\]"),
        ({"seen": torch.zeros(2, 70)}, "must be int8"),
        ({"invalid": torch.zeros(2, dtype=torch.bool)}, "must be bool"),
        ({"finished": torch.zeros(2, dtype=torch.bool)}, "comes with ends and pad"),
        ({"tokens": torch.zeros(2, dtype=torch.int64)}, r"sample_token: tokens \(2,\)"),
    ],
)
def test_refuses_and_says_why(change, message, device):
    given = {
        "logits": torch.zeros(2, 70),
        "noise": torch.ones(2, 70),
        "settings": torch.tensor(sampling_settings()),
        **state(device, 2),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        sample_token(**{name: t.to(device) for name, t in given.items()})
