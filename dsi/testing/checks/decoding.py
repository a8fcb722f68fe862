"""Is text generated as the stock model generates it: caches, chunks, windows, greedy search and beams?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsi.testing.compare import check_same, forward
from dsi.testing.report import Failed, Outcome, absent, passed
from dsi.testing.subject import Subject

NEW_TOKENS = 8
_NO_TEXT = "the model generates no text"
_CACHE = (
    "keys are rotated before they are cached, the cache is read after it is updated, and layer_idx is the layer's own"
)


@torch.no_grad()
def stepped(model: Any, ids: Tensor, cuts: Sequence[int], mask: Tensor | None = None) -> Tensor:
    """Logits of all positions, computed piece by piece over the model's own cache.

    Args:
        model: a language model.
        ids: int64 [B, S].
        cuts: where the pieces end; the last is S.
        mask: int64 [B, S], or None.
    """
    cache, pieces = None, []
    for start, end in itertools.pairwise((0, *cuts)):
        kwargs = {} if mask is None else {"attention_mask": mask[:, :end]}
        output = model(ids[:, start:end].clone(), past_key_values=cache, use_cache=True, **kwargs)
        cache = output.past_key_values
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


def decode_equals_full(subject: Subject) -> Outcome:
    """Token by token over a cache gives the logits of one forward; padded, those of stock's steps."""
    if not subject.decodes:
        return absent(_NO_TEXT)
    pair, worst = subject.twins(), 0.0
    cuts = (4, 5, 6, 7, 8, 9)
    for batch in (1, 2):
        inputs = subject.inputs(batch, 9, seed=batch)
        wanted = forward(pair.stock, inputs).logits
        found = stepped(pair.model, inputs["input_ids"], cuts)
        worst = max(worst, _check(subject, found, wanted, f"{batch} rows, token by token against one forward"))
    padded = subject.inputs(3, 9, "left", seed=3)
    ids, mask = padded["input_ids"], padded["attention_mask"]
    found, wanted = (stepped(model, ids, cuts, mask) for model in (pair.model, pair.stock))
    worst = max(worst, _check(subject, found, wanted, "left padding, token by token"))
    return passed("decoding equals one forward", measured=worst, allowed=subject.tolerances.fp32)


def _check(subject: Subject, found: Tensor, wanted: Tensor, what: str, mend: str = _CACHE) -> float:
    return check_same(found, wanted, subject.tolerances.fp32, what=what, mend=mend)


def chunked_prefill(subject: Subject) -> Outcome:
    """A prompt in three pieces over one cache gives the logits of one forward."""
    if not subject.decodes:
        return absent(_NO_TEXT)
    pair, worst = subject.twins(), 0.0
    for batch in (1, 2):
        inputs = subject.inputs(batch, 12, seed=batch)
        wanted = forward(pair.stock, inputs).logits
        found = stepped(pair.model, inputs["input_ids"], (5, 9, 12))
        worst = max(worst, _check(subject, found, wanted, f"{batch} rows in pieces of 5, 4 and 3", _CHUNKS))
    return passed("a prompt in pieces equals one forward", measured=worst, allowed=subject.tolerances.fp32)


_CHUNKS = "several queries over a filled cache attend to all of it and to each other by the mask that is given"


def sliding_window(subject: Subject) -> Outcome:
    """Texts longer than the window: one forward, token by token, and greedy search."""
    window = getattr(subject.config.get_text_config(), "sliding_window", None) if subject.decodes else None
    if not isinstance(window, int):
        return absent("the config has no sliding window")
    pair, length = subject.twins(), window + 7
    inputs = subject.inputs(2, length, seed=2)
    found, wanted = subject.both(pair, inputs)
    worst = _check(subject, found.logits, wanted.logits, f"{length} tokens, window {window}", _WINDOW)
    cuts = (window - 1, *range(window, length + 1))
    steps = stepped(pair.model, inputs["input_ids"], cuts)
    worst = max(worst, _check(subject, steps, wanted.logits, f"token by token beyond window {window}", _WINDOW))
    _generated(subject, subject.inputs(2, window - 2, seed=3), "greedy search beyond the window", _WINDOW)
    return passed(f"windows of {window} equal stock", measured=worst, allowed=subject.tolerances.fp32)


_WINDOW = "a layer with a window attends to the last `sliding_window` positions alone, in prefill and in decoding"


def greedy_generate(subject: Subject) -> Outcome:
    """Greedy search: the same tokens and logits; one row, and three of which some are padded."""
    if not subject.decodes:
        return absent(_NO_TEXT)
    mend = "the container's step for the decode loop (`decode`) must compute what its forward computes"
    _generated(subject, subject.inputs(1, 7, seed=1), "greedy search, one row", mend)
    padded = subject.inputs(3, 7, "left", seed=2)
    padded["attention_mask"][0] = 1
    _generated(subject, padded, "greedy search, three rows, two padded on the left", mend)
    worst = _generated_logits(subject, padded)
    return passed(
        f"greedy search gives stock's {NEW_TOKENS} tokens a row", measured=worst, allowed=subject.tolerances.fp32
    )


def beam_generate(subject: Subject) -> Outcome:
    """Beam search: the same tokens."""
    if not subject.decodes:
        return absent(_NO_TEXT)
    mend = "beams reorder the cache between steps: keep nothing of a sequence outside of it"
    _generated(subject, subject.inputs(2, 6, seed=4), "beam search, three beams", mend, num_beams=3)
    return passed(f"beam search gives stock's {NEW_TOKENS} tokens a row")


def _generated(subject: Subject, inputs: dict[str, Any], what: str, mend: str, **options: Any) -> None:
    pair, texts = subject.twins(), []
    for model in (pair.model, pair.stock):
        given = {name: value.clone() for name, value in inputs.items()}
        texts.append(model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False, **options))
    found, wanted = texts
    if not torch.equal(found, wanted):
        differ = "another length" if found.shape != wanted.shape else f"{int((found != wanted).sum())} tokens differ"
        raise Failed(what, measured=differ, allowed="equal tokens", mend=mend)


def _generated_logits(subject: Subject, inputs: dict[str, Any]) -> float:
    """The largest difference of the logits behind the tokens, which forgive much: a cap keeps their order."""
    pair, logits = subject.twins(), []
    for model in (pair.model, pair.stock):
        given = {name: value.clone() for name, value in inputs.items()}
        wanted = {"return_dict_in_generate": True, "output_logits": True}
        output = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False, **wanted)
        logits.append(torch.stack(output.logits))
    found, stock = logits
    mend = "CausalLM names all that the model does around its layers: norms, projections, positions, a cap of logits"
    return _check(subject, found, stock, "logits of greedy search", mend)
