"""A probe: a module of tests that runs in a process of its own, in Triton's interpreter, and prints JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_probe(module: str, root: Path) -> Any:
    """What `module` printed."""
    paths = os.pathsep.join(str(root / part) for part in (".", "kernels", "policies"))
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=root,
        env={**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
