"""One registry for the whole folder: looking up the installed plugins costs more than injecting a tiny model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dsi.registry import Registry


@pytest.fixture(autouse=True, scope="package")
def one_registry() -> Iterator[None]:
    registry = Registry.load()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Registry, "load", classmethod(lambda cls, *_args: registry))
        yield
