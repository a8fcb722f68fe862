"""The injected families on a CUDA device, against stock on the same device. Run by `make gpu`."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dsi
from dsi.containers import launches
from tests.support.models import CAUSAL, cases, inputs_for, tiny

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
LOW_PRECISION = ("bert", "roberta", "distilbert", "clip_text", "clip_vision", "gpt2", "opt", "llama")
REAL = {
    "bert": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": 3072, "n_positions": 1024},
    "opt": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "ffn_dim": 3072,
        "word_embed_proj_dim": 768,
        "max_position_embeddings": 1024,
    },
    "llama": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "max_position_embeddings": 1024,
    },
}


def _pair(family: str, head: str | None = None, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, Any]:
    """A stock model on the device, and a copy of it for dsi."""
    stock = tiny(family, head, dtype=dtype, **settings).to(DEVICE)
    return stock, copy.deepcopy(stock)


def _on_device(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: x.to(DEVICE, dtype) if x.is_floating_point() else x.to(DEVICE) for name, x in batch.items()}


def _rms(x: Tensor, reference: Tensor) -> float:
    return float((x.double() - reference.double()).norm() / reference.double().norm())


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """fp32 products in fp32, on both sides."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(params=[0, launches.KERNEL_FROM], ids=["our kernels", "as small as this"])
def kernel_from(request: Any, monkeypatch: Any) -> int:
    """From how many bytes on our kernels run: tiny models would meet torch's alone."""
    monkeypatch.setattr(launches, "KERNEL_FROM", request.param)
    return request.param


@pytest.mark.usefixtures("kernel_from")
@pytest.mark.parametrize("pad", [None, "left", "right", "ragged"])
@pytest.mark.parametrize(("family", "head"), cases())
def test_fp32_equals_stock(family: str, head: str, pad: Any) -> None:
    stock, ours = _pair(family, head)
    engine = dsi.init_inference(ours, strict=True)
    assert all(block.ops == "triton" for block in engine.plan.blocks)
    batch = _on_device(inputs_for(family, batch=3, seq=9, pad=pad), torch.float32)
    with torch.no_grad():
        expected, found = stock(**batch)[0], engine(**batch)[0]
    mask = batch.get("attention_mask")
    if mask is not None and expected.shape[:2] == mask.shape:
        # where padding is left out there is no result of it
        expected, found = expected[mask != 0], found[mask != 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.usefixtures("kernel_from")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", LOW_PRECISION)
def test_low_precision_is_no_worse_than_stock(family: str, dtype: torch.dtype) -> None:
    ours_error, stock_error = [], []
    for seed in range(4):
        exact = tiny(family, seed=seed)
        stock = copy.deepcopy(exact).to(DEVICE, dtype)
        engine = dsi.init_inference(copy.deepcopy(stock))
        batch = inputs_for(family, batch=3, seq=17, pad="left", seed=seed)
        with torch.no_grad():
            reference = exact(**batch)[0].to(DEVICE)
            moved = _on_device(batch, dtype)
            stock_error.append(_rms(stock(**moved)[0], reference))
            ours_error.append(_rms(engine(**moved)[0], reference))
    assert statistics.mean(ours_error) <= 1.2 * statistics.mean(stock_error)


@pytest.mark.usefixtures("kernel_from")
@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
@pytest.mark.parametrize("pad", [None, "left"])
def test_greedy_and_beams_equal_stock(family: str, mode: dict[str, Any], pad: Any) -> None:
    stock, ours = _pair(family)
    engine = dsi.init_inference(ours)
    batch = _on_device(inputs_for(family, batch=2, seq=7, pad=pad), torch.float32)
    arguments = {"max_new_tokens": 12, "do_sample": False, **mode}
    assert torch.equal(engine.generate(**batch, **arguments), stock.generate(**batch, **arguments))


def test_the_same_seed_samples_the_same_tokens() -> None:
    _, ours = _pair("llama")
    engine = dsi.init_inference(ours)
    batch = _on_device(inputs_for("llama", batch=2, seq=7), torch.float32)
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        drawn.append(engine.generate(**batch, do_sample=True, max_new_tokens=12))
    assert torch.equal(*drawn)


def test_bad_ids_are_refused_and_the_next_call_works() -> None:
    _, ours = _pair("gpt2")
    engine = dsi.init_inference(ours)
    good = _on_device(inputs_for("gpt2", batch=1, seq=5), torch.float32)
    before = engine.generate(**good, max_new_tokens=4)
    with pytest.raises(dsi.InputError, match="ids must be in"):
        engine.generate(torch.full((1, 4), 10**6, device=DEVICE), max_new_tokens=4)
    with pytest.raises(dsi.InputError, match="ids must be in"):
        engine(torch.full((1, 4), 10**6, device=DEVICE))
    assert torch.equal(engine.generate(**good, max_new_tokens=4), before)


def test_restore_gives_the_memory_back() -> None:
    _, ours = _pair("llama", dtype=torch.bfloat16, **REAL["llama"])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    layer = sum(p.nbytes for p in ours.model.layers[0].parameters())
    engine = dsi.init_inference(ours)
    assert torch.cuda.memory_allocated() <= 1.01 * before
    assert torch.cuda.max_memory_allocated() <= before + layer
    engine.restore()
    assert torch.cuda.memory_allocated() <= 1.001 * before


def test_cuda_events_time_prefill_and_decode() -> None:
    _, ours = _pair("llama")
    engine = dsi.init_inference(ours)
    batch = _on_device(inputs_for("llama", batch=1, seq=5), torch.float32)
    engine.profile_model_time(use_cuda_events=True)
    engine.generate(**batch, max_new_tokens=4, do_sample=False)
    times = engine.model_times()
    assert [time.phase for time in times] == ["prefill", "decode", "decode", "decode"]
    assert all(time > 0 for time in times)


@pytest.mark.parametrize("family", list(REAL))
def test_not_slower_than_stock(family: str) -> None:
    """The bar of this stage: medians of interleaved forwards, and of greedy generation where the family generates."""
    stock, ours = _pair(family, dtype=torch.bfloat16, **REAL[family])
    dsi.init_inference(ours)
    batch = _on_device(inputs_for(family, batch=1, seq=32), torch.bfloat16)

    def forward(model: nn.Module) -> Callable[[], Any]:
        return lambda: model(**batch)

    def generate(model: Any) -> Callable[[], Any]:
        return lambda: model.generate(**batch, max_new_tokens=16, min_new_tokens=16, do_sample=False)

    for make in (forward, generate) if family in CAUSAL else (forward,):
        first, second = _medians(make(stock), make(ours))
        assert second <= first, f"{family} {make.__name__}: stock {first:.3f} ms, dsi {second:.3f} ms"


def _medians(*functions: Callable[[], Any], rounds: int = 15) -> list[float]:
    times: list[list[float]] = [[] for _ in functions]
    with torch.no_grad():
        for turn in range(rounds + 3):
            for function, spent in zip(functions, times, strict=True):
                torch.cuda.synchronize()
                start = time.perf_counter()
                function()
                torch.cuda.synchronize()
                if turn >= 3:
                    spent.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(spent) for spent in times]
