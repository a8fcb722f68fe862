"""The conformance kit: does a policy do what it promises, on a model that is built so that mistakes show.

    from dsi.testing import PolicyConformance

    class TestMine(PolicyConformance):
        policy = MINE

        def tiny_config(self):
            return MineConfig(hidden_size=32, ...)

`conformance` is the same without pytest, and `dsi check PLUGIN:POLICY` the same on the command line. A check is a
function `(Subject) -> Outcome`; dsi's own come through the hook `dsi_register_checks`, as anyone's do. Importing this
package imports neither torch nor pytest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dsi.testing.report import Failed, Outcome, Report, Row, absent, failed, not_run, passed

if TYPE_CHECKING:
    from dsi.testing.configs import tiny_config
    from dsi.testing.policy_conformance import PolicyConformance
    from dsi.testing.runner import conformance
    from dsi.testing.subject import Subject, Twins

_LAZY = {
    "PolicyConformance": "dsi.testing.policy_conformance",
    "Subject": "dsi.testing.subject",
    "Twins": "dsi.testing.subject",
    "conformance": "dsi.testing.runner",
    "tiny_config": "dsi.testing.configs",
}

__all__ = [
    "Failed",
    "Outcome",
    "PolicyConformance",
    "Report",
    "Row",
    "Subject",
    "Twins",
    "absent",
    "conformance",
    "failed",
    "not_run",
    "passed",
    "tiny_config",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'dsi.testing' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
