"""A stock model and its injected copy, and what the two give for the same call."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import dsi
from dsi.runtime.decode import Step
from tests.support.models import inputs_for, tiny


@attrs.frozen
class Pair:
    """Two models of the same weights, one of which never met dsi."""

    family: str
    stock: PreTrainedModel
    fused: PreTrainedModel

    @property
    def route(self) -> Any:
        return self.fused._dsi.last_route

    def inputs(self, batch: int = 2, seq: int = 8, pad: str | None = None, seed: int = 0) -> dict[str, Tensor]:
        return inputs_for(self.family, batch, seq, pad, seed=seed)


def make_pair(family: str, **overrides: Any) -> Pair:
    """Fresh models, for a test that changes them."""
    stock = tiny(family, **overrides)
    fused = copy.deepcopy(stock)
    dsi.init_inference(fused)
    return Pair(family, stock, fused)


@functools.cache
def shared_pair(family: str) -> Pair:
    """The same models for every test that leaves them as they are."""
    return make_pair(family)


def outcome(model: PreTrainedModel, seed: int = 0, **kwargs: Any) -> Any:
    """What `model.generate` returns from a given random state."""
    torch.manual_seed(seed)
    return model.generate(**kwargs)


def assert_same(stock: Any, fused: Any) -> None:
    """The same tokens, and scores, logits and states that are the same up to rounding."""
    if isinstance(stock, Tensor):
        assert stock.tolist() == fused.tolist()
        return
    assert type(stock) is type(fused)
    assert stock.keys() == fused.keys()
    assert stock.sequences.tolist() == fused.sequences.tolist()
    for key in stock.keys() - {"sequences", "past_key_values"}:
        _assert_close(stock[key], fused[key])


def _assert_close(stock: Any, fused: Any) -> None:
    if isinstance(stock, tuple):
        assert len(stock) == len(fused)
        for one, other in zip(stock, fused, strict=True):
            _assert_close(one, other)
    elif isinstance(stock, Tensor):
        assert stock.dtype == fused.dtype
        # what is promised of fp32: 1e-5 of the largest logit; processors push some to -inf
        finite = stock.isfinite()
        assert torch.equal(fused.isfinite(), finite)
        largest = float(stock[finite].abs().max()) if finite.any() else 0.0
        torch.testing.assert_close(fused, stock, rtol=0, atol=1e-5 * largest)
    else:
        assert stock == fused


def check(pair: Pair, *, fast: bool = True, seed: int = 0, **kwargs: Any) -> Any:
    """What the injected model gives, which is what stock gives; dsi's loop ran iff `fast`.

    Where dsi's loop runs the logits are compared too: tokens alone forgive much.
    """
    bare = fast and "return_dict_in_generate" not in kwargs
    wanted = {"return_dict_in_generate": True, "output_logits": True} if bare else {}
    expected = outcome(pair.stock, seed, **copy.deepcopy(kwargs), **wanted)
    with counted_steps() as steps:
        given = outcome(pair.fused, seed, **kwargs, **wanted)
    assert pair.route.fast is fast, pair.route.reason
    assert bool(steps) is fast
    assert_same(expected, given)
    return given.sequences if bare else given


@contextmanager
def counted_steps() -> Iterator[list[int]]:
    """The rows of every decode step that dsi's loop takes inside."""
    steps: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        original = Step.__call__

        def counted(self: Step, token_ids: Tensor, *args: Any) -> Tensor:
            steps.append(token_ids.shape[0])
            return original(self, token_ids, *args)

        patch.setattr(Step, "__call__", counted)
        yield steps
