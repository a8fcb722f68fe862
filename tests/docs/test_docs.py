"""The code on the pages runs, in the order in which it stands there, and every link leads somewhere."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import dsi
from tests.docs.blocks import ROOT, Block, _matches, blocks, run
from tests.support import inputs_for, make_hostile_, tiny
from tests.support.site import forget_modules

PLUGIN_PAGES = ("write-a-policy.md", "api.md", "versioning.md")
PAGES = [ROOT / "README.md", *(ROOT / "docs" / "plugins" / name for name in PLUGIN_PAGES)]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to work in, whose modules are forgotten afterwards."""
    before, path = set(sys.modules), list(sys.path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.path[:] = path
    forget_modules(tmp_path, before)
    # found by a relative path, as the page has it
    for name in [name for name in set(sys.modules) - before if name.startswith("dsi_star")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", PLUGIN_PAGES)
def test_a_plugin_page_runs(workplace, name):
    page = ROOT / "docs" / "plugins" / name
    done = run(page, workplace, {"__name__": "page"})
    assert len(done) == {"write-a-policy.md": 7, "api.md": 1 + 4, "versioning.md": 1}[name], done


def test_the_readme_runs(workplace):
    """Its models are a tiny one that the page says the reader has, and one that comes with the repository."""
    (workplace / "data").symlink_to(ROOT / "data")
    namespace = {"model": tiny("llama"), "inputs": inputs_for("llama"), "__name__": "page"}
    done = run(ROOT / "README.md", workplace, namespace)
    assert len([one for one in done if one.startswith("python")]) >= 3, done
    sys.path.insert(0, str(workplace))
    policy = importlib.import_module("dsi_qwen2").POLICY
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2}
    qwen = Qwen2ForCausalLM(Qwen2Config(**sizes, num_hidden_layers=2, vocab_size=67)).eval()
    make_hostile_(qwen)
    ids = torch.randint(3, 67, (2, 9))
    with torch.no_grad():
        stock = qwen(ids).logits
        dsi.init_inference(qwen, injection_policy=policy, strict=True)
        assert torch.allclose(qwen(ids).logits, stock, rtol=0, atol=1e-5 * float(stock.abs().max()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_of_a_known_language(page):
    assert {block.language for block in blocks(page)} <= {"python", "toml", "console", ""}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in text.splitlines()}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert (page.parent / target.partition("#")[0]).exists(), target


# --- the runner itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a\n", "a\nb\n", True),
        ("a  b\n", "a     b\n", True),
        ("...\nb\n", "x\ny\nb\n", True),
        ("a\n...\nc\n", "a\nc\n", True),
        ("", "anything\n", True),
        ("b\n", "abc\n", False),
        ("a\nc\n", "a\nb\nc\n", False),
        ("...\nz\n", "a\nb\n", False),
    ],
)
def test_what_is_shown_must_be_printed(shown, printed, same):
    assert _matches(shown, printed) is same


def test_a_page_that_is_wrong_fails(tmp_path):
    page = tmp_path / "page.md"
    for text, error in (
        ("```python\nassert 1 == 2\n```\n", AssertionError),
        ("```console\n$ false\n```\n", AssertionError),
        ("```console\n$ echo a\nb\n```\n", AssertionError),
    ):
        page.write_text(text)
        with pytest.raises(error):
            run(page, tmp_path, {})


def test_a_block_with_a_path_is_a_file(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\n# a/b.py\nx = 1\n```\n")
    assert blocks(page) == [Block("python", "# a/b.py\nx = 1\n", 3)]
    assert run(page, tmp_path, {}) == ["file a/b.py"]
    assert Path(tmp_path / "a" / "b.py").read_text() == "# a/b.py\nx = 1\n"
