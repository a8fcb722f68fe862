"""examples/stable_diffusion.py: its table and its PNG, of the tiny pipeline and of a folder, and that it tells."""

from __future__ import annotations

import importlib.util
import math
import sys

import numpy
import pytest
from PIL import Image

FEW = ("--steps", "3", "--rounds", "1")


@pytest.fixture(scope="module")
def example(root):
    spec = importlib.util.spec_from_file_location("examples_stable_diffusion", root / "examples/stable_diffusion.py")
    found = importlib.util.module_from_spec(spec)
    # attrs looks its classes' module up
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    yield found
    del sys.modules[spec.name]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_prints_the_table_and_writes_the_pictures(example, tmp_path, capsys, dtype):
    out = tmp_path / "new" / "picture.png"
    assert example.main([*FEW, "--device", "cpu", "--dtype", dtype, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["ms", "stock", "dsi", "stock/dsi"]
    assert any(line.startswith("PSNR") for line in lines)
    assert lines[-1] == "after restore() the weights are what they were, bit for bit"
    # 16 latents a side, twice as many pixels: three pictures in a row
    assert Image.open(out).size == (96, 32)


def test_a_folder_is_read(example, tmp_path, capsys):
    example.tiny_pipeline().save_pretrained(tmp_path / "checkpoint")
    out = tmp_path / "picture.png"
    told = [str(tmp_path / "checkpoint"), *FEW, "--device", "cpu", "--dtype", "fp32", "--size", "24", "--out", str(out)]
    assert example.main(told) == 0
    assert Image.open(out).size == (72, 24)


def test_pictures_that_differ_are_told(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "twin", lambda pipe: _other(example))
    out = tmp_path / "picture.png"
    assert example.main([*FEW, "--device", "cpu", "--dtype", "fp32", "--out", str(out)]) == 1
    assert "THE PICTURES DIFFER" in capsys.readouterr().out


def _other(example):
    pipe = example.tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.conv_out.weight.data.mul_(1.5)
    return pipe


def test_decibels_and_the_row_of_pictures(example):
    one = numpy.full((2, 2, 3), 0.5)
    other = one.copy()
    other[0, 0, 0] += 0.1
    assert example.decibels(one, one) == math.inf
    assert example.decibels(one, other) == pytest.approx(10 * math.log10(12 / 0.01))
    row, factor = example.beside(one, other)
    assert factor == pytest.approx(10)
    assert row.size == (6, 2)
    assert row.getpixel((4, 0)) == (255, 0, 0)
    assert example.beside(one, one)[1] == 1
