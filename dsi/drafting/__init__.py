"""Drafting: a policy proposed for a model that none knows, and the place where a wrong one parts from stock.

Importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsi.drafting.bisection import Finding, bisect
    from dsi.drafting.drafter import Draft, draft

_LAZY = {
    "Draft": "dsi.drafting.drafter",
    "Finding": "dsi.drafting.bisection",
    "bisect": "dsi.drafting.bisection",
    "draft": "dsi.drafting.drafter",
}

__all__ = ["Draft", "Finding", "bisect", "draft"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'dsi.drafting' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
