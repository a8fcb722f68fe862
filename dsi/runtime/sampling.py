"""What a captured step chooses tokens by: the processors that it knows, as numbers that lie on the device."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# in the order in which transformers applies them, each with the attribute that is its number
_KNOWN = {
    RepetitionPenaltyLogitsProcessor: ("penalty", "penalty"),
    TemperatureLogitsWarper: ("temperature", "temperature"),
    TopKLogitsWarper: ("top_k", "top_k"),
    TopPLogitsWarper: ("top_p", "top_p"),
    MinPLogitsWarper: ("min_p", "min_p"),
}


@attrs.frozen(kw_only=True, eq=False)
class Sampling:
    """How tokens are chosen.

    Args:
        sampled: drawn, not the most likely one.
        settings: of `dsi_kernels.sampling_settings`.
        vocabulary: how many tokens the logits are for.
        penalty: the processor that asks which tokens came before, or None.
    """

    sampled: bool
    settings: tuple[float, ...]
    vocabulary: int
    penalty: RepetitionPenaltyLogitsProcessor | None

    def seen(self, ids: Tensor) -> Tensor | None:
        """int8 [B, vocabulary]: 1 for tokens of `ids` [B, T] that the penalty is for; None without a penalty."""
        if self.penalty is None:
            return None
        outside = self.vocabulary
        ids = ids.clamp(max=outside)
        if (ignored := self.penalty.prompt_ignore_length) is not None:
            positions = torch.arange(ids.shape[1], device=ids.device)
            ids = ids.masked_fill(positions < torch.as_tensor(ignored, device=ids.device).view(-1, 1), outside)
        marks = torch.zeros(ids.shape[0], outside + 1, dtype=torch.int8, device=ids.device)
        return marks.scatter_(1, ids, 1)[:, :outside]


def known_sampling(processors: Any, logits: Tensor, *, sampled: bool) -> Sampling | None:
    """What these processors make of logits [B, vocabulary], for a captured step; None where it does not know them."""
    from dsi_kernels import sampling_settings
    from dsi_kernels.sample_token import MAX_VOCAB

    order = list(_KNOWN)
    places = [order.index(type(one)) if type(one) in _KNOWN else -1 for one in processors]
    if -1 in places or sorted(set(places)) != places or logits.shape[1] > MAX_VOCAB:
        return None
    if not all(_plain(one) for one in processors):
        return None
    numbers = {}
    for one in processors:
        name, attribute = _KNOWN[type(one)]
        numbers[name] = getattr(one, attribute)
    if not sampled:
        numbers["top_k"] = 1
    penalty = next((one for one in processors if type(one) is RepetitionPenaltyLogitsProcessor), None)
    settings = tuple(sampling_settings(**numbers))
    return Sampling(sampled=sampled, settings=settings, vocabulary=logits.shape[1], penalty=penalty)


def _plain(processor: Any) -> bool:
    """It leaves out what it leaves out altogether, and keeps one token at least."""
    removed, kept = getattr(processor, "filter_value", -float("inf")), getattr(processor, "min_tokens_to_keep", 1)
    return removed == -float("inf") and kept == 1


def noise_place(device: torch.device) -> int:
    """How far torch's own generator of a CUDA device has come."""
    return int(_generator(device).get_offset())


def set_noise_place(device: torch.device, place: int) -> None:
    """Have it go on from there."""
    _generator(device).set_offset(place)


def _generator(device: torch.device) -> torch.Generator:
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]
