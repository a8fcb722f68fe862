"""Ranks as threads of one process that meet at every sum: what several ranks compute, without launching any.

The sums are taken in the order of the ranks by every rank for itself, so that results are the same bits on every rank
and from run to run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from dsi.errors import RankError

T = TypeVar("T")


class Meeting:
    """Where the threads meet.

    Args:
        size: how many.
        timeout: seconds that one waits for the others.
    """

    def __init__(self, size: int, timeout: float) -> None:
        self.size, self.timeout = size, timeout
        self.failure = ""
        self._changed = threading.Condition()
        self._turns = [0] * size
        self._gone: set[int] = set()
        # a rank can be one meeting ahead of one that still reads, never two
        self._given: tuple[list[Any], list[Any]] = ([None] * size, [None] * size)

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        """Every rank's tensor, in their order.

        Raises:
            RankError: a rank failed, finished without this meeting, or did not come in time.
        """
        with self._changed:
            turn = self._turns[rank]
            table = self._given[turn % 2]
            table[rank] = x
            self._turns[rank] += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.failure or self._complete(turn) or self._lost(turn), self.timeout)
            if not self._complete(turn):
                self.failure = self.failure or self._why(rank, turn)
                self._changed.notify_all()
                raise RankError(self.failure)
        return list(table)

    def leave(self, rank: int, failure: str = "") -> None:
        """A rank comes no more; with a failure nobody else goes on either."""
        with self._changed:
            self._gone.add(rank)
            self.failure = self.failure or failure
            self._changed.notify_all()

    def _complete(self, turn: int) -> bool:
        return min(self._turns) > turn

    def _lost(self, turn: int) -> bool:
        return any(self._turns[rank] <= turn for rank in self._gone)

    def _why(self, rank: int, turn: int) -> str:
        missing = [other for other in range(self.size) if self._turns[other] <= turn]
        ranks = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
        if self._lost(turn):
            return f"{ranks} finished after {turn} sums, and rank {rank} wants another"
        return f"{ranks} did not come to sum {turn + 1} within {self.timeout:g} s"


class ThreadGroup:
    """One rank of a meeting."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting = meeting
        self.rank, self.size = rank, meeting.size
        self.sums = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in new memory.

        Raises:
            RankError: see `Meeting.exchange`; or the ranks' tensors differ in shape or dtype.
        """
        self.sums += 1
        given = self.meeting.exchange(self.rank, x)
        kinds = [(tuple(t.shape), t.dtype) for t in given]
        if len(set(kinds)) > 1:
            raise RankError(f"sum {self.sums}: the ranks disagree: {', '.join(map(str, kinds))}")
        total = given[0].clone()
        for other in given[1:]:
            total += other
        return total

    def __deepcopy__(self, memo: Any) -> ThreadGroup:
        """Itself: a copy of a model talks to the same ranks."""
        return self

    def __reduce__(self) -> Any:
        raise RankError(f"rank {self.rank} of {self.size}: a model that is split over ranks cannot be pickled")


def thread_groups(size: int, *, timeout: float = 60.0) -> list[ThreadGroup]:
    """The groups of `size` ranks that are threads, by rank; good for one `lockstep`.

    Args:
        size: how many ranks.
        timeout: seconds that a rank waits for the others at a sum, and without a sum is waited for.
    """
    meeting = Meeting(size, timeout)
    return [ThreadGroup(meeting, rank) for rank in range(size)]


def lockstep(work: Callable[[ThreadGroup], T], groups: Sequence[ThreadGroup]) -> list[T]:
    """What `work` returns on each rank, by rank.

    Args:
        work: called once a rank, in a thread of its own, with its group. Gradients are off.
        groups: from `thread_groups`.

    Raises:
        RankError: a rank raised (the error is its cause), or did not come to a sum in time.
    """
    ranks = [_Rank(work, group) for group in groups]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        _await(rank)
    errors = [(rank.group.rank, rank.error) for rank in ranks if rank.error is not None]
    # an error of the work comes before those of the ranks that waited in vain
    for number, error in sorted(errors, key=lambda one: isinstance(one[1], RankError)):
        raise RankError(f"rank {number} of {len(ranks)} failed: {error!r}") from error
    return [rank.result for rank in ranks]


def _await(rank: _Rank) -> None:
    """Wait until the rank is done, or has not come to a sum for twice the time that the others wait."""
    group = rank.group
    sums = -1
    while rank.is_alive() and sums != group.sums:
        sums = group.sums
        rank.join(2 * group.meeting.timeout)
    if rank.is_alive():
        rank.error = RankError(f"rank {group.rank} is stuck after {sums} sums")
        group.meeting.leave(group.rank, str(rank.error))


class _Rank(threading.Thread):
    """A thread that keeps what its work returned or raised."""

    def __init__(self, work: Callable[[ThreadGroup], Any], group: ThreadGroup) -> None:
        # a daemon: a rank that is stuck for good must not keep the process alive
        super().__init__(name=f"rank {group.rank} of {group.size}", daemon=True)
        self.work, self.group = work, group
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with torch.no_grad():
                self.result = self.work(self.group)
        except BaseException as error:  # noqa: BLE001 - it is raised again where the ranks are awaited
            self.error = error
            self.group.meeting.leave(self.group.rank, f"rank {self.group.rank} failed: {error!r}")
        else:
            self.group.meeting.leave(self.group.rank)
