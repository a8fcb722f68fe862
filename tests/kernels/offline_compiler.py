"""Kernels compiled for sm_90 without a GPU, and what the compiler made of them. Run as a script: a JSON line a kernel.

The interpreter runs Python; what it lets pass, Triton's compiler may not. The launchers are called as ever, on CPU
tensors; a driver that knows no device stands where CUDA's is, and the launch ends once the kernel is compiled.
"""

from __future__ import annotations

import json
import re
import sys
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import dsi_kernels as dk
from dsi_kernels import operands
from dsi_kernels.skinny import skinny_norm
from dsi_kernels.step_attention import HeadNorm, StepAlibi, StepRope

HOPPER = SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device=None: 0,
)


def before_wait(ptx):
    """The instructions that may run before a program waits for the kernels before it, whichever way it branches."""
    blocks = re.split(r"^(\$L__BB\w+):", ptx, flags=re.MULTILINE)
    names, texts = ["", *blocks[1::2]], blocks[::2]
    todo, found = [0], {}
    while todo:
        at = todo.pop()
        if at in found or at >= len(texts):
            continue
        text, waits, _ = texts[at].partition("griddepcontrol.wait")
        found[at] = text
        if not waits:
            todo += [names.index(name) for name in re.findall(r"bra\S*\s+(\$L__BB\w+)", text)]
            ends = re.search(r"^\s*(?:bra\.uni\s+\S+|ret);\s*(?://.*\s*)*$", text, re.MULTILINE)
            todo += [] if ends else [at + 1]
    return "".join(found.values())


