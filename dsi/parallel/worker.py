"""One rank of `dsi.parallel.run_gloo`: joins the others, does its work, and writes down what came of it."""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dsi.parallel.groups import ProcessGroup
from dsi.parallel.parcel import get, put


def main(folder: Path, rank: int) -> None:
    """Run as a process of its own; exits with 1 after an error, which is then in `error-RANK.txt`."""
    threading.Thread(target=_die_with_caller, daemon=True).start()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        result = _work(folder, rank)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the caller wants to know
        (folder / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        # not through the interpreter's exit: a broken group may wait there for ranks that are gone
        os._exit(1)
    put(folder / f"result-{rank}.pt", result)
    dist.destroy_process_group()


def _work(folder: Path, rank: int) -> object:
    given = get(folder / "work.pt")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=given["size"],
        timeout=timedelta(seconds=given["timeout"]),
    )
    with torch.no_grad():
        result: object = given["work"](ProcessGroup(), *given["args"])
    return result


def _die_with_caller() -> None:
    # the other end of this pipe is the caller's: it closes when the caller dies, however that is. Past sys.stdin, whose
    # lock this thread would hold when the interpreter ends
    os.read(0, 1)
    os._exit(1)
