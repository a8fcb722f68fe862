"""What tests share: tiny hostile models and a fingerprint that tells whether a model changed."""

from tests.support.fingerprint import difference, fingerprint
from tests.support.models import (
    CAUSAL,
    ENCODERS,
    FAMILIES,
    ROPE_TYPES,
    Family,
    Padding,
    cases,
    inputs_for,
    make_hostile_,
    tiny,
    tiny_config,
)

__all__ = [
    "CAUSAL",
    "ENCODERS",
    "FAMILIES",
    "ROPE_TYPES",
    "Family",
    "Padding",
    "cases",
    "difference",
    "fingerprint",
    "inputs_for",
    "make_hostile_",
    "tiny",
    "tiny_config",
]
