"""The ranks that hold one model together, as the layers see them: a number, a size, and a sum over all.

`ProcessGroup` is torch.distributed's, whatever its backend: NCCL on GPUs, gloo on CPU; who launches the processes and
sets the group up is torchrun's business, or the caller's. `dsi.parallel.lockstep` has ranks that are threads.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from dsi.errors import RankError


class Group(Protocol):
    """What a layer needs of its ranks."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, the same bits on every rank; x may be overwritten."""


class ProcessGroup:
    """A group of torch.distributed.

    Args:
        group: a process group, e.g. a `DeviceMesh` dimension's; the default group where left out.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sums = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, written over x where it is contiguous.

        Raises:
            RankError: a rank is gone, or did not come within the group's timeout.
        """
        self.sums += 1
        x = x.contiguous()
        try:
            dist.all_reduce(x, group=self.group)
        except RuntimeError as error:
            raise RankError(f"rank {self.rank} of {self.size}: sum {self.sums} failed: {error}") from error
        return x

    def __deepcopy__(self, memo: Any) -> ProcessGroup:
        """Itself: a copy of a model talks to the same ranks."""
        return self

    def __reduce__(self) -> Any:
        raise RankError(f"rank {self.rank} of {self.size}: a model that is split over ranks cannot be pickled")
