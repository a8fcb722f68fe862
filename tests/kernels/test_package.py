"""The package as a whole: what it offers, what it imports, and what it does where there is no Triton or no CUDA."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dsi_kernels

FOLDER = Path(dsi_kernels.__file__).parent
MODULES = sorted(FOLDER.glob("*.py"))
OPS = [path.stem for path in MODULES if path.stem in dsi_kernels.__all__]


def test_all_is_sorted_and_there():
    assert sorted(dsi_kernels.__all__) == dsi_kernels.__all__
    public = {name for name in vars(dsi_kernels) if not name.startswith("_")}
    modules = {path.stem for path in MODULES}
    assert set(dsi_kernels.__all__) == public - (modules - set(OPS))


def test_every_op_has_a_reference():
    assert len(OPS) == 25
    assert {f"{op}_reference" for op in OPS} <= set(dsi_kernels.__all__)


def test_kernels_is_a_folder_and_no_package():
    """Else it would hide Hugging Face's `kernels`, which transformers and diffusers import."""
    assert not (FOLDER.parent / "__init__.py").exists()


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_torch_and_triton_alone(path):
    allowed = {
        "__future__",
        "collections",
        "concurrent",
        "contextlib",
        "contextvars",
        "dsi_kernels",
        "functools",
        "json",
        "math",
        "os",
        "pathlib",
        "re",
        "threading",
        "torch",
        "types",
        "typing",
    }
    roots = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            roots.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            roots.update(alias.name.split(".")[0] for alias in node.names)
    # one place asks for triton, so that one place knows when it is missing
    assert roots <= allowed | ({"triton"} if path.stem == "_triton" else set())


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, dsi_kernels as dk
assert not dk.INSTALLED and not dk.INTERPRETED
x, w = torch.randn(3, 8), torch.randn(8)
cache, ids = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, dtype=torch.int64)
qkv, q = torch.randn(1, 1, 24), torch.randn(1, 1, 1, 8)
calls = {
    "rms_norm": (x, w), "layer_norm": (x, w, w), "add_rms_norm": (x, x, w), "add_layer_norm": (x, x, w, w),
    "gated_activation": (x, "silu"), "bias_activation": (x, w, "gelu"),
    "matvec": (x[:1], x), "skinny": (x.half(), x.half()),
    "greedy_token": (x[:1], ids, ids.clone(), ids.clone(), torch.zeros(3, dtype=torch.int64)),
    "group_norm": (x[..., None], None, None, 2), "add_map": (x[..., None], w), "geglu": (x,),
    "summed_map": (x[..., None], 2, w), "upsample_map": (x[:, :, None, None],),
    "wide_attention": (q, q, q),
    "rope_kv_write": (qkv, None, None, cache, cache.clone(), 0, 1, 1, 8), "decode_attention": (q, cache, cache, 1),
    "step_attention": (qkv[0], cache, cache.clone(), 1, 1, 1),
    "input_flags": (None, None, None, ids[0].clone(), ids[0].clone(), 9),
    "sample_token": (x[:1], None, torch.tensor([1.0, 0, 1, 0, 1, 0]), ids.clone(), ids.clone(), ids.clone(),
                     torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.bool)),
    "prompt_linear": (x.half(), x.half()),
    "linear_fused": (x, x), "linear_norm": (x, x, None, torch.zeros(3, 3), "layer", None, None, 1e-5),
    "attention": (q, q, q), "varlen_attention": (q[0], q[0], q[0], torch.tensor([0, 1], dtype=torch.int32), 1),
}
for op, operands in calls.items():
    getattr(dk, op + "_reference")(*operands)
    try:
        getattr(dk, op)(*operands)
    except ImportError as error:
        print(error)
from dsi_kernels.rms_norm import _rms_norm_kernel
try:
    _rms_norm_kernel[(1,)](x)
except ImportError as error:
    print(error)
"""


def test_without_triton_the_references_run_and_a_launch_says_why(fresh_python):
    result = fresh_python(WITHOUT_TRITON)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [*sorted(OPS, key=lines_order), "dsi_kernels"]
    for line in lines:
        assert "needs Triton, which is not installed here" in line
    assert lines[0].endswith("rms_norm_reference runs anywhere")


def lines_order(op):
    return WITHOUT_TRITON.index(f'"{op}":')


UNINTERPRETED = """
import time, torch, triton, triton.language
begin = time.perf_counter()
import dsi_kernels
print(time.perf_counter() - begin)
dsi_kernels.rms_norm(torch.ones(1, 8), torch.ones(8))
"""


def test_on_a_cpu_uninterpreted_a_launch_says_why(fresh_python):
    result = fresh_python(UNINTERPRETED, TRITON_INTERPRET="0")
    assert result.returncode == 1
    assert "ValueError: rms_norm: x is on cpu; the kernel runs on CUDA, rms_norm_reference on any" in result.stderr
    # beside torch and triton, the import costs little: 0.03 s on a 2-core CPU
    assert float(result.stdout) < 0.5
