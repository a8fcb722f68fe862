"""What stands around the layers of a language model: embedding, positions, norm, head; found by who reads what."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from dsi.drafting.norms import read_norm
from dsi.drafting.replay import first_tensor, same
from dsi.drafting.specimen import Specimen
from dsi.drafting.stack import Stack
from dsi.errors import UnsupportedModelError
from dsi.fit import class_name
from dsi.policy import CausalLM, Config, Context, Norm, Positions, Rotary

_LENGTH = 7


@attrs.frozen(kw_only=True, eq=False)
class _Seen:
    """One forward of a model: what each module outside the layers read and wrote, in order."""

    inputs: dict[str, Any]
    outputs: dict[str, Any]
    logits: Tensor | None
    first: Tensor
    last: Tensor


@torch.no_grad()
def _see(specimen: Specimen, stack: Stack) -> _Seen:
    model = specimen.model
    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    paths = {m: p for p, m in model.named_modules() if p and not p.startswith(f"{stack.path}.")}
    layers = stack.layers(model)
    ends: dict[str, Tensor] = {}

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given: Any = first_tensor(args) if args else next(iter(kwargs.values()), None)
        if module is layers[0]:
            ends["first"] = given.clone()
        elif module is layers[-1]:
            ends["last"] = first_tensor(output).clone()
        else:
            path = paths[module]
            inputs[path] = given.clone() if isinstance(given, Tensor) else given
            outputs[path] = output.clone() if isinstance(output, Tensor) else output

    handles = [m.register_forward_hook(after, with_kwargs=True) for m in (*paths, layers[0], layers[-1])]
    try:
        output = model(**specimen.reads.inputs(2, _LENGTH))
    finally:
        for handle in handles:
            handle.remove()
    logits = getattr(output, "logits", None)
    return _Seen(inputs=inputs, outputs=outputs, logits=logits, **ends)


def find_causal_lm(specimen: Specimen, stack: Stack) -> CausalLM:
    """The parts around the layers of a language model.

    Raises:
        UnsupportedModelError: a part does something that dsi's decode loop has no word for.
    """
    model, seen = specimen.model, _see(specimen, stack)
    head = _path(model, model.get_output_embeddings(), "output embeddings")
    embed = _path(model, model.get_input_embeddings(), "input embeddings")
    norm = next((p for p in seen.inputs if read_norm(model.get_submodule(p)) and same(seen.inputs[p], seen.last)), "")
    tail = seen.outputs[norm] if norm else seen.last
    project_out = _linear_between(model, seen, tail, seen.inputs[head])
    project_in = _linear_between(model, seen, seen.outputs[embed], None)
    wrote = seen.outputs[project_in or embed]
    embed_norm = next((p for p in seen.inputs if read_norm(model.get_submodule(p)) and same(seen.inputs[p], wrote)), "")
    positions, where = _positions(specimen, seen, embed)
    total = seen.outputs[embed_norm] if embed_norm else wrote
    total = total + seen.outputs[positions.path] if positions else total
    if not same(total, seen.first):
        raise UnsupportedModelError(f"what the first layer reads is more than {embed} and {where or 'no positions'}")
    rotary = next((p for p, o in seen.outputs.items() if _is_rotary(o)), "")
    return CausalLM(
        model=class_name(model),
        embed=embed,
        layers=stack.path,
        head=head,
        norm=_norm(model, norm),
        positions=positions,
        rotary=Rotary(path=rotary) if rotary else None,
        project_in=project_in,
        project_out=project_out,
        embed_norm=_norm(model, embed_norm),
        logit_cap=_cap(specimen, seen, head),
        context=_context_attribute(specimen),
    )


ROPE_PARAMETERS: Mapping[str, Any] = MappingProxyType(
    {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
)
"""What the rope types read beside `rope_theta`, for a small model; a type ignores what it does not know."""


def rope_types() -> tuple[str, ...]:
    """The rope types that transformers knows."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return "default", *sorted(ROPE_INIT_FUNCTIONS.keys() - {"default"})


@torch.no_grad()
def is_static(specimen: Specimen, path: str) -> bool:
    """Whether the rotary terms at `path` depend on the position alone: not on length, batch or what came before."""
    rotary = specimen.model.get_submodule(path)
    limit = int(getattr(specimen.model.config.get_text_config(), "max_position_embeddings", 64))
    short, long = (torch.arange(length)[None] for length in (5, 2 * limit))
    hidden = torch.zeros(1, 1, 1)
    terms = [
        torch.stack(rotary(hidden, p.expand(rows, -1)))[:, :1, :5] for rows, p in ((1, short), (2, long), (1, short))
    ]
    return all(torch.equal(one, terms[0]) for one in terms)


