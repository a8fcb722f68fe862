"""The pages about the plugin API say what `dsi.policy` is: every class, field, default and hook, and nothing else."""

from __future__ import annotations

import re

import attrs
import pytest

from dsi import policy as vocabulary
from dsi.shelf import HOOKS
from tests.docs.api_page import CHAPTERS, PAGE, documented, fields, page

CLASSES = [
    name
    for name, value in vars(vocabulary).items()
    if isinstance(value, type) and attrs.has(value) and value.__module__ == vocabulary.__name__ and name != "Slot"
]


def test_the_page_is_what_the_vocabulary_makes():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.docs.api_page"


def test_every_class_and_hook_is_there_once():
    assert sorted(name for names in CHAPTERS.values() for name in names) == sorted(CLASSES)
    headings = re.findall(r"^### (\S+)$", page(), re.MULTILINE)
    assert len(headings) == len(set(headings))
    assert {*CLASSES, *HOOKS} <= set(headings)


@pytest.mark.parametrize("name", CLASSES)
def test_a_docstring_names_the_fields_that_there_are(name):
    cls = getattr(vocabulary, name)
    known = {each.name for each in attrs.fields(cls)}
    assert set(fields(name)) == known
    _, said = documented(cls)
    # a class of one or two fields may say it in its first sentence
    if said or len(known) > 2:
        assert set(said) == known


def test_a_default_is_the_default():
    """The page's defaults, read back, make the same object."""
    assert fields("Call")["mask"] == repr(vocabulary.Call().mask)
    assert fields("Linear") == {"path": "", "split": "'none'", "transposed": "False", "cls": "''", "shared": "''"}
    assert fields("Block")["facts"] == "{}"
    assert fields("Policy")["priority"] == "0"
