"""The figures in README.md are those of the committed results, and the plot's points too."""

from __future__ import annotations

import importlib.util
import json

import pytest

RESULT = {
    "name": "llama-7b 1x128+128",
    "unit": "ms/token",
    "times": {"dsi": {"median": 3.5}, "stock": {"median": 24.2}},
    "ratios": {"stock": 6.91},
    "bars": {"stock": 7},
    "met": {"stock": False},
    "goals": [{"name": "share of the floor", "found": 0.89, "bar": 0.88, "at_most": False, "met": True}],
    "facts": {"rows": 1, "prompt": 128, "new": 128, "shares": {"dsi": 0.89, "stock": 0.13}},
}
DOCUMENT = {
    "environment": {
        "gpu": {"name": "NVIDIA H200"},
        "versions": {"torch": "2.11", "triton": "3.6", "transformers": "5.23"},
    },
    "ceilings": {"GB/s copy": 4240.0, "TFLOP/s bf16": 790.0},
    "results": [RESULT],
}


@pytest.fixture
def load(root, monkeypatch):
    """A module of benchmarks/, which is no package."""
    monkeypatch.syspath_prepend(root / "benchmarks")

    def module(name):
        spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", root / "benchmarks" / f"{name}.py")
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found

    return module


def test_readme_holds_the_committed_figures(load, root):
    readme = load("readme")
    text = (root / "README.md").read_text(encoding="utf-8")
    wanted = readme.section(readme.documents(), plot=(root / readme.PLOT).exists())
    assert readme.placed(text, wanted) == text, "run `python benchmarks/readme.py`"


def test_a_section_tells_what_was_measured_and_what_is_missed(load):
    readme = load("readme")
    text = readme.section({"decode": DOCUMENT}, plot=True)
    assert "| llama-7b 1x128+128, ms/token | 3.5 |  | 24.2 | 89 % of the floor |" in text
    assert "4.24 TB/s" in text
    assert "6.91 times as fast as stock, wanted 7" in text
    assert "share of the floor 0.89" not in text
    assert "opt: refused" in readme.section({"decode": {**DOCUMENT, "refused": {"opt": "error 1"}}}, plot=True)
    other = json.loads(json.dumps(DOCUMENT).replace("3.5", "3.6"))
    assert readme.section({"decode": other}, plot=True) != text


def test_without_markers_nothing_is_written(load):
    readme = load("readme")
    with pytest.raises(ValueError, match="markers"):
        readme.placed("# dsi", "text")


def test_a_line_of_the_plot(load):
    rows = [{**RESULT, "facts": {**RESULT["facts"], "rows": count, "prompt": 32}} for count in (8, 1)]
    lines = load("plot").series([*rows, RESULT], "llama-7b", "rows", prompt=32)
    assert lines == {"dsi": [(1, 0.89), (8, 0.89)], "stock": [(1, 0.13), (8, 0.13)]}


def test_a_run_is_laid_over_what_was_committed(load, tmp_path):
    readme = load("readme")
    run, results = tmp_path / "run", tmp_path / "results"
    for folder, names in ((results, ("a", "b")), (run, ("b", "c"))):
        folder.mkdir()
        found = [{**RESULT, "name": name, "times": {"dsi": {"median": len(folder.name)}}} for name in names]
        document = {**DOCUMENT, "results": found, "refused": {}, "skipped": [], "order": ["a", "c", "b"]}
        target = folder / ("decode.json" if folder is run else "h200-decode.json")
        target.write_text(json.dumps(document), encoding="utf-8")
    (run / "prefill.json").write_text(
        json.dumps({**DOCUMENT, "results": [], "refused": {}, "skipped": ["x"]}), encoding="utf-8"
    )
    assert readme.take(run, results) == [results / "h200-decode.json"]
    found = readme.documents(results)
    medians = [(result["name"], result["times"]["dsi"]["median"]) for result in found["decode"]["results"]]
    assert medians == [("a", 7), ("c", 3), ("b", 3)]
