"""Half precision on the device: an error against float32 of at most 1.2 times stock's own, in every family."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

import dsi
from tests.plugins.families import VARIANTS
from tests.support.models import CAUSAL, ENCODERS, inputs_for, tiny

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
ALLOWED = 1.2
ROWS = (1, 2, 8, 32)
# texts, and steps of each: a mean over few numbers is no error but luck
SEEDS, STEPS = 3, 6


def _rms(x: Tensor, reference: Tensor) -> float:
    return float((x.double() - reference.double()).norm() / reference.double().norm())


def _low(exact: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """A stock model of the rounded weights, and a float32 model that holds exactly those."""
    stock = copy.deepcopy(exact)
    for parameter in stock.parameters():
        parameter.data = parameter.data.to(dtype)
    stock.config.dtype = dtype
    reference = copy.deepcopy(stock)
    for parameter in reference.parameters():
        parameter.data = parameter.data.float()
    reference.config.dtype = torch.float32
    return stock.to(DEVICE), reference.to(DEVICE)


def _compared(found: Any, mask: Tensor | None) -> Tensor:
    """The first output without padding; of a model whose first is a similarity, one number a pair, what it is of."""
    if "text_embeds" in found and "image_embeds" in found:
        return torch.cat([found.text_embeds, found.image_embeds])
    first: Tensor = found[0]
    return first[mask.bool()] if first.dim() == 3 and mask is not None else first


def _causal() -> list[Any]:
    plugins = [pytest.param(("plugin", name), id=name) for name in VARIANTS]
    return [*(pytest.param(("tiny", name), id=name) for name in CAUSAL), *plugins]


def _build(source: tuple[str, str]) -> Any:
    kind, name = source
    return tiny(name) if kind == "tiny" else VARIANTS[name].model()


@pytest.mark.parametrize("source", _causal())
def test_decode_steps(source: tuple[str, str]) -> None:
    """dsi writes; the others read what it wrote. The logits of the steps are compared, batch by batch."""
    stock, reference = _low(_build(source), torch.bfloat16)
    stock.generation_config.eos_token_id = None
    stock.generation_config.pad_token_id = 0
    engine = dsi.init_inference(copy.deepcopy(stock))
    settings = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for rows in ROWS:
        ours_error, stock_error = [], []
        for seed in range(SEEDS):
            ids = inputs_for("llama", rows, 9, seed=seed)["input_ids"].to(DEVICE)
            written = engine.generate(ids, attention_mask=torch.ones_like(ids), **settings)
            read = written.sequences[:, :-1]
            with torch.no_grad():
                wanted = reference(read).logits[:, -STEPS:]
                stock_error.append(_rms(stock(read).logits[:, -STEPS:], wanted))
            ours_error.append(_rms(torch.stack(written.logits, 1), wanted))
        ours, theirs = statistics.mean(ours_error), statistics.mean(stock_error)
        assert ours <= ALLOWED * theirs, f"{rows} rows: {ours:.2e}, stock's own is {theirs:.2e}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ENCODERS)
def test_encoders(family: str, dtype: torch.dtype) -> None:
    stock, reference = _low(tiny(family), dtype)
    engine = dsi.init_inference(copy.deepcopy(stock))
    for rows in ROWS:
        ours_error, stock_error = [], []
        for seed in range(SEEDS):
            given = {name: x.to(DEVICE) for name, x in inputs_for(family, rows, 17, "ragged", seed=seed).items()}
            low = {name: x.to(dtype) if x.is_floating_point() else x for name, x in given.items()}
            with torch.no_grad():
                found = [model(**inputs) for model, inputs in ((reference, given), (stock, low), (engine, low))]
            outputs = [_compared(one, given.get("attention_mask")) for one in found]
            stock_error.append(_rms(outputs[1], outputs[0]))
            ours_error.append(_rms(outputs[2], outputs[0]))
        ours, theirs = statistics.mean(ours_error), statistics.mean(stock_error)
        assert ours <= ALLOWED * theirs, f"{rows} rows: {ours:.2e}, stock's own is {theirs:.2e}"
