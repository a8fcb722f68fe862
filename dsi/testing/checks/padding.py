"""Are masks honoured?"""

from __future__ import annotations

import torch

from dsi.testing.compare import check_same, tensors
from dsi.testing.inputs import Padding
from dsi.testing.report import Failed, Outcome, absent, passed
from dsi.testing.subject import Subject

_MEND = "use the attention mask as it is given: None is not 'all', and every position's output counts"


def left_padding(subject: Subject) -> Outcome:
    """All rows padded on the left."""
    return _padded(subject, "left", (1, 3))


def right_padding(subject: Subject) -> Outcome:
    """All rows padded on the right."""
    return _padded(subject, "right", (1, 3))


def ragged_padding(subject: Subject) -> Outcome:
    """Rows padded each in its own way: not at all, left, right, and with a hole."""
    return _padded(subject, "ragged", (4,))


def _padded(subject: Subject, padding: Padding, batches: tuple[int, ...]) -> Outcome:
    if not subject.reads.masks:
        return absent("the model reads no text")
    pair, worst = subject.twins(), 0.0
    for batch in batches:
        worst = max(
            worst,
            check_same(
                *subject.both(pair, subject.inputs(batch, 8, padding, seed=batch)),
                subject.tolerances.fp32,
                what=f"{padding} padding, {batch} rows",
                mend=_MEND,
            ),
        )
    return passed(f"{padding} padding equals stock", measured=worst, allowed=subject.tolerances.fp32)


def fully_masked_rows(subject: Subject) -> Outcome:
    """A row without a single token: what stock gives, and nothing that is not finite."""
    if not subject.reads.masks:
        return absent("the model reads no text")
    inputs = subject.inputs(3, 6)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1] = 0
    found, wanted = subject.both(subject.twins(), inputs)
    for name, tensor in tensors(found):
        if not bool(torch.isfinite(tensor).all()):
            raise Failed(
                "a row without a token",
                measured=f"{name} is not finite",
                allowed="finite",
                mend="attention of a row that may attend to nothing is 0, as torch's SDPA has it, not 0/0",
            )
    worst = check_same(found, wanted, subject.tolerances.fp32, what="a row without a token", mend=_MEND)
    return passed("a row without a token equals stock", measured=worst, allowed=subject.tolerances.fp32)
