"""Case of the table ready: how long a model that is on the device takes to its first text, and what memory it takes.

Run as a program, it measures that in a process of its own, whose Triton cache is what TRITON_CACHE_DIR names:

    TRITON_CACHE_DIR=$(mktemp -d) python benchmarks/gpu_ready.py llama-7b
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_models import DEVICE, MODELS, Stage
from measure import Goal, Result, Sample, check_rms

import dsi

PROMPT, NEW = 1024, 128


def ready(stage: Stage, model: str, **_: Any) -> Result:
    """Two processes one after the other, the first with an empty Triton cache."""
    # this process's own models would stand in the way
    stage.clear()
    name = f"{model} ready"
    with tempfile.TemporaryDirectory() as folder:
        cold, warm = (_child(model, folder) for _ in range(2))
    allowed = warm["weights_bytes"] + warm["cache_bytes"]
    goals = (
        Goal(name="s, warm Triton cache", found=warm["seconds"], bar=3, at_most=True),
        Goal(name="s, cold Triton cache", found=cold["seconds"], bar=20, at_most=True),
        Goal(name="peak over weights and KV", found=warm["peak_bytes"] / allowed, bar=1.05, at_most=True),
    )
    times = {"dsi": Sample.of([1e3 * warm["seconds"]]), "dsi, cold cache": Sample.of([1e3 * cold["seconds"]])}
    facts = {"cold": cold, "warm": warm}
    return Result(name=name, unit="ms", times=times, bars={}, check=warm["check"], goals=goals, facts=facts)


def _child(model: str, cache: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), model],
        env={**os.environ, "TRITON_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        timeout=180,
    )
    if done.returncode:
        raise RuntimeError(f"{Path(__file__).name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def measure(name: str) -> dict[str, Any]:
    """In this process: seconds to the first text, then the peak of a longer one, then whether both were right."""
    known = MODELS[name]
    model: Any = known.build()
    config = model.config
    weights = torch.cuda.memory_allocated()
    ids = torch.randint(4, config.vocab_size, (1, PROMPT), device=DEVICE)
    torch.cuda.synchronize()
    started = time.perf_counter()
    engine = dsi.init_inference(model)
    initialised = time.perf_counter() - started
    engine.generate(ids[:, :128], max_new_tokens=16, do_sample=False)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    torch.cuda.reset_peak_memory_stats()
    engine.generate(ids, max_new_tokens=NEW, do_sample=False)
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * width * known.dtype.itemsize * (PROMPT + NEW)
    return {
        "seconds": seconds,
        "init_seconds": initialised,
        "weights_bytes": weights,
        "cache_bytes": cache,
        "peak_bytes": peak,
        "reserved_bytes": reserved,
        "text": f"1x{PROMPT}+{NEW}",
        "check": _check(name, engine, ids[:, :128]),
    }


def _check(name: str, engine: Any, ids: torch.Tensor) -> dict[str, float]:
    """Of a text's logits, by the model as it is given back, and by that in float32."""
    settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    written = engine.generate(ids, **settings)
    ours, read = torch.stack(written.logits, 1), written.sequences[:, :-1]
    stock = engine.restore()
    theirs = stock(read, logits_to_keep=8).logits.clone()
    return check_rms(f"{name} ready", stock.float()(read, logits_to_keep=8).logits, theirs, ours)


def ready_cases(stage: Stage, *, rivals: Any, **options: Any) -> dict[str, Callable[[], Result]]:
    return {"llama-7b ready": partial(ready, stage, "llama-7b", **options)}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