def compile_only(report):
    """Makes every launch a compilation, whose result goes to report."""
    driver.set_active(HOPPER)
    # the launchers take CPU tensors from here on
    operands.INTERPRETED = True
    run = JITFunction.run

    def compiled(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        ptx = kernel.asm["ptx"]
        report(
            kernel=self.__name__,
            shared=kernel.metadata.shared,
            warps=kernel.metadata.num_warps,
            async_copies=len(re.findall(r"cp\.async\.c[ag]", ptx)),
            accelerated=len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
            tensor_core=len(re.findall(r"\bmma\.sync|\bwgmma", ptx)),
            tf32="tf32" in ptx,
            wide_loads=len(re.findall(r"ld\.global\S*\.v4", ptx)),
            dependent=kernel.metadata.launch_pdl,
            waits=len(re.findall(r"griddepcontrol\.wait", ptx)),
            stores_before_wait=bool(
                re.search(r"\bst\.global|\bred\.|\batom\.", ptx.partition("griddepcontrol.wait")[0])
            ),
            atomics=len(re.findall(r"\b(?:atom|red)\.", ptx)),
        )
        return kernel

    JITFunction.run = compiled


def matvecs(case, half):
    """A matrix times one row and two, plain and gated."""
    case("matvec")
    matrix = torch.zeros(64, 2048, dtype=half)
    vector, gamma = torch.zeros(1, 2048, dtype=half), torch.zeros(2048, dtype=half)
    dk.matvec(vector, matrix, norm="rms", norm_weight=gamma)
    dk.matvec(vector, matrix, norm="rms", norm_weight=gamma, kind="silu", gated=True)
    dk.matvec(vector, matrix, gamma[:64], residual=torch.zeros(1, 64, dtype=half))
    pair = vector.expand(2, -1).contiguous()
    # in tiles, and with a row in one
    for columns, block in ((2048, 1024), (2048, 2048), (1600, 2048)):
        config = {"block_n": 4, "block_k": block, "num_warps": 4}
        layer = {"norm": "layer", "norm_weight": gamma[:columns], "norm_bias": gamma[:columns]}
        dk.matvec(pair[:, :columns].contiguous(), matrix[:, :columns].contiguous(), **layer, kind="gelu", config=config)


def steps(case, half):
    """The attention of a step: a head to a KV head, a group, and a group with everything that may be asked for."""
    cache, table = torch.zeros(1, 2, 8192, 128, dtype=half), torch.zeros(1, 64, 128, dtype=half)
    rope = StepRope(table, table, False, torch.zeros(1, 1, dtype=torch.int64))
    # more splits than are added up at a time
    config = {"tile_bytes": 8192, "num_warps": 4, "stages": 3, "min_split": 128, "programs_per_sm": 16, "ahead": 3}
    given = {"rope": rope, "tickets": torch.zeros(2, dtype=torch.int32), "config": config}
    for heads in (2, 8):
        case(f"a step, {heads} heads")
        qkv = torch.zeros(1, (heads + 4) * 128, dtype=half)
        dk.step_attention(qkv, cache, cache, torch.tensor(5), heads, 2, **given)
    case("a step, everything")
    weight, mask = torch.zeros(128, dtype=half), torch.ones(1, 1, 1, 1024, dtype=torch.bool)
    given |= {"norm": HeadNorm("layer", *[weight] * 4), "rope": rope._replace(pairs=True)}
    places = torch.zeros(1, 1024, dtype=torch.int64)
    given |= {"mask": mask, "softcap": 30.0, "alibi": StepAlibi(torch.zeros(8), places, "bfloat16", 0.5)}
    cache = cache[:, :, :64]
    dk.step_attention(qkv, cache, cache, torch.tensor(5), 8, 2, window=64, ring=True, **given)


def forwards(case, half):
    """Products with what follows them, and attention of many queries."""
    blocks = {"block_m": 64, "block_n": 64, "block_k": 64, "group_m": 8, "num_warps": 4, "stages": 3}
    x, weight, bias = torch.zeros(64, 256, dtype=half), torch.zeros(256, 256, dtype=half), torch.zeros(256, dtype=half)
    case("products")
    dk.linear_fused(x, weight, bias, kind="gelu", residual=x, config=blocks | {"splits": 1})
    case("products, cut")
    dk.linear_fused(x, weight, bias, kind="silu", gated=True, config=blocks | {"splits": 2})
    dk.linear_norm(x, weight, bias, x, "layer", bias, bias, 1e-5, config=blocks | {"splits": 2})
    dk.linear_norm(x, weight, None, x, "rms", bias, None, 1e-5, config=blocks | {"splits": 2})
    case("whole texts")
    blocks = {"block_s": 64, "block_t": 64, "num_warps": 4, "stages": 2}
    q, k, v = (part.transpose(1, 2) for part in torch.zeros(2, 64, 4, 64, dtype=half).split((2, 1, 1), 2))
    dk.attention(q, k, v, config=blocks)
    dk.attention(q, k, v, torch.ones(2, 1, 64, 64, dtype=torch.bool), causal=True, config=blocks)
    q, k, v = (part.transpose(1, 2)[0] for part in (q, k, v))
    dk.varlen_attention(q, k, v, torch.zeros(3, dtype=torch.int32), 64, causal=True, config=blocks)


def prompts(case, half):
    """Products that the memory accelerator feeds, plain and gated."""
    case("prompts")
    blocks = {"block_m": 128, "block_n": 128, "block_k": 64, "group_m": 8, "num_warps": 8, "stages": 3}
    x, weight, bias = (
        torch.zeros(1, 256, 512, dtype=half),
        torch.zeros(512, 512, dtype=half),
        torch.zeros(512).bfloat16(),
    )
    dk.prompt_linear(x, weight, bias, residual=x, config=blocks)
    dk.prompt_linear(x, weight, kind="silu", gated=True, config=blocks)


def maps(case, half):
    """Group norms in one launch, two and three, bare and with all that may be added."""
    settings = {"block_c": 64, "num_warps": 4, "shown": 2048, "tile": 2048, "tiles": 1}
    # groups of 16 channels, one of which 8 lanes read
    case("maps")
    for rows, hold, launches in ((64, 2, 2), (2048, 1, 1), (64, 1, 2), (64, 1, 3)):
        x = torch.zeros(2, rows, 512, dtype=half).transpose(1, 2)
        bias, addend = torch.zeros(512, dtype=half), torch.zeros(2, 1024, dtype=half)[:, 512:]
        config = settings | {"hold": hold, "launches": launches}
        dk.group_norm(x, bias, bias, 32, silu=True, config=config)
        dk.group_norm(x, None, None, 32, x_bias=bias, addend=addend, residual=x, keep_sum=True, config=config)
    dk.add_map(x, bias, x, 2.0)
    dk.upsample_map(x[..., None])
    dk.geglu(torch.zeros(64, 2560, dtype=half))
    dk.wide_attention(*[torch.zeros(1, 1, 64, 512, dtype=half)] * 3)


def few_rows(case, half):
    """A matrix times 3 rows and 32, whole and in parts, plain and gated."""
    case("skinny")
    matrix = torch.zeros(256, 2048, dtype=half)
    for rows, splits in ((3, 1), (32, 4)):
        config = {"block_n": 64, "block_k": 128, "splits": splits, "stages": 3, "num_warps": 4, "dependent": 2}
        x = torch.zeros(rows, 2048, dtype=half)
        dk.skinny(x, matrix, residual=x[:, :256].contiguous(), config=config)
        dk.skinny(x, matrix, kind="silu", gated=True, config=config)
        skinny_norm(x, matrix, None, x[:, :256].contiguous(), "rms", matrix[0, :256], None, 1e-6, config=config)


def launch_all(case):  # noqa: PLR0915 - one call after the other
    """Every kernel once or twice: one that reads all its operands, one that leaves out what may be left out."""
    half = torch.bfloat16
    x, w = torch.zeros(2, 256, dtype=half), torch.zeros(256, dtype=half)
    case("norms")
    dk.rms_norm(x, w)
    dk.add_rms_norm(x, x, w)
    dk.layer_norm(x, w, w)
    dk.layer_norm(x.float(), None, None)
    dk.add_layer_norm(x, x, w, w, 1e-5, w)
    case("activations")
    dk.gated_activation(x, "silu")
    dk.gated_activation(x, "quick_gelu")
    dk.bias_activation(x, w, "gelu")
    dk.bias_activation(x, None, "gelu_tanh")
    dk.bias_activation(x.half(), w.half(), "relu")
    matvecs(case, half)
    few_rows(case, half)
    forwards(case, half)
    prompts(case, half)
    maps(case, half)
    steps(case, half)
    case("greedy token")
    ids, one = torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64)
    counters, done = torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
    dk.greedy_token(x, one, ids, one, counters)
    dk.greedy_token(x, one, ids, one, counters, done, counters, one[0, 0])
    case("sample token")
    wide, settings, invalid = torch.zeros(2, 32000, dtype=half), torch.zeros(6), torch.zeros(1, dtype=torch.bool)
    state = (settings, one, ids, one, counters, invalid)
    dk.sample_token(wide, wide.float(), *state)
    dk.sample_token(wide, None, *state, torch.zeros(2, 32000, dtype=torch.int8), done, counters, one[0, 0])
    for V in (1, 10):
        # sizes of 1 are constants to the compiler
        case(f"sample token of {V}")
        dk.sample_token(wide[:, :V].contiguous(), torch.zeros(2, V), *state)
    case("input flags")
    dk.input_flags(ids, ids, done[None], counters[:1], counters[:1], 9)
    dk.input_flags(None, None, ids, counters[:1], counters[:1], 9)
    dk.input_flags(ids.int(), ids.int(), None, counters[:1], counters[:1], 9)
    case("rope")
    qkv, cos = torch.zeros(2, 1, 4 * 128, dtype=half), torch.zeros(2, 1, 64)
    cache = torch.zeros(2, 1, 1024, 128, dtype=half)
    for start in (1, torch.tensor(0), torch.zeros(2, dtype=torch.int32)):
        dk.rope_kv_write(qkv, cos, cos, cache, cache, start, 2, 1, 128)
    dk.rope_kv_write(qkv, None, None, cache, cache, 0, 2, 1, 128)
    mask = torch.ones(2, 1, 1, 1024, dtype=torch.bool)
    for heads in (1, 4):
        case(f"attention, {heads} to a KV head")
        q = torch.zeros(2, heads, 1, 128, dtype=half)
        dk.decode_attention(q, cache, cache, torch.tensor(9), mask, splits=2)
        dk.decode_attention(q, cache, cache, 9, splits=1)
    case("attention, fp32")
    dk.decode_attention(q.float(), cache.float(), cache.float(), torch.tensor([9, 9]), splits=1)


def launch_dependently():
    """Every launcher that can has its kernel begin while the one before ends, as on a device that knows how."""
    for module in list(sys.modules.values()):
        if module.__name__.startswith("dsi_kernels.") and hasattr(module, "launch_options"):
            module.launch_options = lambda device: {"PDL": True, "launch_pdl": True}


def main():
    current = []
    if "--dependent" in sys.argv:
        launch_dependently()
    compile_only(lambda **facts: sys.stdout.write(json.dumps({"case": current[-1], **facts}) + "\n"))
    launch_all(current.append)


if __name__ == "__main__":
    main()
