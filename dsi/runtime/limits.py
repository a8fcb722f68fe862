"""Checks on the host before anything runs: a call that cannot work is an `InputError`, never an assert on the device.

Reading the range of the ids costs one transfer from the device a call. Sizes cost nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

from dsi.errors import InputError

_CHOICE_HEADS = frozenset(MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values())
_ID_DTYPES = (torch.int64, torch.int32)


@attrs.frozen(kw_only=True)
class Prompt:
    """What generation starts from.

    Args:
        rows: batch size.
        length: positions before the first new one, those in a cache included.
        cached: positions of the cache whose ids are not among those given.
        placed: the caller says at which positions the tokens stand.
    """

    rows: int
    length: int
    cached: int = 0
    placed: bool = False


def check_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], vocab_size: int | None, context: int | None
) -> None:
    """Nothing, where `module(*args, **kwargs)` has ids, mask and length that the model can take.

    Args:
        module: the model that is called; the signature of its class's `forward` names `args`.
        args, kwargs: of the call.
        vocab_size: rows of the token embedding; None leaves the ids' range unchecked.
        context: largest number of positions, or None.

    Raises:
        InputError: the ids are no [batch, length] of int64 or int32 (no [batch, choices, length] where the model is one
            for multiple choice), there are none, one is out of range, the mask has
            another shape, or there are too many positions.
    """
    given = {**dict(zip(_parameters(type(module).forward), args, strict=False)), **kwargs}
    ids: Any = given.get("input_ids")
    embeds: Any = given.get("inputs_embeds")
    if ids is None and not isinstance(embeds, Tensor):
        return
    cache, mask = given.get("past_key_values"), given.get("attention_mask")
    if isinstance(ids, Tensor) and ids.dim() == 3 and _takes_choices(type(module)):
        # [batch, choices, length]: the model makes rows of the choices
        mask = mask.flatten(0, -2) if isinstance(mask, Tensor) and mask.dim() == ids.dim() else mask
        ids = ids.flatten(0, -2)
    if ids is not None:
        check_ids("forward", ids, vocab_size)
    rows, length = (embeds if ids is None else ids).shape[:2]
    past = _past(cache)
    if isinstance(mask, Tensor) and mask.dim() < 3:
        # beside a static cache a mask may be as long as the cache
        check_mask("forward", mask, rows, None if getattr(cache, "is_compileable", False) else past + length)
    if context is not None and past + length > context:
        cached = f" after {past} in the cache" if past else ""
        raise InputError(
            f"forward: {length} positions{cached}, and the context is {context}; shorten the input, or set a larger "
            "max_out_tokens where the model itself allows more"
        )


def check_generation(
    given: Mapping[str, Any], vocab_size: int | None, context: int | None, least_new: int = 1
) -> Prompt | None:
    """What `generate(**given)` starts from; None where the call brings neither ids nor embeddings.

    Args:
        given: arguments of the call by name.
        vocab_size: rows of the token embedding; None leaves the ids' range unchecked.
        context: largest number of positions, or None.
        least_new: new tokens that must fit after the prompt.

    Raises:
        InputError: as for `check_inputs`, or fewer than `least_new` tokens fit.
    """
    ids = given.get("inputs") if given.get("inputs") is not None else given.get("input_ids")
    embeds, cache, mask = (given.get(name) for name in ("inputs_embeds", "past_key_values", "attention_mask"))
    if isinstance(embeds, Tensor) and embeds.dim() == 3:
        # ids beside embeddings are history for the processors: any number of them will do, none included
        rows, length = embeds.shape[:2]
    elif ids is None:
        return None
    else:
        check_ids("generate", ids, vocab_size)
        rows, length = ids.shape
    past, cached = _past(cache), 0
    if mask is not None:
        _need_tensor("generate", "attention_mask", mask)
        # beside a cache the ids are the whole text or its end; which of both, transformers reads from the mask
        check_mask("generate", mask, rows, None if cache is not None else length)
        cached = max(mask.shape[1] - length, 0) if past else 0
    placed = given.get("position_ids") is not None
    prompt = Prompt(rows=rows, length=length + cached, cached=cached, placed=placed)
    check_room(prompt, least_new, context)
    return prompt


def check_room(prompt: Prompt, new: int, context: int | None) -> None:
    """Nothing, where `new` tokens fit after the prompt.

    Raises:
        InputError: they do not.
    """
    if context is None or prompt.length + new <= context:
        return
    room = context - prompt.length
    hint = f"set max_new_tokens to {room} or fewer" if room > 0 else f"shorten the prompt to {context - 1} or fewer"
    raise InputError(
        f"generate: {prompt.length} prompt tokens and {new} new ones are {prompt.length + new} positions, and the "
        f"context is {context}; {hint}"
    )


def check_positions(position_ids: Tensor, new: int, context: int) -> None:
    """Nothing, where the positions that were given, and `new` after the last, are rows of the position embedding.

    Raises:
        InputError: they are not.
    """
    low, high = _range(position_ids)
    last = int(position_ids[..., -1].max())
    if low < 0 or max(high, last + new) >= context:
        raise InputError(
            f"generate: position_ids run from {low} to {high}, and {new} more positions follow {last}; the model has "
            f"positions 0 to {context - 1}"
        )


def check_ids(where: str, ids: Any, vocab_size: int | None) -> None:
    """Nothing, where `ids` are token ids [batch, length], at least one of them, each in 0..vocab_size - 1.

    Raises:
        InputError: they are not.
    """
    _need_tensor(where, "input_ids", ids)
    if ids.dtype not in _ID_DTYPES:
        raise InputError(f"{where}: input_ids are {ids.dtype}; use torch.int64 or torch.int32")
    if ids.dim() != 2:
        hint = "use input_ids[None] for one text" if ids.dim() == 1 else "use [batch, length]"
        raise InputError(f"{where}: input_ids have shape {tuple(ids.shape)}; {hint}")
    if ids.numel() == 0:
        what = "no rows" if ids.shape[0] == 0 else "no tokens"
        raise InputError(f"{where}: input_ids have shape {tuple(ids.shape)}: {what}; give one token a row at least")
    if vocab_size is not None and ids.device.type != "meta":
        _check_range(where, ids, vocab_size)


def check_mask(where: str, mask: Tensor, rows: int, length: int | None) -> None:
    """Nothing, where `mask` is [rows, length].

    Args:
        where: the call.
        mask: the padding mask.
        rows: batch size.
        length: positions; None allows any number.

    Raises:
        InputError: the mask has another shape.
    """
    if mask.dim() == 2 and mask.shape[0] == rows and length in (None, mask.shape[1]):
        return
    wanted = f"[{rows}, {'...' if length is None else length}]"
    raise InputError(f"{where}: attention_mask has shape {list(mask.shape)}, and the input asks for {wanted}")


def _check_range(where: str, ids: Tensor, vocab_size: int) -> None:
    low, high = _range(ids)
    if low >= 0 and high < vocab_size:
        return
    bad = low if low < 0 else high
    row, column = (ids == bad).nonzero()[0].tolist()
    raise InputError(
        f"{where}: input_ids[{row}, {column}] is {bad}; ids must be in 0..{vocab_size - 1}: use the model's own "
        "tokenizer, and resize_token_embeddings() after adding tokens"
    )


def _range(ids: Tensor) -> tuple[int, int]:
    # stacked, so that both come over in one transfer
    low, high = torch.stack(torch.aminmax(ids)).tolist()
    return low, high


def _need_tensor(where: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise InputError(f"{where}: {name} is a {type(value).__name__}; use a torch.Tensor")


def _past(cache: Any) -> int:
    length = getattr(cache, "get_seq_length", None)
    if length is None:
        return 0
    # a static cache answers with a tensor
    return int(length())


def _takes_choices(cls: type) -> bool:
    """Whether transformers lists the class, or one it derives from, among the heads for multiple choice."""
    return any(base.__name__ in _CHOICE_HEADS for base in cls.__mro__)


@functools.cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]
