"""What a model reads: token ids with every kind of padding, pixels, or maps [B, C, H, W]."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import attrs
import torch
from torch import Tensor, nn

Padding = Literal["none", "left", "right", "ragged"]

# below this id stand the special tokens of most vocabularies
FIRST_WORD = 4


@attrs.frozen(kw_only=True)
class Reads:
    """What a model reads.

    Args:
        vocabulary: number of token ids, 0 where it reads no text.
        pad_id: what padded positions hold.
        image: (channels, height, width), or () where it reads none.
        masks: it takes an attention mask.
    """

    vocabulary: int
    pad_id: int
    image: tuple[int, ...]
    masks: bool

    @classmethod
    def of(cls, model: nn.Module) -> Reads:
        """By the signature of the model's forward and its config."""
        names = inspect.signature(model.forward).parameters
        config: Any = model.config
        text = config.get_text_config()
        pad = getattr(text, "pad_token_id", None)
        return cls(
            vocabulary=int(text.vocab_size) if "input_ids" in names else 0,
            pad_id=0 if pad is None else int(pad),
            image=_image(getattr(config, "vision_config", None) or config) if "pixel_values" in names else (),
            masks="attention_mask" in names and "input_ids" in names,
        )

    def inputs(self, batch: int, length: int, padding: Padding = "none", *, seed: int = 0) -> dict[str, Tensor]:
        """Keyword arguments of a forward, the same for the same arguments.

        Args:
            batch: rows.
            length: tokens a row, padding included.
            padding: "none" gives no mask at all; "left" and "right" pad every row by a quarter; "ragged" gives the rows
                no padding, left, right and a hole in the middle, in turn.
            seed: of the ids and pixels.

        Returns:
            input_ids and attention_mask, int64 [batch, length]; pixel_values, float32 [batch, channels, ...].
        """
        generator = torch.Generator().manual_seed(seed)
        inputs: dict[str, Tensor] = {}
        if self.vocabulary:
            low = FIRST_WORD if self.vocabulary > 2 * FIRST_WORD else 0
            inputs["input_ids"] = torch.randint(low, self.vocabulary, (batch, length), generator=generator)
        if self.image:
            inputs["pixel_values"] = torch.randn(batch, *self.image, generator=generator)
        if padding == "none" or not self.masks:
            return inputs
        mask = MASKS[padding](batch, length)
        inputs["input_ids"] = inputs["input_ids"].masked_fill(mask == 0, self.pad_id)
        return {**inputs, "attention_mask": mask}


@attrs.frozen(kw_only=True)
class ReadsMaps:
    """What a model of maps reads.

    Args:
        name: of the argument that is the map.
        channels: of the map.
        factor: that the model divides its sides by on the way.
        time: the argument that is a number of each row, or "".
        context: (the argument that is a sequence beside each map, its width), or ("", 0).
    """

    name: str
    channels: int
    factor: int
    time: str
    context: tuple[str, int]
    masks: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> ReadsMaps | None:
        """By the arguments that the model's forward must be given and its config; None for other models."""
        parameters = inspect.signature(model.forward).parameters.values()
        needed = [one.name for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
        config: Any = getattr(model, "config", None)
        channels = getattr(config, "in_channels", None)
        if not needed or not isinstance(channels, int) or not hasattr(config, "block_out_channels"):
            return None
        width = getattr(config, "cross_attention_dim", 0)
        return cls(
            name=needed[0],
            channels=channels,
            factor=2 ** (len(config.block_out_channels) - 1),
            time="timestep" if "timestep" in needed else "",
            context=("encoder_hidden_states", int(width)) if "encoder_hidden_states" in needed else ("", 0),
        )

    def inputs(self, batch: int, length: int, padding: Padding = "none", *, seed: int = 0) -> dict[str, Tensor]:
        """Keyword arguments of a forward, the same for the same arguments: sides that the model divides evenly.

        Args:
            batch: rows.
            length: of the context, and a measure of the map's sides, which differ.
            padding: means nothing for maps.
            seed: of the values.
        """
        return self.maps(batch, self.factor * length, self.factor * (length + 1), length=length, seed=seed)

    def maps(self, batch: int, height: int, width: int, *, length: int = 5, seed: int = 0) -> dict[str, Tensor]:
        """As `inputs`, of these sides."""
        generator = torch.Generator().manual_seed(seed)
        inputs = {self.name: torch.randn(batch, self.channels, height, width, generator=generator)}
        if self.time:
            inputs[self.time] = torch.randint(1, 1000, (batch,), generator=generator)
        name, size = self.context
        if name:
            inputs[name] = torch.randn(batch, length, size, generator=generator)
        return inputs


@attrs.frozen(kw_only=True, eq=False)
class ReadsGiven:
    """What a model reads by the word of the policy's author.

    Args:
        model: that reads it.
        make: (model, rows, length, seed) -> keyword arguments of a forward.
    """

    model: nn.Module
    make: Callable[[Any, int, int, int], Mapping[str, Any]]
    masks: bool = False

    def inputs(self, batch: int, length: int, padding: Padding = "none", *, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of a forward; padding means nothing here."""
        return dict(self.make(self.model, batch, length, seed))


def _image(config: Any) -> tuple[int, ...]:
    size = config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(config.num_channels), int(height), int(width)


def _left(batch: int, length: int) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[:, : max(1, length // 4)] = 0
    return mask


def _right(batch: int, length: int) -> Tensor:
    return _left(batch, length).flip(1)


def _ragged(batch: int, length: int) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        cut = max(1, length // 4) + row // 4
        start = (0, 0, length - cut, length // 2)[row % 4]
        if row % 4:
            mask[row, start : start + cut] = 0
    return mask


MASKS: dict[str, Callable[[int, int], Tensor]] = {"left": _left, "right": _right, "ragged": _ragged}
