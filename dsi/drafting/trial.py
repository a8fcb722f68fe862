"""A candidate policy against the stock model: how far its containers are from the layers they stand for."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch

from dsi.api import init_inference
from dsi.containers.base import Container
from dsi.drafting.specimen import Specimen
from dsi.errors import DsiError
from dsi.policy import Policy
from dsi.runtime.session import session_of
from dsi.testing.compare import distance, forward

ALLOWED = 1e-5
"""Largest difference of outputs in fp32, as a share of the largest value."""

_FIELDS = ("last_hidden_state", "logits")
_BATCH, _LENGTH, _NEW = 3, 11, 9


@attrs.frozen(kw_only=True)
class Verdict:
    """What became of a candidate.

    Args:
        distance: the worst difference; infinite where the candidate does not apply.
        where: of the worst difference.
        refused: dsi would leave the layers alone, for this reason: right, if not fast.
        fault: why the candidate does not apply.
        right: the numbers are stock's, be it that containers hand calls back to the stock layers.
    """

    distance: float
    where: str = ""
    refused: str = ""
    fault: str = ""
    right: bool = False

    @property
    def equal(self) -> bool:
        """The containers compute what the layers do."""
        return self.distance <= ALLOWED

    def __str__(self) -> str:
        return self.fault or self.refused or f"{self.distance:.1e} at {self.where}"


def try_policy(policy: Policy, specimen: Specimen, *, generate: bool = False) -> Verdict:
    """Put a candidate's containers into a copy of the model and compare: plain, padded, over a cache, generating.

    Args:
        policy: the candidate; no other policy is asked.
        specimen: the stock model.
        generate: compare greedy search too, which must run in dsi's loop.
    """
    model = specimen.copy()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine = init_inference(model, injection_policy=policy)
    except DsiError as error:
        return Verdict(distance=math.inf, fault=f"{type(error).__name__}: {error.message}")
    left = [one.reason.text for one in engine.plan.left if one.reason.code != "no_policy"]
    if left or not engine.plan.blocks:
        return Verdict(distance=math.inf, refused=left[0] if left else engine.plan.why_nothing)
    try:
        found = _compared(specimen, model)
        if not found.right or not generate:
            return found
        return _generates(specimen, model) or found
    # whatever a container raises over weights and arguments it was not made for
    except Exception as error:  # noqa: BLE001
        return Verdict(distance=math.inf, fault=f"raised {type(error).__name__}: {' '.join(str(error).split())[:160]}")


def _compared(specimen: Specimen, model: Any) -> Verdict:
    worst, where = 0.0, ""
    for name, run in _runs(specimen):
        try:
            theirs = run(specimen.model)
        # what transformers' own layers do not run says nothing
        except Exception:  # noqa: BLE001
            continue
        apart = distance(run(model), theirs)[0]
        if apart > worst or not where:
            worst, where = apart, name
    right = worst <= ALLOWED and bool(where)
    if any(isinstance(one, Container) and one.stock_calls for one in model.modules()):
        back = "the container hands calls back to the stock layer: an argument it has no word for"
        return Verdict(distance=math.inf, fault=back, right=right)
    return Verdict(distance=worst if where else math.inf, where=where, right=right)


def _runs(specimen: Specimen) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """(what is run, how) of everything that is compared."""
    reads = specimen.reads

    def whole(padding: Any, **more: Any) -> Callable[[Any], Any]:
        inputs = reads.inputs(_BATCH, _LENGTH, padding)
        return lambda model: _kept(forward(model, inputs, **more), inputs)

    yield "a plain input", whole("none")
    if reads.masks:
        yield "padding on the left", whole("left")
        yield "ragged padding", whole("ragged")
    if "use_cache" in inspect.signature(specimen.model.forward).parameters:
        yield "a text without a cache", whole("none", use_cache=False)
    if specimen.decodes:
        yield "a decode step", lambda model: _decoded(model, specimen)


def _kept(output: Any, inputs: Any) -> dict[str, torch.Tensor]:
    """What is compared of an output; of positions that a mask shuts out nothing is."""
    found = {name: output[name] for name in output if name in _FIELDS}
    found = found or {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
    mask = inputs.get("attention_mask")
    if mask is None:
        return found
    return {k: v[mask.bool()] if v.shape[:2] == mask.shape else v for k, v in found.items()}


@torch.no_grad()
def _decoded(model: Any, specimen: Specimen) -> list[torch.Tensor]:
    """Logits of a left padded text, then of two more tokens one by one."""
    inputs = copy.deepcopy(dict(specimen.reads.inputs(2, _LENGTH, "left")))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cut = _LENGTH - 2
    output = model(input_ids=ids[:, :cut], attention_mask=mask[:, :cut], use_cache=True)
    found = []
    for end in (cut + 1, cut + 2):
        # positions as generate counts them
        more = {"past_key_values": output.past_key_values, "attention_mask": mask[:, :end]}
        output = model(input_ids=ids[:, end - 1 : end], use_cache=True, **more)
        found.append(output.logits)
    return found


@torch.no_grad()
def _generates(specimen: Specimen, model: Any) -> Verdict | None:
    """Why greedy search is not that of stock, by dsi's own loop."""
    ids = specimen.reads.inputs(2, 5, "left")
    options = {"max_new_tokens": _NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    try:
        theirs = specimen.model.generate(**copy.deepcopy(ids), **options)
    # a variant that transformers' own loop does not run says nothing
    except Exception:  # noqa: BLE001
        return None
    ours = model.generate(**copy.deepcopy(ids), **options)
    route = session_of(model).last_route
    reason = "it was not asked" if route is None else route.reason
    if not torch.equal(ours.sequences, theirs.sequences):
        return Verdict(distance=math.inf, where="greedy search: other tokens")
    if route is None or not route.fast:
        right = distance(list(ours.logits), list(theirs.logits))[0] <= ALLOWED
        return Verdict(distance=math.inf, fault=f"greedy search runs transformers' loop: {reason}", right=right)
    apart, where = distance(list(ours.logits), list(theirs.logits))
    return None if apart <= ALLOWED else Verdict(distance=apart, where=f"greedy search, {where}")
