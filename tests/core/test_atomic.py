"""Whatever fails, and whenever, a failed injection leaves the model bitwise what it was.

SQLite's method: fail the n-th operation, for n = 1, 2, ... until the run succeeds.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import sys
import weakref

import pytest
import torch

import dsi
from dsi import inject as injecting
from dsi.config import load_config
from dsi.containers import linear, stand_in
from dsi.engine import attach_session
from dsi.inject import Journal, Step, inject
from dsi.planner import make_plan
from dsi.registry import Registry
from tests.core.twins import LARGE, assert_same_bits, containers, one_layer
from tests.support import FAMILIES, difference, fingerprint, inputs_for, tiny

# every weight layout: Conv1D, biases and none, tied, parameters beside the layers; two layers and one
ATOMIC = ("bert", "gpt2", "opt_post_norm", "llama_mha", "clip_vision")
CASTS = (None, "bfloat16", "float16")
ERRORS = (
    ValueError("a fault"),
    torch.OutOfMemoryError("no memory on the device"),
    MemoryError("no memory"),
    KeyboardInterrupt(),
)


class Fuse:
    """Blows at the n-th call."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.at, self.error, self.calls = at, error, 0

    def burn(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise self.error

    def before(self, function):
        def wrapped(*args, **kwargs):
            self.burn()
            return function(*args, **kwargs)

        return wrapped

    def after(self, function):
        def wrapped(*args, **kwargs):
            result = function(*args, **kwargs)
            self.burn()
            return result

        return wrapped


def kind_of(error):
    return dsi.InjectionError if isinstance(error, Exception) else type(error)


class Subject:
    """A model, what it is and what it does."""

    def __init__(self, family, head=None, **overrides):
        self.family = family
        self.model = tiny(family, head, **overrides)
        # a run may leave traces of its own, such as frequencies for long texts
        self.output = self.run()
        self.before = fingerprint(self.model)

    def run(self):
        with torch.no_grad():
            return self.model(**inputs_for(self.family, 2, 6, "ragged"))

    def assert_unchanged(self):
        assert difference(self.before, fingerprint(self.model)) == []

    def assert_runs_as_before(self):
        assert_same_bits(self.run(), self.output)


def attempt(model, kind, **config):
    """(engine, None), or (None, the error)."""
    try:
        return dsi.init_inference(model, config), None
    except kind as raised:
        return None, raised


def fail_each(subject, patch_point, dtype, error, *, limit=500):
    """Fail the first, second, ... operation; returns how many there are."""
    for at in itertools.count(1):
        assert at < limit
        fuse = Fuse(at, error)
        with pytest.MonkeyPatch.context() as patch:
            patch_point(patch, fuse)
            engine, raised = attempt(subject.model, kind_of(error), dtype=dtype, keep_original="host")
        if engine is not None:
            break
        if isinstance(error, Exception):
            assert raised.__cause__ is error
            assert "the model is what it was before" in str(raised)
        subject.assert_unchanged()
    assert fuse.calls < at, "an error was swallowed"
    engine.restore()
    subject.assert_unchanged()
    subject.assert_runs_as_before()
    return at - 1


def each_step(patch, fuse):
    patch.setattr(Journal, "do", fuse.before(Journal.do))


def after_each_step(patch, fuse):
    patch.setattr(Journal, "do", fuse.after(Journal.do))


def each_act(patch, fuse):
    def do(journal, step):
        journal._steps.append(step)
        fuse.burn()
        step.act()

    patch.setattr(Journal, "do", do)


@pytest.mark.parametrize("dtype", CASTS)
@pytest.mark.parametrize("family", ATOMIC)
def test_a_fault_before_every_step(family, dtype):
    subject = Subject(family)
    # six places and their layer, two layers
    assert fail_each(subject, each_step, dtype, ValueError("a fault")) > 2 * 7


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("point", [each_act, after_each_step])
@pytest.mark.parametrize("family", ["gpt2", "llama_mha"])
def test_a_fault_in_and_after_every_step(family, point, dtype):
    subject = Subject(family, **one_layer(family))
    assert fail_each(subject, point, dtype, ValueError("a fault")) > 7


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_every_kind_of_fault(error, dtype):
    subject = Subject("llama_mha", num_hidden_layers=1)
    assert fail_each(subject, each_step, dtype, error) > 7


ALLOCATIONS = {
    "cat": lambda patch, fuse: patch.setattr(torch, "cat", fuse.before(torch.cat)),
    "cast": lambda patch, fuse: patch.setattr(injecting, "cast_with_residue", fuse.before(injecting.cast_with_residue)),
    "stack": lambda patch, fuse: patch.setattr(injecting, "stack", fuse.after(injecting.stack)),
    "pack": lambda patch, fuse: patch.setattr(linear, "_pack", fuse.before(linear._pack)),
    "parked": lambda patch, fuse: patch.setattr(injecting, "parked", fuse.before(injecting.parked)),
    "fused class": lambda patch, fuse: patch.setattr(injecting, "fused_class", fuse.before(injecting.fused_class)),
    "finish": lambda patch, fuse: patch.setattr(stand_in, "choose_ops", fuse.before(stand_in.choose_ops)),
}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_no_memory_in_the_midst_of_a_step(family, allocation, dtype):
    subject = Subject(family, **(LARGE[family] if allocation == "pack" else one_layer(family)))
    failed = fail_each(subject, ALLOCATIONS[allocation], dtype, torch.OutOfMemoryError("no memory"))
    # 16 bits are not packed on a processor that multiplies them in fp32
    assert failed or (allocation == "pack" and dtype)


def test_no_memory_for_what_a_cast_loses(monkeypatch):
    subject = Subject("llama")
    residue = injecting.Residue
    failed = fail_each(
        subject,
        lambda patch, fuse: patch.setattr(residue, "to_host", fuse.before(residue.to_host)),
        "bfloat16",
        MemoryError("no memory on the host"),
    )
    assert failed > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fault_at_the_very_end(family):
    subject = Subject(family)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dsi.engine, "attach_session", Fuse(1, ValueError("late")).before(attach_session))
        with pytest.raises(
            dsi.InjectionError, match=r"step \d+ failed; the model is what it was before: ValueError\('late'\)"
        ):
            dsi.init_inference(subject.model, dtype="bfloat16")
    subject.assert_unchanged()
    subject.assert_runs_as_before()
    assert len(dsi.init_inference(subject.model).plan.blocks) >= 2


