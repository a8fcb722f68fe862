"""Is a quantized model as close to stock as its quantizer promises?"""

from __future__ import annotations

from dsi.testing.report import Outcome, not_run
from dsi.testing.subject import Subject


def quantized(subject: Subject) -> Outcome:
    """Each registered quantizer over this policy's slots."""
    found = sorted(subject.registry.quantizers)
    if not found:
        return not_run("no quantizer is registered")
    return not_run(f"this version of dsi applies no quantizer ({', '.join(found)} registered)")
