"""Milliseconds of every forward, prefill and decode step of a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import nn

from dsi.errors import ProfilingError
from dsi.profiling.clock import Interval, start_interval

Phase = Literal["forward", "prefill", "decode"]


class ModelTime(float):
    """Milliseconds, with the phase they were spent in.

    Args:
        value: milliseconds.
        phase: "prefill" and "decode" inside `generate`, "forward" for a call of the model itself.
    """

    phase: Phase

    def __new__(cls, value: float, phase: Phase) -> ModelTime:
        time = super().__new__(cls, value)
        time.phase = phase
        return time

    def __repr__(self) -> str:
        return f"{float(self):.3f} ms {self.phase}"


class _Timed(Protocol):
    """What the timer needs of a session: a place to hang itself, and whether a generation is running."""

    timer: Any
    prompt: Any


class ModelTimer:
    """Times a model through its forward hooks, and through the decode loop that bypasses them.

    Args:
        model: the model.
        session: told of the timer, so that the decode loop reports its steps.
        use_cuda_events: see `InferenceEngine.profile_model_time`.
    """

    def __init__(self, model: nn.Module, session: _Timed, *, use_cuda_events: bool = True) -> None:
        self._device = next(model.parameters()).device
        self._events = use_cuda_events
        self._session = session
        self._finished: list[tuple[Phase, Interval]] = []
        self._guard = threading.Lock()
        self._local = threading.local()
        self._hooks = [
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        session.timer = self

    def close(self) -> None:
        """Remove the hooks and let go of the session."""
        for hook in self._hooks:
            hook.remove()
        self._session.timer = None

    @staticmethod
    def read(timer: ModelTimer | None) -> list[ModelTime]:
        """The times since the last reading, cleared.

        Raises:
            ProfilingError: there is no timer.
        """
        if timer is None:
            raise ProfilingError("model times are not being recorded", hint="call profile_model_time() first")
        with timer._guard:
            finished, timer._finished = timer._finished, []
        return [ModelTime(interval.milliseconds(), phase) for phase, interval in finished]

    # --- the decode loop's side -------------------------------------------------------------------------------

    @contextmanager
    def prefill(self) -> Iterator[None]:
        """The forward over a prompt, once; the model's own hooks keep silent meanwhile."""
        with self._measure("prefill"):
            yield

    @contextmanager
    def decode(self) -> Iterator[None]:
        """One step after it."""
        with self._measure("decode"):
            yield

    @contextmanager
    def _measure(self, phase: Phase) -> Iterator[None]:
        self._local.inside = True
        interval = start_interval(self._device, use_cuda_events=self._events)
        try:
            yield
        finally:
            self._stop(phase, interval)
            self._local.inside = False

    # --- the model's side -------------------------------------------------------------------------------------

    def _enter(self, model: nn.Module, args: Any) -> None:
        if getattr(self._local, "inside", False) or torch.compiler.is_compiling():
            return
        interval = start_interval(self._device, use_cuda_events=self._events)
        self._starts().append((self._phase(), interval))

    def _leave(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._starts() and not getattr(self._local, "inside", False):
            self._stop(*self._starts().pop())

    def _starts(self) -> list[tuple[Phase, Interval]]:
        if not hasattr(self._local, "starts"):
            self._local.starts = []
        starts: list[tuple[Phase, Interval]] = self._local.starts
        return starts

    def _phase(self) -> Phase:
        """The first forward of a generation is its prefill."""
        prompt = self._session.prompt
        if prompt is None:
            return "forward"
        first = prompt is not getattr(self._local, "prompt", None)
        self._local.prompt = prompt
        return "prefill" if first else "decode"

    def _stop(self, phase: Phase, interval: Interval) -> None:
        interval.stop()
        with self._guard:
            self._finished.append((phase, interval))
