"""The fenced blocks of a page, and what it means to run them.

python      whose first line is a comment with a path: a file with that content
            any other: run, in one namespace for the page
toml        with such a first line: a file
console     each "$ " line is run by a shell; what is shown below it must be printed, "..." stands for any lines
any other   is text
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PATH = re.compile(r"# ([\w./-]+\.(?:py|toml))\n")


@attrs.frozen
class Block:
    """One fenced block: its language, its text, and the line of the page on which it begins."""

    language: str
    text: str
    line: int

    @property
    def path(self) -> str:
        """Where the block belongs, or "" where it is no file."""
        found = _PATH.match(self.text) if self.language in ("python", "toml") else None
        return found[1] if found else ""


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [Block(one[1], one[2], text.count("\n", 0, one.start()) + 1) for one in _FENCE.finditer(text)]


def run(page: Path, folder: Path, namespace: dict[str, Any]) -> list[str]:
    """Run every block of a page in `folder`; what was run, in words."""
    done = []
    for block in blocks(page):
        if block.path:
            target = folder / block.path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text, encoding="utf-8")
            done.append(f"file {block.path}")
        elif block.language == "python":
            # blank lines in front, so that a traceback names the page's own lines
            source = "\n" * block.line + block.text
            exec(compile(source, str(page), "exec"), namespace)  # noqa: S102 - our own pages
            done.append(f"python {block.line}")
        elif block.language == "console":
            done += [f"console {command}" for command in _console(block, folder)]
    return done


def _console(block: Block, folder: Path) -> Iterator[str]:
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=_environment(), capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert _matches(shown, done.stdout), f"line {block.line}: {command}\nshown:\n{shown}\nprinted:\n{done.stdout}"
        yield command


def _matches(shown: str, printed: str) -> bool:
    # columns may be wider where more is installed
    parts = [r"\ +".join(map(re.escape, line.split())) if line != "..." else "" for line in shown.splitlines()]
    pattern = "\n".join(part or r"(?:.*\n?)*?" for part in parts).replace(")*?\n", ")*?")
    return re.search(rf"^{pattern}", printed, re.MULTILINE) is not None


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    python_path = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "policies"))
    return {**os.environ, "PATH": path, "PYTHONPATH": python_path, "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"}
