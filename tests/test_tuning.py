"""What `dsi tune` measures, what it refuses, and what it writes; the measuring itself is in tests/gpu."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dsi import tuning
from dsi.cli import main
from dsi.config import load_config
from dsi.errors import DsiError
from dsi.planner import make_plan
from dsi.registry import Registry
from dsi.tuning import MATVEC, SKINNY, Found, Product, products_of, write
from dsi_kernels.tuned import FOLDER, read_settings
from tests.support.models import tiny


def test_a_models_products_are_its_layers_and_its_head() -> None:
    model = tiny("llama")
    config = model.config
    plan = make_plan(model, load_config(None, {}), Registry.load())
    hidden, wide, size = config.hidden_size, config.intermediate_size, config.head_dim
    heads = config.num_attention_heads
    assert set(products_of(plan, model)) == {
        Product(rows=(heads + 2 * config.num_key_value_heads) * size, columns=hidden, norm="rms"),
        Product(rows=hidden, columns=heads * size),
        Product(rows=2 * wide, columns=hidden, gated=True, norm="rms"),
        Product(rows=hidden, columns=wide),
        Product(rows=config.vocab_size, columns=hidden, norm="rms"),
    }


@pytest.mark.parametrize(("op", "candidates"), [("matvec", MATVEC), ("skinny", SKINNY)])
def test_every_candidate_is_a_setting_that_files_may_have(op: str, candidates: Any, tmp_path: Path) -> None:
    known = frozenset(read_settings(FOLDER / op / "default.json")["*"])
    (path := tmp_path / "all.json").write_text(json.dumps({str(n): one for n, one in enumerate(candidates)}))
    assert len(read_settings(path, known)) == len(candidates)
    # library is settled by the comparison, not by a candidate
    assert all(set(one) | {"library"} == known | {"library"} for one in candidates)


def test_a_candidate_fits_where_it_is_not_another_one_over() -> None:
    product = Product(rows=64, columns=1600)
    assert [n for n in (512, 2048, 4096) if tuning.fits({"block_k": n}, product)] == [512, 2048]


def found(shape: str, **settings: int) -> Found:
    return Found(op="matvec", shape=shape, settings=settings, time=1.0, library=2.0)


def test_new_settings_stand_beside_the_old(tmp_path: Path) -> None:
    write([found("one", block_n=2), found("two", block_n=4)], tmp_path, "A GPU-80")
    (path,) = write([found("two", block_n=8)], tmp_path, "A GPU-80")
    assert path == tmp_path / "matvec" / "A_GPU_80.json"
    settings = {"one": {"block_n": 2}, "two": {"block_n": 8}}
    assert path.read_text() == json.dumps(settings, indent=2, sort_keys=True) + "\n"


def test_a_file_that_cannot_be_used_is_not_written_over(tmp_path: Path) -> None:
    (path := tmp_path / "matvec" / "gpu.json").parent.mkdir()
    path.write_text('{"one": {"z": 1}}')
    with pytest.raises(ValueError, match="unknown setting 'z'"):
        write([found("two", block_n=8)], tmp_path, "gpu")
    assert path.read_text() == '{"one": {"z": 1}}'


@pytest.mark.parametrize("result", [torch.full((3,), float("nan")), torch.zeros(3), torch.ones(3) * 1.02])
def test_a_wrong_product_is_not_near(result: torch.Tensor) -> None:
    assert not tuning._near(result, torch.ones(3))
    assert tuning._near(torch.ones(3) * 1.005, torch.ones(3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused where there is no device")
def test_without_a_device_it_says_so(capsys: Any, tmp_path: Path) -> None:
    with pytest.raises(DsiError, match="there is no CUDA device here"):
        tuning.tune(Product(rows=8, columns=8), 1, torch.bfloat16)
    assert main(["tune", str(tmp_path)]) == 1
    assert "there is no CUDA device here" in capsys.readouterr().err
