"""Are hidden states and attentions recorded as stock records them?"""

from __future__ import annotations

import copy
from typing import Any

from dsi.testing.compare import check_same, distance, forward, tensors
from dsi.testing.report import Failed, Outcome, absent, passed
from dsi.testing.subject import Subject

_NOTHING = "models of maps record nothing"


def hidden_states(subject: Subject) -> Outcome:
    """`output_hidden_states=True`: all of them, of every layer, also where they were asked for before the injection."""
    if subject.of_maps:
        return absent(_NOTHING)
    inputs, worst = subject.inputs(2, 6), 0.0
    early = subject.fresh()
    # transformers puts its recorders on the layers at the first request, and never again
    forward(early, inputs, output_hidden_states=True)
    subject.inject(early)
    pair = subject.twins()
    for when, model in (("", pair.model), (", first asked for before the injection", early)):
        worst = max(
            worst,
            check_same(
                forward(model, inputs, output_hidden_states=True),
                forward(pair.stock, inputs, output_hidden_states=True),
                subject.tolerances.fp32,
                what=f"output_hidden_states=True{when}",
                mend="a container is an instance of the stock layer's class, shares its hook tables, returns what "
                "stock returns and does not write over its input",
            ),
        )
    return passed("hidden states equal stock's", measured=worst, allowed=subject.tolerances.fp32)


def attentions(subject: Subject) -> Outcome:
    """Attention weights of every layer of an eager model, asked for in a call and by the config.

    The calls after them are fused again.
    """
    if subject.of_maps:
        return absent(_NOTHING)
    try:
        pair, inputs = subject.twins(attention="eager"), subject.inputs(2, 6, "ragged")
    except Failed:
        return absent("the policy leaves eager models alone, and no others record attentions")
    found, wanted = subject.both(pair, inputs, output_attentions=True)
    if not any("attentions" in name for name, _ in tensors(wanted)):
        return absent("the stock model records no attentions")
    worst = _check_attentions(subject, found, wanted, "output_attentions=True")
    before = pair.calls()[1]
    again, _ = distance(*subject.both(pair, inputs))
    if pair.calls()[1] != before or not again <= subject.tolerances.fp32:
        raise Failed(
            "the call after output_attentions=True",
            measured=f"{pair.calls()[1] - before} stock calls, distance {again:.2g}",
            allowed=f"0 stock calls, {subject.tolerances.fp32}",
            mend="what is put back for a call is taken out again after it",
        )
    always = subject.fresh(attention="eager")
    always.config.output_attentions = True
    stock = copy.deepcopy(always)
    subject.inject(always)
    found, wanted = forward(always, inputs), forward(stock, inputs)
    worst = max(worst, _check_attentions(subject, found, wanted, "config.output_attentions=True"))
    return passed("attentions equal stock's", measured=worst, allowed=subject.tolerances.fp32)


def _check_attentions(subject: Subject, found: Any, wanted: Any, what: str) -> float:
    mend = "where attentions are wanted, by an argument or by a recorder, a container runs the stock layer"
    return check_same(found, wanted, subject.tolerances.fp32, what=what, mend=mend)
