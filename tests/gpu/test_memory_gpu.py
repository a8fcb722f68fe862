"""What a model takes on the device: its weights, its cache, and a twentieth of that."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import transformers

import dsi
from dsi.runtime.forward_graph import capture

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# 2.5 GB of weights: a prompt's activations are to them as large as with LLaMA 1B, larger than with all bigger models
SETTINGS = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 6144,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
}
ALLOWED = 1.05
# bytes of keys and values of one position
POSITION = (
    2 * SETTINGS["num_hidden_layers"] * SETTINGS["num_key_value_heads"]
    * SETTINGS["hidden_size"] // SETTINGS["num_attention_heads"] * 2
)  # fmt: skip


def _model() -> Any:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SETTINGS)).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    model.config.dtype = torch.bfloat16
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize(("rows", "prompt", "new"), [(1, 128, 128), (8, 96, 64), (4, 512, 128)])
def test_peak_is_weights_and_cache(rows: int, prompt: int, new: int) -> None:
    others = _others()
    model = _model()
    weights = torch.cuda.memory_allocated() - others
    torch.cuda.reset_peak_memory_stats()
    engine = dsi.init_inference(model)
    _write(engine, rows, prompt, new)
    share = (torch.cuda.max_memory_allocated() - others) / (weights + rows * (prompt + new) * POSITION)
    assert share <= ALLOWED, f"{share:.3f} of weights and cache"


def test_batch_sizes_that_alternate_share_their_memory() -> None:
    """The largest text's, whichever come between; each is captured once, and says the same each time."""
    others, order = _others(), (1, 8, 32, 1, 8, 32)
    model = _model()
    weights = torch.cuda.memory_allocated() - others
    torch.cuda.reset_peak_memory_stats()
    engine = dsi.init_inference(model)
    first = {rows: _write(engine, rows, 32, 64) for rows in order}
    share = (torch.cuda.max_memory_allocated() - others) / (weights + 32 * (32 + 64) * POSITION)
    assert share <= ALLOWED, f"{share:.3f} of weights and cache"
    pool, side = engine.module._dsi.graphs, torch.cuda.Stream()
    graphs = dict(pool._graphs)
    for turn, rows in enumerate(order):
        # every second one on a stream that the last text was not written on
        with torch.cuda.stream(side if turn % 2 else torch.cuda.current_stream()):
            found = _write(engine, rows, 32, 64)
        torch.cuda.synchronize()
        assert torch.equal(found, first[rows])
    assert dict(pool._graphs) == graphs


def test_a_cache_that_was_brought_goes_with_its_owner() -> None:
    """Its graph stays for whoever comes with the same memory, and holds none."""
    engine, rows, positions = dsi.init_inference(_model()), 4, 512
    ids = torch.randint(4, SETTINGS["vocab_size"], (rows, positions - 32), device=DEVICE)
    found = []
    for _ in range(3):
        cache = transformers.DynamicCache(config=engine.module.config)
        found.append(engine.generate(ids, max_new_tokens=32, do_sample=False, past_key_values=cache))
        assert engine.module._dsi.last_route.graph, engine.module._dsi.last_route.reason
        with_it = torch.cuda.memory_allocated()
        del cache
        gc.collect()
        assert with_it - torch.cuda.memory_allocated() >= rows * (positions - 1) * POSITION
    assert all(torch.equal(one, found[0]) for one in found)


def _others() -> int:
    """Bytes of the libraries' own workspaces, which every process has once."""
    square = torch.ones(512, 512, device=DEVICE, dtype=torch.bfloat16)
    (square @ square).sum().item()
    del square
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def _write(engine: Any, rows: int, prompt: int, new: int) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(rows)
    ids = torch.randint(4, SETTINGS["vocab_size"], (rows, prompt), device=DEVICE, generator=generator)
    found: torch.Tensor = engine.generate(ids, max_new_tokens=new, do_sample=False)
    assert engine.module._dsi.last_route.graph, engine.module._dsi.last_route.reason
    return found


def test_captures_leave_nothing_behind() -> None:
    """What cuBLAS works in is the graph's, and goes with it."""
    x, w = torch.randn(64, 16384, device=DEVICE), torch.randn(64, 16384, device=DEVICE)
    wanted, left = x @ w.T, []
    for _ in range(3):
        graph, found = capture(lambda: x @ w.T, torch.device(DEVICE), torch.cuda.graph_pool_handle())
        graph.replay()
        torch.testing.assert_close(found, wanted)
        del graph, found
        torch.cuda.synchronize()
        left.append(torch.cuda.memory_allocated())
    assert len(set(left)) == 1
