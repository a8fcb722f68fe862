"""What holds for every test of the repository, those of the plugins too."""

from __future__ import annotations

import pytest

# two interpreters that each import torch and transformers: seconds a policy, so by default one policy stands for all
_PROCESSES = "test_tp_processes"
_STANDS_FOR_ALL = "TestLlama"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The conformance kit's real processes are slow tests."""
    for item in items:
        if item.name == _PROCESSES and getattr(item.parent, "name", "") != _STANDS_FOR_ALL:
            item.add_marker(pytest.mark.slow)
