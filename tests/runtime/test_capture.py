"""What surrounds a capture, without a device: a stand-in for torch's own context that leaves its stream behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsi.runtime import capture


class Stream:
    device = "cuda:0"


class Leaving:
    """torch.cuda.graph where the end of the capture raises, which is before it leaves its stream."""

    def __init__(self, graph: Any, *, stream: Any, **_: Any) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        torch.cuda.set_stream(self.stream)

    def __exit__(self, *_: object) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")


def test_a_failed_capture_leaves_the_stream_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    before, aside = Stream(), Stream()
    current = [before]
    cleared: list[int] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    monkeypatch.setattr(torch.cuda, "graph", Leaving)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: cleared.append(1), raising=False)
    with pytest.raises(RuntimeError, match="previous error"), capture.captured(object(), None, aside):
        assert current[-1] is aside
    assert current[-1] is before
    assert len(cleared) == 2


class OnDevice(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def on_device(values: Any) -> Any:
    return torch.tensor(values).as_subclass(OnDevice)


@pytest.mark.parametrize("ask", [lambda x: float(x[0]), lambda x: bool((x > 0).all()), lambda x: x.nonzero()])
def test_what_reads_back_is_named_before_a_capture(ask: Any) -> None:
    given = on_device([1.0, 0.0])
    ask(given)
    with pytest.raises(capture.WaitsForHost, match="waits for the device"), capture.nothing_waits():
        ask(given)


def test_what_stays_on_the_device_does_not_wait() -> None:
    given = on_device([1.0, 0.0])
    with capture.nothing_waits():
        assert (given + 1).sum().shape == ()
        # of the host's own
        assert float(torch.ones(())) == 1.0
