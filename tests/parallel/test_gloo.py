"""Several ranks that are processes, over gloo: what they compute, and what is said and left when one of them fails."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from dsi import ranks
from dsi.errors import RankError
from dsi.parallel import run_gloo
from dsi.ranks import Ask
from tests.core.twins import FP32, distance
from tests.parallel import ranks_at_work
from tests.parallel.families import BUILT_IN, VOCABULARY, assert_agree, built_in, described

# two families of the most different layouts; all of them are `slow`
SOME = ("llama", "gpt2")


def assert_families(names, size):
    found = run_gloo(ranks_at_work.families, size, names)
    for index, name in enumerate(names):
        subject = built_in(name) if name in BUILT_IN else described(name)
        assert_agree([answers[index] for answers in found], subject.single())


def test_two_families_on_two_processes():
    assert_families(SOME, 2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("names", [BUILT_IN, tuple(VOCABULARY)], ids=["built in", "vocabulary"])
def test_every_family(names, size):
    assert_families(names, size)


@pytest.mark.slow
def test_a_model_at_hand():
    subject = described("kv_grouped, repeated")
    assert_agree(ranks.gloo(subject.model, subject.ask, 2, **subject.options), subject.single())


@pytest.mark.slow
def test_a_dimension_of_a_mesh():
    subject = built_in("llama")
    assert_agree(run_gloo(ranks_at_work.replicas, 4, "llama"), subject.single())


SCRIPT = """
import torch, torch.distributed as dist
from dsi.parallel import ProcessGroup
from tests.parallel.ranks_at_work import families

dist.init_process_group("gloo")
answers = families(ProcessGroup(), ["gpt2"])
torch.save(answers[0].outputs, f"outputs-{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_torchrun(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    wanted = built_in("gpt2").single().outputs
    for rank in range(2):
        assert distance(torch.load(tmp_path / f"outputs-{rank}.pt"), wanted) <= FP32


# --- ranks that fail --------------------------------------------------------------------------------------------------


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_a_rank_that_raises_is_named_with_what_it_said():
    with pytest.raises(RankError, match=r"^2 gloo ranks: rank 1 failed: ValueError: no more"):
        run_gloo(ranks_at_work.failing, 2, 1)


@pytest.mark.slow
def test_a_rank_that_is_killed_comes_before_those_that_miss_it():
    with pytest.raises(RankError, match=r"^3 gloo ranks: rank 1 was killed by SIGKILL"):
        run_gloo(ranks_at_work.killed, 3, 1)


@pytest.mark.slow
def test_a_rank_that_leaves():
    with pytest.raises(RankError, match=r"^2 gloo ranks: rank 1 failed: exit code 3; it said nothing"):
        run_gloo(ranks_at_work.leaving, 2, 1)


@pytest.mark.slow
def test_a_rank_that_is_stuck_ends_in_time():
    started = time.monotonic()
    with pytest.raises(RankError, match=r"^2 gloo ranks: rank 1 had not finished after 25 s$"):
        run_gloo(ranks_at_work.stuck, 2, 1, timeout=25)
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_a_rank_that_sums_less_often_is_missed_in_time():
    started = time.monotonic()
    with pytest.raises(RankError, match=r"rank . of 2: sum 2 failed|had not finished after 20 s"):
        run_gloo(_uneven, 2, timeout=20)
    assert time.monotonic() - started < 25


def _uneven(group):
    for _ in range(2 - group.rank):
        group.all_reduce(torch.ones(1))
    time.sleep(60 * group.rank)


def test_work_that_cannot_be_sent():
    with pytest.raises(RankError, match=r"the ranks cannot be given .*lambda.* and its arguments"):
        run_gloo(lambda group: None, 2)


@pytest.mark.slow
def test_sums_and_layouts():
    assert run_gloo(ranks_at_work.sums, 3, 2) == [[3.0, 6.0]] * 3
    wanted = 2 * torch.arange(6.0).view(2, 3).t()
    assert all(torch.equal(found, wanted) for found in run_gloo(ranks_at_work.strided_sum, 2))


@pytest.mark.slow
def test_nobody_outlives_the_call_or_the_caller(tmp_path: Path):
    before = children()
    with pytest.raises(RankError):
        run_gloo(math.hypot, 2)
    assert children() <= before

    code = (
        "from dsi.parallel import run_gloo\n"
        "from tests.parallel.ranks_at_work import sleeping\n"
        f"run_gloo(sleeping, 2, {str(tmp_path)!r})"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    pids = [_wait_for(tmp_path / f"{rank}.pid") for rank in range(2)]
    caller.kill()
    caller.wait()
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank outlived its caller"
        time.sleep(0.1)


def _wait_for(path: Path) -> int:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return int(path.read_text())


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_an_ask_for_the_forward_alone():
    subject = built_in("bert")
    assert Ask(subject.ask.inputs)(_Engine()).tokens is None


class _Engine:
    def __call__(self, **inputs):
        return torch.ones(1), [torch.zeros(1)], torch.ones(1, dtype=torch.long)
