"""A process that finds nothing compiled: its kernels are compiled by several threads, and its first text is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import copy, json, threading
import torch, triton
import dsi
from tests.support.models import inputs_for, tiny

compiled = []
triton.knobs.runtime.jit_post_compile_hook = lambda **told: compiled.append(
    (told["fn"].name, threading.get_ident() == threading.main_thread().ident)
)
stock = tiny("llama").to("cuda")
stock.generation_config.eos_token_id, stock.generation_config.pad_token_id = None, 0
engine = dsi.init_inference(copy.deepcopy(stock))
given = {name: x.to("cuda") for name, x in inputs_for("llama", 2, 6).items()}
equal = []
for settings in (
    {"do_sample": False, "eos_token_id": 66},
    {"do_sample": True, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3},
):
    texts = []
    for model in (engine, stock):
        torch.manual_seed(0)
        texts.append(model.generate(**given, **settings, max_new_tokens=12))
    equal.append(torch.equal(*texts))
print(json.dumps([equal, compiled, engine.module._dsi.last_route.graph]))
"""


def test_the_first_text_of_a_process(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
            "TRITON_CACHE_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stderr
    equal, compiled, graph = json.loads(result.stdout.splitlines()[-1])
    assert equal == [True, True]
    assert graph
    assert {"_narrow_kernel", "_largest_kernel"} <= {name.rsplit(".", 1)[-1] for name, _ in compiled}
    assert not any(by_main for _, by_main in compiled), compiled
