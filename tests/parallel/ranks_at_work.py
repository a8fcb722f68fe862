"""What ranks in processes of their own do in the tests: functions that a fresh interpreter can import."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from dsi.parallel import ProcessGroup
from dsi.ranks import Answer, init_rank
from tests.parallel.families import BUILT_IN, built_in, described


def families(group: ProcessGroup, names: Sequence[str]) -> list[Answer]:
    """Each family, built anew by every rank, split and asked."""
    torch.set_num_threads(1)
    answers = []
    for name in names:
        subject = built_in(name) if name in BUILT_IN else described(name)
        answers.append(subject.ask(init_rank(subject.model, group, strict=True, **subject.options)))
    return answers


def replicas(group: ProcessGroup, name: str) -> Answer:
    """Two replicas of a family, each split over the two ranks of a dimension of a mesh."""
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2, group.size // 2), mesh_dim_names=("replica", "split"))
    subject = built_in(name)
    part = ProcessGroup(mesh.get_group("split"))
    assert (part.rank, part.size) == (group.rank % 2, 2)
    return subject.ask(init_rank(subject.model, part, strict=True))


def sums(group: ProcessGroup, times: int) -> list[float]:
    return [float(group.all_reduce(torch.tensor([float(group.rank + n)]))) for n in range(times)]


def strided_sum(group: ProcessGroup) -> torch.Tensor:
    return group.all_reduce(torch.arange(6.0).view(2, 3).t())


def failing(group: ProcessGroup, rank: int) -> Any:
    if group.rank == rank:
        raise ValueError("no more")
    return group.all_reduce(torch.ones(1))


def killed(group: ProcessGroup, rank: int) -> Any:
    group.all_reduce(torch.ones(1))
    if group.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return group.all_reduce(torch.ones(1))


def leaving(group: ProcessGroup, rank: int) -> Any:
    if group.rank == rank:
        os._exit(3)
    return group.all_reduce(torch.ones(1))


def stuck(group: ProcessGroup, rank: int) -> Any:
    while group.rank == rank:
        time.sleep(1)
    return None


def sleeping(group: ProcessGroup, folder: str) -> None:
    """Tells its process id and sleeps."""
    with open(os.path.join(folder, f"{group.rank}.pid"), "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)
