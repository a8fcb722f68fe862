"""Ranks as gloo processes on this machine, for tests and the conformance kit; a user's ranks are torchrun's business.

Each rank is a fresh interpreter that runs `dsi.parallel.worker`. They find one another through a file, so no port has
to be free. Whatever happens, no process is left when `run_gloo` returns, nor when the process that called it dies.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dsi.errors import RankError
from dsi.parallel.parcel import get, put

T = TypeVar("T")

# the worker's arguments are its folder and its rank; the caller's paths come first, so that its modules can be imported
_BOOT = """\
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
sys.path[:] = json.loads((folder / "paths.json").read_text())
from dsi.parallel.worker import main
main(folder, int(sys.argv[2]))
"""
# seconds between two looks at the ranks
_INTERVAL = 0.02
# seconds that the others get to say why they failed too, so that the first cause can be told from what follows
_GRACE = 0.3


def run_gloo(work: Callable[..., T], size: int, *args: Any, timeout: float = 120.0) -> list[T]:
    """What `work(group, *args)` returns on each of `size` processes, by rank.

    Args:
        work: a function of a module that can be imported. Gradients are off.
        size: number of ranks.
        *args: given to every rank; they, the results and `work` must survive pickling.
        timeout: seconds for everything, start-up included; also of each collective.

    Raises:
        RankError: a rank raised, was killed or is stuck; each of them is named, with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="dsi-ranks-") as name:
        folder = Path(name)
        _write(folder, work, size, args, timeout)
        processes: list[subprocess.Popen[bytes]] = []
        try:
            processes += (_start(folder, rank, size) for rank in range(size))
            _await(processes, folder, time.monotonic() + timeout, timeout)
        finally:
            _end(processes)
        return [get(folder / f"result-{rank}.pt") for rank in range(size)]


def _write(folder: Path, work: Callable[..., Any], size: int, args: Sequence[Any], timeout: float) -> None:
    (folder / "paths.json").write_text(json.dumps([path or os.getcwd() for path in sys.path]))
    try:
        put(folder / "work.pt", {"work": work, "args": tuple(args), "size": size, "timeout": timeout})
    except Exception as error:
        raise RankError(
            f"the ranks cannot be given {getattr(work, '__qualname__', work)!r} and its arguments: {error}",
            hint="take functions and classes of importable modules, no lambdas or local ones",
        ) from error


def _start(folder: Path, rank: int, size: int) -> subprocess.Popen[bytes]:
    threads = str(max(1, (os.cpu_count() or 1) // size))
    env = {"OMP_NUM_THREADS": threads, "GLOO_SOCKET_IFNAME": _loopback(), **os.environ}
    return subprocess.Popen(
        [sys.executable, "-c", _BOOT, str(folder), str(rank)],
        # held open by this process alone: a worker that reads its end knows that nobody waits for it
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=(folder / f"stderr-{rank}.txt").open("wb"),
        env={name: value for name, value in env.items() if value},
    )


def _loopback() -> str:
    known = {"lo", "lo0"} & set(os.listdir("/sys/class/net")) if os.path.isdir("/sys/class/net") else set()
    return min(known, default="")


def _await(processes: Sequence[subprocess.Popen[bytes]], folder: Path, deadline: float, timeout: float) -> None:
    """Return once every rank has finished well."""
    while True:
        codes = [process.poll() for process in processes]
        if all(code == 0 for code in codes):
            return
        failed = any(code not in (None, 0) for code in codes)
        if failed or time.monotonic() > deadline:
            if failed:
                time.sleep(_GRACE)
            raise RankError(_story(processes, folder, timeout))
        time.sleep(_INTERVAL)


def _story(processes: Sequence[subprocess.Popen[bytes]], folder: Path, timeout: float) -> str:
    """What became of every rank that did not finish well, first causes first."""
    told: list[tuple[int, str]] = []
    for rank, process in enumerate(processes):
        code = process.poll()
        if code is None:
            told.append((2, f"rank {rank} had not finished" + ("" if told else f" after {timeout:g} s")))
        elif code < 0:
            told.append((0, f"rank {rank} was killed by {signal.Signals(-code).name}"))
        elif code > 0:
            error = folder / f"error-{rank}.txt"
            words = error.read_text() if error.exists() else f"exit code {code}; {_last_line(folder, rank)}"
            told.append((1 if "RankError" in words else 0, f"rank {rank} failed: {words}"))
    return f"{len(processes)} gloo ranks: " + "; ".join(text for _, text in sorted(told, key=lambda one: one[0]))


def _last_line(folder: Path, rank: int) -> str:
    lines = (folder / f"stderr-{rank}.txt").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()
        if process.stdin is not None:
            process.stdin.close()
