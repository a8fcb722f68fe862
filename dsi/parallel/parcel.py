"""What a process and the ranks that it has started hand to each other: pickled, in a folder that is theirs alone.

The folder is made by `run_gloo` for one run, readable by its user only (mode 700), and gone afterwards. Nothing else is
ever read with this module: no checkpoint, and nothing that a user names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def put(path: Path, content: Any) -> None:
    """Write a file that is never seen half-written."""
    draft = path.with_suffix(".draft")
    torch.save(content, draft)
    draft.replace(path)


def get(path: Path) -> Any:
    """What `put` has written."""
    if path.parent.stat().st_mode & 0o077:
        raise PermissionError(f"{path.parent} is open to others than its user")
    return torch.load(path, weights_only=False)
