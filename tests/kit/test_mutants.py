"""The kit finds what is broken: every mutant dies, and every check is needed.

The fast form is here: each mutant meets the checks that must kill it. That no other check kills those which are to die
alone is the slow form's, which is also `make kit-matrix`.
"""

from __future__ import annotations

import contextlib

import attrs
import pytest

from dsi.registry import Registry
from dsi.testing.runner import checks_of
from tests.kit.matrix import NEVER_RUN, gate_checks, judge
from tests.kit.mutants import MUTANTS

# two interpreters, seconds each
PROCESSES = "tp_processes"
FAST = [mutant for mutant in MUTANTS if PROCESSES not in mutant.by]


def test_there_are_enough():
    assert len(MUTANTS) >= 60
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_every_check_is_said_to_be_needed():
    checks = checks_of(Registry.load())
    named = {name for mutant in MUTANTS for name in mutant.by}
    assert named <= checks.keys()
    needed = {mutant.by[0] for mutant in MUTANTS if mutant.alone}
    own = {name for name in checks if ":" not in name}
    assert own - needed == NEVER_RUN


@pytest.mark.parametrize("mutant", FAST, ids=lambda mutant: mutant.name)
def test_a_mutant_dies(mutant):
    if not mutant.runs_here:
        pytest.skip(f"needs {mutant.needs}")
    assert list(judge(mutant, only=mutant.by).faults) == []


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_nothing_is_wrong_with_what_they_are_mutants_of(family):
    whole = next(mutant for mutant in MUTANTS if mutant.family == family)
    sound = attrs.evolve(whole, change=lambda policy: policy, around=contextlib.nullcontext, plugin="")
    assert judge(sound, without=[PROCESSES]).killers == ()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_matrix():
    verdicts = [judge(mutant) for mutant in MUTANTS if mutant.runs_here]
    assert [fault for verdict in verdicts for fault in verdict.faults] == []
    assert gate_checks(verdicts, [name for name in checks_of(Registry.load()) if ":" not in name]) == []
