"""Kernels compiled ahead: which ones, that nothing is launched meanwhile, and that the launch finds them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from dsi_kernels.ahead import compile_ahead

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import contextlib, json, threading
import torch, triton
from tests.kernels.offline_compiler import HOPPER
from triton.runtime import driver
driver.set_active(HOPPER)
from dsi_kernels import operands
operands.INTERPRETED = True
import dsi_kernels as dk
from dsi_kernels.ahead import compile_ahead
from dsi_kernels.rms_norm import _rms_norm_kernel
from dsi_kernels.layer_norm import _layer_norm_kernel
torch.cuda.device = lambda device: contextlib.nullcontext()
x, asked, threads, loaded = torch.zeros(2, 256), [], set(), []
triton.knobs.runtime.jit_post_compile_hook = lambda **told: threads.add(threading.get_ident())

# on a driver without a device loading ends with the first thing it asks for
def loads(source, metadata):
    loaded.append(threading.get_ident())
    raise triton.runtime.errors.OutOfResources(1, 0, "shared memory")

HOPPER.launcher_cls = loads

def run():
    for _ in range(3):
        dk.rms_norm(x, x[0])
        dk.rms_norm(x.half(), x[0].half())
        dk.layer_norm(x, None, None)

before = lambda **told: asked.append(told["fn"].name) or None
triton.knobs.runtime.jit_cache_hook = before
count = compile_ahead(run, torch.device("cuda"))
put_back = triton.knobs.runtime.jit_cache_hook is before
kept = [len(kernel.device_caches[0][0]) for kernel in (_rms_norm_kernel, _layer_norm_kernel)]
asked.clear()
ahead = len(loaded)
here = threading.get_ident() in threads.union(loaded)
try:
    run()
except triton.runtime.errors.OutOfResources as error:
    launched = str(error)
print(json.dumps([count, put_back, kept, asked, here, ahead, launched]))
"""


def test_what_a_run_would_launch_is_compiled_by_other_threads(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(ROOT / "kernels"), str(ROOT))),
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    count, put_back, kept, asked, here, loaded, launched = json.loads(result.stdout.splitlines()[-1])
    assert (count, put_back, kept) == (3, True, [2, 1])
    # the second run compiles nothing, and comes as far as the launch
    assert asked == []
    assert "shared memory" in launched
    assert loaded == count
    assert not here


def test_nothing_runs_where_nothing_is_compiled():
    calls = []
    assert compile_ahead(lambda: calls.append(1), torch.device("cpu")) == 0
    assert not calls
