"""What injections cost in memory, by the kernel's own count: run as `python -m tests.core.memory_probe`.

Resident memory and its high-water mark see everything, oneDNN's packed weights and temporaries too, which are
invisible to torch's Python side. So that they are exact to a page, every tensor gets a mapping of its own
(MALLOC_MMAP_THRESHOLD_), which is gone when it is freed; so each probe also starts from a clean slate.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import torch

import dsi
from tests.core.twins import LARGE, containers
from tests.support import inputs_for, tiny

# name -> family, dtype of the model, dtype asked for, keep_original
PROBES = {
    "bert": ("bert", "float32", "", ""),
    "gpt2": ("gpt2", "float32", "", ""),
    "llama": ("llama", "float32", "", ""),
    "gpt2, 16 bits": ("gpt2", "float32", "bfloat16", ""),
    "llama, 16 bits, the rest on the host": ("llama", "float32", "float16", "host"),
    "llama, 16 bits to 32": ("llama", "bfloat16", "float32", ""),
}
# about 130 MB in fp32
SIZES = {
    "bert": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 4},
    "gpt2": {"n_embd": 768, "n_inner": 3072, "n_head": 12, "n_layer": 4},
    "llama": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_hidden_layers": 3,
    },
}


def resident(field: str) -> int:
    """Bytes: "VmRSS" now, "VmHWM" at most since the last `forget_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def measured(act, before: int) -> dict[str, int]:
    """Bytes over `before`, while `act` runs and after it."""
    forget_peak()
    act()
    peak = resident("VmHWM") - before
    gc.collect()
    return {"peak": peak, "after": resident("VmRSS") - before}


def probe(family: str, dtype: str, target: str, keep: str) -> dict[str, object]:
    # code that is loaded at the first injection is not what is measured
    """One injection and, where that is possible, the way back."""
    model = tiny(family, dtype=getattr(torch, dtype), hostile=False, **SIZES[family])
    weights = sum(p.nbytes for p in model.parameters())
    plan = dsi.plan(model, dtype=target or None)
    gc.collect()
    before = resident("VmRSS")
    engines = []
    init = measured(
        lambda: engines.append(dsi.init_inference(model, dtype=target or None, keep_original=keep or None)), before
    )
    result: dict[str, object] = {
        "weights": weights,
        "layer_before": max(block.bytes_before for block in plan.blocks),
        "layer_after": max(block.bytes_after for block in plan.blocks),
        "layers": len(containers(model)),
        "largest_left": max(left.bytes for left in plan.left),
        "weights_after": sum(b.bytes_after for b in plan.blocks)
        + sum(left.bytes for left in plan.left)
        * engines[0].plan.dtype_after.itemsize
        // getattr(torch, dtype).itemsize,
        "init": init,
    }
    if engines[0].plan.restorable:
        result["restore"] = measured(engines[0].restore, before)
    return result


def warm_up() -> None:
    """Code that is loaded at the first injection is not what is measured."""
    for dtype, target in (("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")):
        model = tiny("llama", dtype=getattr(torch, dtype), **LARGE["llama"])
        with dsi.init_inference(model, dtype=target, keep_original="host") as engine:
            engine(**inputs_for("llama", 1, 4))


if __name__ == "__main__":
    assert int(os.environ["MALLOC_MMAP_THRESHOLD_"]) <= 65536
    torch.set_num_threads(1)
    warm_up()
    sys.stdout.write(json.dumps({name: probe(*arguments) for name, arguments in PROBES.items()}))
