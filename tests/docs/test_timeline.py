"""benchmarks/timeline.py finds a step among many, and whose time is whose where kernels lie over each other."""

from __future__ import annotations

import importlib.util
import sys

import pytest


@pytest.fixture
def timeline(root):
    spec = importlib.util.spec_from_file_location("benchmarks_timeline", root / "benchmarks" / "timeline.py")
    found = importlib.util.module_from_spec(spec)
    # attrs looks its classes' module up
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    yield found
    del sys.modules[spec.name]


def _kernels(timeline, names, spacing=10.0, length=8.0):
    return [
        timeline.Kernel(name=name, start=place * spacing, end=place * spacing + length)
        for place, name in enumerate(names)
    ]


def test_a_step_is_what_repeats_not_a_layer(timeline):
    names = [*"pppp", *(["embed", *["qkv", "out"] * 3, "head"] * 9), "copy"]
    step, whole = timeline.one_step(_kernels(timeline, names), 9)
    assert sorted(kernel.name for kernel in step) == sorted(["embed", *["qkv", "out"] * 3, "head"])
    assert whole == 80.0


def test_nothing_repeats(timeline):
    with pytest.raises(ValueError, match="no kernel ran about 10 times"):
        timeline.one_step(_kernels(timeline, [str(place) for place in range(40)]), 10)


def test_times_that_lie_over_each_other_count_once(timeline):
    step = [
        timeline.Kernel(name="first", start=0, end=10),
        # waits from 4 on, works from 10 to 13
        timeline.Kernel(name="second", start=4, end=13),
        timeline.Kernel(name="inside", start=5, end=6),
        timeline.Kernel(name="third", start=15, end=20),
    ]
    found = {share.name: share for share in timeline.shares(step)}
    assert {name: share.own for name, share in found.items()} == {"first": 10, "second": 3, "inside": 0, "third": 5}
    assert found["second"].total == 9
    text = timeline.report(step, 22.0)
    assert "22.0 us the step: 18.0 busy in 4 kernels, 4.0 in gaps; 7.0 of the kernels' times lie over" in text
