"""`python -m tests.drafting.table [FAMILY ...]`: every family drafted, and what the conformance kit says of the draft.

No installed policy has a part in it: candidates are given to dsi by themselves, and so is the draft to the kit, which
builds its own tiny config from the classes that the draft names.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import attrs
import transformers

from dsi.drafting import Draft, draft
from dsi.errors import DsiError
from dsi.testing import Report, conformance, tiny_config
from tests.drafting.families import FAMILIES, skeleton


@attrs.frozen(kw_only=True)
class Line:
    """One family's line."""

    family: str
    draft: Draft | None
    report: Report | None
    words: str
    seconds: float

    @property
    def ok(self) -> bool:
        """The draft passes the kit unedited."""
        return self.report is not None and self.report.ok

    def __str__(self) -> str:
        loop = "-" if self.draft is None else "yes" if self.draft.policy.models else "no"
        state = "passes" if self.ok else "stopped" if self.draft is None else "FAILS"
        return f"{self.family:14} {state:8} loop {loop:4} {self.seconds:5.1f} s  {self.words}"


def held_to_kit(found: Draft, name: str, folder: str) -> Report:
    """The kit's report on a draft, written to a file and imported from there as any plugin is."""
    module = f"drafted_{''.join(c if c.isalnum() else '_' for c in name)}"
    path = os.path.join(folder, f"{module}.py")
    with open(path, "w", encoding="utf-8") as file:
        file.write(found.source)
    sys.path.insert(0, folder)
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, before)))
    try:
        imported = __import__(module)
        policy = next(v for v in vars(imported).values() if type(v).__name__ == "Policy")
        cls: Any = getattr(transformers, FAMILIES[name][0])
        return conformance(policy, lambda: _tiny(policy, cls), model_class=cls, module=module)
    finally:
        sys.path.remove(folder)
        os.environ["PYTHONPATH"] = before


def _tiny(policy: Any, cls: Any) -> Any:
    """The kit's own tiny config, or that of the tower where the model is one."""
    config = tiny_config(policy)
    return config if isinstance(config, cls.config_class) else _tower(config, cls.config_class)


def _tower(config: Any, wanted: type) -> Any:
    return next(getattr(config, name) for name in config.sub_configs if isinstance(getattr(config, name), wanted))


def lines(names: list[str], folder: str) -> Iterator[Line]:
    """A line for each family."""
    for name in names:
        start = time.perf_counter()
        found: Draft | None = None
        report: Report | None = None
        try:
            found = draft(skeleton(name))
            report = held_to_kit(found, name, folder)
            failed = [
                f"{r.check}: {r.what}, {r.measured} (allowed {r.allowed})" for r in report.rows if r.status == "fail"
            ]
            words = f"{found.trials} candidates; {report.last_line}" + "".join(f"\n    {one}" for one in failed)
        except DsiError as error:
            words = error.message
        yield Line(family=name, draft=found, report=report, words=words, seconds=time.perf_counter() - start)


def main() -> int:
    """Print the table; 1 where fewer than eight families pass."""
    import tempfile

    parser = argparse.ArgumentParser(prog="python -m tests.drafting.table", description=__doc__)
    parser.add_argument("family", nargs="*", help=f"of {', '.join(FAMILIES)}")
    parser.add_argument("--keep", metavar="FOLDER", help="write the drafts there and keep them")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    names = args.family or list(FAMILIES)
    with tempfile.TemporaryDirectory() as folder:
        done = []
        for line in lines(names, args.keep or folder):
            print(line, flush=True)  # noqa: T201 - this is a command
            done.append(line)
    passing = sum(line.ok for line in done)
    print(f"{passing} of {len(done)} families: the draft passes the kit unedited")  # noqa: T201
    return 0 if passing >= min(8, len(names)) else 1


if __name__ == "__main__":
    sys.exit(main())
