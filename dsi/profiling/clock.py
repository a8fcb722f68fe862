"""Intervals on the host's clock or, on CUDA, between two events on the device, read later in one synchronisation."""

from __future__ import annotations

import time
from typing import Protocol

import attrs
import torch


class Interval(Protocol):
    """A running or finished measurement."""

    def stop(self) -> None:
        """End the measurement."""

    def milliseconds(self) -> float:
        """Its length; on CUDA this waits for the device."""


@attrs.define
class HostInterval:
    """Wall-clock time; with `synchronize` the device's queue is drained first and last."""

    synchronize: bool = False
    start: float = 0.0
    end: float = 0.0

    def __attrs_post_init__(self) -> None:
        self._drain()
        self.start = time.perf_counter()

    def stop(self) -> None:
        self._drain()
        self.end = time.perf_counter()

    def milliseconds(self) -> float:
        return (self.end - self.start) * 1e3

    def _drain(self) -> None:
        if self.synchronize:
            torch.cuda.synchronize()


class EventInterval:
    """Time between two CUDA events on the current stream."""

    def __init__(self) -> None:
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self._start.record()

    def stop(self) -> None:
        self._end.record()

    def milliseconds(self) -> float:
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end))


def start_interval(device: torch.device, *, use_cuda_events: bool) -> Interval:
    """A measurement of work on `device` that runs from now on."""
    if device.type != "cuda":
        return HostInterval()
    return EventInterval() if use_cuda_events else HostInterval(synchronize=True)