# --- interrupts ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def interrupted_at_line(number):
    """Ctrl-C before the n-th line that runs where weights change hands; the list is filled once it was pressed."""
    lines, pressed = itertools.count(1), []

    def trace(frame, event, _argument):
        if frame.f_code.co_filename not in (injecting.__file__, linear.__file__):
            return None
        if event == "line" and next(lines) == number:
            pressed.append(frame.f_code.co_qualname)
            raise KeyboardInterrupt
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        yield pressed
    finally:
        sys.settrace(outer)


@pytest.mark.parametrize(("family", "dtype"), [("gpt2", None), ("llama_mha", "bfloat16")])
def test_an_interrupt_before_any_line(family, dtype):
    subject = Subject(family, **one_layer(family))
    # nothing of what the cast loses is kept beyond the last step
    config, registry = load_config({"dtype": dtype} if dtype else {}), Registry.load()
    plan = make_plan(subject.model, config, registry)
    for number in itertools.count(1):
        with contextlib.suppress(KeyboardInterrupt), interrupted_at_line(number) as pressed:
            inject(subject.model, plan, config)
        if not pressed:
            break
        subject.assert_unchanged()
    assert number > 200
    assert len(containers(subject.model)) == 1


def test_an_interrupt_on_the_way_back():
    subject = Subject("llama_mha", num_hidden_layers=1)
    config, registry = load_config({"dtype": "float16", "keep_original": "host"}), Registry.load()
    plan = make_plan(subject.model, config, registry)
    for number in itertools.count(1):
        injection = inject(subject.model, plan, config)
        steps = len(injection.journal)
        with contextlib.suppress(KeyboardInterrupt), interrupted_at_line(number) as pressed:
            injection.undo()
        # before or after all steps back; between two of them only for the loop's own line
        assert len(injection.journal) in (0, steps) or pressed == ["Journal.undo"]
        injection.undo()
        subject.assert_unchanged()
        if not pressed:
            break
    assert number > 100
    subject.assert_runs_as_before()


# --- the journal --------------------------------------------------------------------------------------------------


def test_an_undo_that_fails_does_not_stop_the_others_and_is_tried_again():
    done, broken = [], [True]

    def undo(name):
        def run():
            if name == "b" and broken[0]:
                raise MemoryError("no memory for b")
            done.append(name)

        return run

    journal = Journal()
    for name in "abc":
        journal.do(Step(lambda: None, undo(name)))
    with pytest.raises(dsi.RestoreError, match="1 steps could not be taken back: MemoryError"):
        journal.undo()
    assert done == ["c", "a"]
    assert len(journal) == 1
    broken[0] = False
    journal.undo()
    assert done == ["c", "a", "b"]
    assert len(journal) == 0


def test_no_memory_on_the_way_back_is_told_and_can_be_tried_again(monkeypatch):
    subject = Subject("llama")
    engine = dsi.init_inference(subject.model)
    with monkeypatch.context() as patch:
        patch.setattr(injecting, "_as_it_was", Fuse(3, MemoryError("no memory")).before(injecting._as_it_was))
        with pytest.raises(dsi.RestoreError, match="could not be taken back"):
            engine.restore()
    assert engine.active
    engine.restore()
    assert not engine.active
    subject.assert_unchanged()
    subject.assert_runs_as_before()


# --- what an error keeps ------------------------------------------------------------------------------------------


def test_an_error_for_lack_of_memory_keeps_no_tensor_alive():
    subject = Subject("llama")
    held = []

    class Watched(linear.FusedLinear):
        def __init__(self, weight, *args):
            super().__init__(weight, *args)
            held.append(weakref.ref(self.weight))
            if len(held) == 6:
                raise torch.OutOfMemoryError("no memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(injecting, "FusedLinear", Watched)
        try:
            dsi.init_inference(subject.model)
        except dsi.InjectionError as error:
            kept = error
    gc.collect()
    assert [ref() is None for ref in held] == [True] * 6
    assert isinstance(kept.__cause__, torch.OutOfMemoryError)


def test_the_error_is_chained_and_names_the_step():
    subject = Subject("bert")
    error = ValueError("the fault")
    with pytest.MonkeyPatch.context() as patch:
        each_step(patch, Fuse(5, error))
        with pytest.raises(dsi.InjectionError, match="step 5 failed") as raised:
            dsi.init_inference(subject.model)
    assert raised.value.__cause__ is error
    assert not containers(subject.model)


def test_errors_before_the_first_step_change_nothing():
    subject = Subject("llama")
    for config in (
        {"dtype": "float12"},
        {"max_out_tokens": -1},
        {"injection_policy": "no:such"},
        {"enable_cuda_graph": True},
    ):
        with pytest.raises(dsi.DsiError):
            dsi.init_inference(subject.model, config)
        subject.assert_unchanged()
