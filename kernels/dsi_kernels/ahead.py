"""Kernels compiled at once, on several threads, before the first of them is launched.

A step launches some ten kernels that Triton has to compile, each 0.2 to 2 s, one after the other where each is compiled
at its first launch. `compile_ahead` runs the step with nothing launched that is not compiled yet, remembers what would
have been, and compiles and loads all of it at once: with each kernel comes a launcher in C, for which Triton starts a
compiler of its own. Triton keeps the results on disk, so the next process finds them there.

Through two of Triton's own places (3.6 to 3.9): the hook that is asked before a kernel is compiled, and
`JITFunction.preload`, which compiles what the hook was told.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch

from dsi_kernels._triton import INSTALLED, INTERPRETED, triton

THREADS = 16


def compile_ahead(run: Callable[[], object], device: torch.device) -> int:
    """How many kernels were compiled: all that run() would launch on the device and that this process has not.

    Args:
        run: launches kernels on the current stream. Those that are compiled do run, the others leave what they would
            have written as it is, so it must not decide by what it computes, and all it writes must be free to be
            written again.
        device: a CUDA device; nothing is done for another, nor where Triton is not there.

    Raises:
        whatever the compiler does, the first of several.
    """
    if not INSTALLED or INTERPRETED or device.type != "cuda":
        return 0
    with _collected() as wanted:
        run()
    if not wanted:
        return 0

    def compile_one(kernel: Any, facts: str) -> None:
        # a thread of its own begins on the first device
        with torch.cuda.device(device):
            compiled = kernel.preload(facts)
            # one that does not fit the device says so where it is launched
            with suppress(triton.runtime.errors.OutOfResources):
                # loads it, and sees to its launcher
                _ = compiled.run

    with ThreadPoolExecutor(min(THREADS, len(wanted), os.cpu_count() or 1)) as pool:
        for future in [pool.submit(compile_one, kernel, facts) for (_, facts), kernel in wanted.items()]:
            future.result()
    return len(wanted)


@contextmanager
def _collected() -> Iterator[dict[tuple[int, str], Any]]:
    """In this context, and thread, a kernel that is not compiled is remembered and not launched."""
    found: dict[tuple[int, str], Any] = {}
    before, here = triton.knobs.runtime.jit_cache_hook, threading.get_ident()

    def remember(**told: Any) -> Any:
        if threading.get_ident() != here:
            return before(**told) if before else None
        kernel = told["fn"].jit_function
        found[id(kernel), told["compile"]["specialization_data"]] = kernel
        return True

    triton.knobs.runtime.jit_cache_hook = remember
    try:
        yield found
    finally:
        triton.knobs.runtime.jit_cache_hook = before