def _norm(model: nn.Module, path: str) -> Norm | None:
    kind = read_norm(model.get_submodule(path)) if path else None
    return None if kind is None else kind.slot(path)


def _path(model: nn.Module, wanted: Any, what: str) -> str:
    found = next((path for path, module in model.named_modules() if module is wanted), "")
    if not found:
        raise UnsupportedModelError(f"the model has no {what} of its own")
    return found


def _linear_between(model: nn.Module, seen: _Seen, read: Any, wrote: Any) -> str:
    """The linear layer that reads these numbers and writes those; "" where nothing stands between."""
    if wrote is not None and same(read, wrote):
        return ""
    for path in seen.inputs:
        plain = isinstance(model.get_submodule(path), nn.Linear) and same(seen.inputs[path], read)
        if plain and (wrote is None or same(seen.outputs[path], wrote)):
            return path
    return ""


def _is_rotary(output: Any) -> bool:
    pair = isinstance(output, tuple) and len(output) == 2 and all(isinstance(x, Tensor) for x in output)
    return pair and output[0].shape == output[1].shape and output[0].dim() == 3 and output[0].is_floating_point()


def _tables(specimen: Specimen, seen: _Seen, but: str) -> list[str]:
    """The embeddings that are looked up by position: other ids do not change what they give."""
    model = specimen.model
    found = [p for p in seen.outputs if p != but and isinstance(model.get_submodule(p), nn.Embedding)]
    moving = [p for p in found if isinstance(seen.outputs[p], Tensor) and seen.outputs[p].dim() >= 2]
    return [p for p in moving if not same(seen.outputs[p][..., 0, :], seen.outputs[p][..., 1, :])]


def _first_row(specimen: Specimen, seen: _Seen, path: str) -> int:
    """The row of a position table that the first position gets, or -1 where the next do not follow it."""
    rows = specimen.model.get_submodule(path).weight.detach()
    wrote = seen.outputs[path].reshape(-1, rows.shape[1])[:_LENGTH]
    for start in range(rows.shape[0] - _LENGTH + 1):
        if same(rows[start : start + _LENGTH], wrote):
            return start
    return -1


def _positions(specimen: Specimen, seen: _Seen, embed: str) -> tuple[Positions | None, str]:
    """(learned positions, words for them)."""
    for path in _tables(specimen, seen, embed):
        start = _first_row(specimen, seen, path)
        if start < 0:
            raise UnsupportedModelError(f"{path} is not looked up by position")
        return Positions(path=path, offset=start), path
    return None, ""


def _cap(specimen: Specimen, seen: _Seen, head: str) -> Config | None:
    """Where the cap of the logits is read; None where there is none."""
    wrote = seen.outputs[head]
    if same(seen.logits, wrote):
        return None
    config = specimen.model.config.get_text_config()
    for name, value in vars(config).items():
        if isinstance(value, float) and value > 0 and same(value * torch.tanh(wrote / value), seen.logits):
            return Config(name)
    raise UnsupportedModelError(f"the logits are not what {head} gives, nor that with a cap")


_LIMITS = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length")


def _context_attribute(specimen: Specimen) -> str:
    config = specimen.model.config
    return next((name for name in _LIMITS if isinstance(getattr(config, name, None), int)), "")


def find_context(first: Specimen, other: Specimen, stack: Stack, *, table_rows: int | None) -> Context | None:
    """The longest input, where positions are rows of a table.

    Args:
        first, other: small models with different padding ids.
        stack: of the layers.
        table_rows: of the layers' own table; None where they have none.
    """
    name = _context_attribute(first)
    config = first.model.config
    if not name or not first.reads.vocabulary:
        return None
    if table_rows is not None:
        return Context(config=name) if table_rows == getattr(config, name) else None
    starts = [_table_start(one, stack) for one in (first, other)]
    if None in starts:
        return None
    (rows, start), (_, second) = starts  # type: ignore[misc]
    if rows - start == getattr(config, name):
        return Context(config=name)
    moves = second - start == other.model.config.pad_token_id - config.pad_token_id != 0
    if rows == getattr(config, name) and (start == 0 or (moves and start == config.pad_token_id + 1)):
        return Context(config=name, after="pad_token_id" if start else "")
    return None


def _table_start(specimen: Specimen, stack: Stack) -> tuple[int, int] | None:
    """(rows of the position table, the first that is read); None where there is no table."""
    model, seen = specimen.model, _see(specimen, stack)
    embed = _path(model, model.get_input_embeddings(), "input embeddings")
    for path in _tables(specimen, seen, embed):
        start = _first_row(specimen, seen, path)
        if start >= 0:
            return model.get_submodule(path).weight.shape[0], start
    return None
