"""A kernel that is launched past Triton's look-up: when it is, when not, and with what."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from dsi_kernels import _launch
from dsi_kernels._launch import Launch, Launches, kind_of


class OnDevice(torch.Tensor):
    """A tensor that says it is on a GPU, at an address of one's choice."""

    address = 64
    is_cuda = True
    device = torch.device("cuda", 0)

    def data_ptr(self) -> int:
        return self.address


class Kernel:
    """Stands for a jit function and for what it compiles to: notes who launches."""

    def __init__(self) -> None:
        self.launched: list[tuple[str, Any, Any]] = []

    def __getitem__(self, grid: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            self.launched.append(("looked up", grid, (args[-1], options)))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args: self.kernel.launched.append(("at once", grid, args))


@pytest.fixture
def launched(monkeypatch: Any) -> tuple[Launch, Kernel]:
    kernel = Kernel()
    monkeypatch.setattr(_launch, "INSTALLED", True)
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
    return Launch(kernel, (3, 2), (7, "silu"), {"num_warps": 2}), kernel


def tensor(address: int = 64) -> OnDevice:
    made = torch.empty(1).as_subclass(OnDevice)
    made.address = address
    return made


def test_the_second_launch_goes_past_the_look_up(launched):
    launch, kernel = launched
    one, other = tensor(), tensor(128)
    launch(one, None)
    assert kernel.launched == [("looked up", (3, 2, 1), ("silu", {"num_warps": 2}))]
    launch(other, None)
    assert kernel.launched[1][:2] == ("at once", (3, 2, 1))
    args = kernel.launched[1][2]
    assert args[0] is other
    assert args[1:] == (None, 7, "silu")


@pytest.mark.parametrize("place", [0, 1])
def test_an_odd_address_is_looked_up(place, launched):
    launch, kernel = launched
    odd = [tensor(), tensor()]
    odd[place].address = 72
    # and what was compiled for it is not for others
    for given in (odd, [tensor(), tensor()], odd, [tensor(), tensor()]):
        launch(*given)
    assert [how for how, _, _ in kernel.launched] == ["looked up", "looked up", "looked up", "at once"]


def test_another_device_is_looked_up(launched, monkeypatch):
    launch, kernel = launched
    launch(tensor())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launch(tensor())
    assert [how for how, _, _ in kernel.launched] == ["looked up", "looked up"]


def test_an_empty_grid_is_not_launched(launched):
    _, kernel = launched
    Launch(kernel, (0,), (), {})(tensor())
    assert not kernel.launched


def test_launches_are_made_once_and_are_not_too_many(monkeypatch):
    monkeypatch.setattr(_launch, "KEPT", 3)
    launches, made = Launches(), []

    def make() -> Launch:
        made.append(Launch(None, (1,), (), {}))
        return made[-1]

    assert launches.get(1, make) is launches.get(1, make) is made[0]
    for key in range(8):
        launches.get(key, make)
    assert len(launches._known) <= 3


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(2, 5),
        torch.zeros(2, 4, dtype=torch.half),
        torch.zeros(4, 2).t(),
        torch.zeros(2, 4, device="meta"),
        None,
    ],
    ids=["shape", "dtype", "stride", "device", "none"],
)
def test_operands_of_another_kind(other):
    one = torch.zeros(2, 4)
    assert kind_of(one, one) == kind_of(torch.ones(2, 4), one) != kind_of(one, other)
    assert hash(kind_of(one, None)) == hash(kind_of(torch.ones(2, 4), None))
