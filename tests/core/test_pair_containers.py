"""Containers of layers that change two sequences: what they give, what is refused, what None is asked for."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn

import dsi
from dsi.containers import MapCall, PairContainer
from dsi.policy import ABSENT, Block, Call, Linear, Policy

HERE = f"{__name__}:"


class Gate(nn.Module):
    """Something that a layer may have."""

    kind = "plain"


class Layer(nn.Module):
    """Each sequence through a product of its own."""

    def __init__(self, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.own, self.other, self.gate = nn.Linear(4, 4), nn.Linear(4, 4), gate

    def forward(self, hidden: Tensor, context: Tensor, more: object = None) -> tuple[Tensor, Tensor]:
        return self.other(context), self.own(hidden)


class Pair(PairContainer):
    """The same."""

    SLOTS = MappingProxyType({"own": True, "other": True})

    def run(self, call: MapCall) -> tuple[Tensor | None, Tensor]:
        return self.other(call.inputs["context"]), self.own(call.hidden)


class NoPair(Pair):
    """Half of it."""

    def run(self, call: MapCall) -> Tensor:
        return self.own(call.hidden)


class WrongContext(Pair):
    """A context that has lost a position."""

    def run(self, call: MapCall) -> tuple[Tensor | None, Tensor]:
        context, hidden = super().run(call)
        return context[:, 1:], hidden


class WrongHidden(Pair):
    """Hidden states that have lost one."""

    def run(self, call: MapCall) -> tuple[Tensor | None, Tensor]:
        context, hidden = super().run(call)
        return context, hidden[:, 1:]


class Model(nn.Module):
    """A layer in something."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, context: Tensor, **more: object) -> tuple[Tensor, Tensor]:
        return self.layer(hidden, context, **more)


def policy(container: str = "Pair", returns: str = "pair", **more: object) -> Policy:
    block = Block(
        layer=HERE + "Layer",
        container=HERE + container,
        slots={"own": Linear("own"), "other": Linear("other")},
        call=Call(inputs={"context": "context"}, returns=returns),
        **more,
    )
    return Policy(name="pair", blocks=[block])


def model(gate: nn.Module | None = None) -> Model:
    torch.manual_seed(0)
    return Model(Layer(gate)).eval()


def given(context_rows: int = 2) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 4, generator=drawn), torch.randn(context_rows, 3, 4, generator=drawn)


def test_both_sequences_come_back_in_stocks_order():
    one = model()
    wanted = one(*given())
    dsi.init_inference(one, injection_policy=policy())
    for found, expected in zip(one(*given()), wanted, strict=True):
        torch.testing.assert_close(found, expected)
    assert (one.layer.fused_calls, one.layer.stock_calls) == (1, 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda one: one(*given(), more=1),
        # rows that do not go together
        lambda one: one(*given(1)),
        lambda one: one(given()[0], given()[1][:, :0]),
    ],
)
def test_calls_that_are_stocks_affair(call):
    one = model()
    dsi.init_inference(one, injection_policy=policy())
    call(one)
    assert (one.layer.fused_calls, one.layer.stock_calls) == (0, 1)


@pytest.mark.parametrize(
    ("container", "said"),
    [
        ("NoPair", r"NoPair gave \[2, 5, 4\] for"),
        ("WrongContext", r"WrongContext gave \[2, 2, 4\] for \[2, 3, 4\]"),
        ("WrongHidden", r"WrongHidden gave \[2, 4, 4\] for \[2, 5, 4\]"),
    ],
)
def test_what_stock_would_not_give_is_an_error(container, said):
    one = model()
    dsi.init_inference(one, injection_policy=policy(container))
    with pytest.raises(dsi.PolicyError, match=said):
        one(*given())


def test_a_policy_says_that_a_pair_is_returned():
    with pytest.raises(dsi.PolicyError, match=r'Pair needs Call\(returns="pair"\)'):
        dsi.plan(model(), injection_policy=policy(returns="tensor"))


@pytest.mark.parametrize("stock", [False, True])
def test_both_refuse_gradients(stock):
    one = model()
    dsi.init_inference(one, injection_policy=policy())
    hidden, context = given()
    pair = one(hidden.requires_grad_(), context, **({"more": 1} if stock else {}))
    for half in pair:
        with pytest.raises(dsi.UnsupportedModelError, match="no gradients"):
            half.sum().backward()


# --- what is None has no attributes to ask for ----------------------------------------------------------------------

PLAIN = {"gate.kind": "plain"}


@pytest.mark.parametrize(("gate", "fits"), [(None, True), (Gate(), True)])
def test_attributes_of_none_are_not_asked_for(gate, fits):
    assert bool(dsi.plan(model(gate), injection_policy=policy(neutral=PLAIN)).blocks) is fits


def test_attributes_of_what_is_there_are():
    gate = Gate()
    gate.kind = "other"
    plan = dsi.plan(model(gate), injection_policy=policy(neutral=PLAIN))
    assert not plan.blocks
    assert "gate.kind is 'other'" in plan.why_nothing


@pytest.mark.parametrize("neutral", [{"gate": ABSENT}, {"gate.__class__.__name__": "Gate"}, {"door.kind": "plain"}])
def test_none_itself_is_asked_for(neutral):
    assert not dsi.plan(model(), injection_policy=policy(neutral=neutral)).blocks


def test_what_comes_in_the_place_of_none_is_asked():
    one = model()
    dsi.init_inference(one, injection_policy=policy(neutral=PLAIN))
    one(*given())
    one.layer.original.gate = Gate()
    one(*given())
    assert (one.layer.fused_calls, one.layer.stock_calls) == (2, 0)
    one.layer.original.gate.kind = "other"
    one(*given())
    assert (one.layer.fused_calls, one.layer.stock_calls) == (2, 1)
