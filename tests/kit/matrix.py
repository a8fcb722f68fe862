"""The matrix of mutants and checks: `python -m tests.kit.matrix`.

Two gates: every mutant dies by the checks that must kill it, and every check that can run here has a mutant that only
it kills.

    --fast          each mutant meets the checks that must kill it, nothing else
    --alone         mutants that a single check must kill: all that the second gate needs
    --only NAME     mutants whose name holds this
    --without NAME  a check that is left out, e.g. the processes of tp_processes
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Iterator, Sequence

# before anything imports huggingface_hub or torch
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import attrs
import torch
import transformers

from dsi.registry import Registry
from dsi.testing.runner import Expectations, checks_of, run_checks
from tests.kit.mutants import MUTANTS, Mutant

# no machine can run these yet: nothing registers a quantizer
NEVER_RUN = frozenset({"quantized"})
_NEED_CUDA = frozenset({"device_moves", "cuda_graph_replay"})


@attrs.frozen(kw_only=True)
class Verdict:
    """What became of one mutant.

    Args:
        mutant: which.
        killers: checks that failed on it.
        seen: checks that it met.
    """

    mutant: Mutant
    killers: tuple[str, ...]
    seen: frozenset[str]

    @property
    def faults(self) -> Iterator[str]:
        """What is wrong with the kit, by this mutant."""
        if not self.killers:
            yield f"{self.mutant.name}: survives"
        missing = [name for name in self.mutant.by if name in self.seen and name not in self.killers]
        if missing:
            yield f"{self.mutant.name}: not killed by {', '.join(missing)}"
        others = [name for name in self.killers if name not in self.mutant.by]
        if self.mutant.alone and others:
            yield f"{self.mutant.name}: killed by {', '.join(others)} too"


def judge(mutant: Mutant, *, only: Collection[str] | None = None, without: Collection[str] = ()) -> Verdict:
    """Let one mutant meet the checks.

    Args:
        mutant: which.
        only: these checks; None for all.
        without: checks to leave out.
    """
    with mutant.subject() as subject:
        checks = {
            name: check
            for name, check in checks_of(subject.registry).items()
            if (only is None or name in only) and name not in without
        }
        report = run_checks(subject, checks, Expectations())
    killers = tuple(row.check for row in report.rows if row.status == "fail")
    return Verdict(mutant=mutant, killers=killers, seen=frozenset(checks))


def gate_checks(verdicts: Sequence[Verdict], checks: Collection[str]) -> list[str]:
    """Checks that no mutant needs: none of them is killed by that check alone."""
    needed = {verdict.killers[0] for verdict in verdicts if len(verdict.killers) == 1}
    exempt = NEVER_RUN | (frozenset() if torch.cuda.is_available() else _NEED_CUDA)
    return [f"{name}: no mutant is killed by it alone" for name in checks if name not in needed | exempt]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the matrix; 1 where a gate is broken."""
    parser = argparse.ArgumentParser(description="The matrix of mutants and checks.")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--without", action="append", default=[])
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    checks = [name for name in checks_of(Registry.load()) if name not in args.without]
    verdicts = []
    for mutant in (one for one in MUTANTS if args.only in one.name and (one.alone or not args.alone)):
        if not mutant.runs_here:
            _say(f"  {'not run here':<44} {mutant.name} (needs {mutant.needs})")
            continue
        verdict = judge(mutant, only=mutant.by if args.fast else None, without=args.without)
        verdicts.append(verdict)
        _say(f"{_marks(verdict, checks)}  {mutant.name}: {', '.join(verdict.killers) or 'SURVIVES'}")
    faults = [fault for verdict in verdicts for fault in verdict.faults]
    if not args.fast and not args.only:
        faults += gate_checks(verdicts, checks)
    for fault in faults:
        _say(f"FAULT {fault}")
    dead = sum(bool(verdict.killers) for verdict in verdicts)
    _say(f"{len(checks)} checks, {len(verdicts)} mutants: {dead} dead, {len(faults)} faults")
    return 1 if faults else 0


def _marks(verdict: Verdict, checks: Sequence[str]) -> str:
    """One sign a check: x killed, . passed or not run, blank not met."""
    return "".join("x" if c in verdict.killers else "." if c in verdict.seen else " " for c in checks)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
