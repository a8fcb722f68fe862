"""Finds, for the kernels of a whole forward on this CUDA device, launch configurations and where a library wins.

    python benchmarks/tune_forward.py [--out FOLDER] [--op linear attention] [--tokens 128 1024] [--only MODEL]

Every candidate runs in one CUDA graph, with a ring of matrices beyond the L2 cache, and begins while the one before it
ends, as in a forward's graph; the median of the replays counts.
`choice` says what won: our kernel, or the library with a kernel of its own for what follows. A candidate whose result
is not the reference's is refused. Kernels are compiled by several processes first, into Triton's cache on disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import dsi_kernels as dk
from dsi.tuning import graph_time
from dsi_kernels._pdl import dependent_launches
from dsi_kernels.attention import CUDNN, EFFICIENT, FLASH, OWN, TORCH
from dsi_kernels.linear_fused import FUSED, LIBRARY

# what follows a product, and its [N, K]
PRODUCTS: Mapping[str, tuple[tuple[str, int, int], ...]] = {
    "bert-base": (("nothing", 2304, 768), ("norm", 768, 768), ("gelu", 3072, 768), ("norm", 768, 3072)),
    "bert-large": (("nothing", 3072, 1024), ("norm", 1024, 1024), ("gelu", 4096, 1024), ("norm", 1024, 4096)),
}
TOKENS = (128, 256, 512, 1024, 2048, 4096, 12288)
# rows, columns and terms of a tile, warps, stages: the less there is to do the more of it must be under way at once
SMALL = (
    (32, 32, 128, 4, 4), (32, 32, 128, 4, 6), (32, 64, 64, 4, 5), (32, 64, 64, 4, 8), (32, 64, 128, 4, 3),
    (32, 64, 128, 4, 5), (64, 32, 128, 4, 3), (64, 32, 128, 4, 5), (64, 32, 64, 4, 8), (64, 64, 64, 4, 4),
    (64, 64, 64, 4, 6), (64, 64, 128, 4, 3), (64, 64, 128, 4, 5), (16, 64, 128, 4, 4), (128, 32, 64, 4, 5),
    (128, 64, 64, 4, 4), (128, 64, 64, 8, 4), (32, 128, 64, 4, 4),
)  # fmt: skip
LARGE = (
    (64, 64, 64, 4, 4), (64, 64, 64, 4, 6), (64, 64, 128, 4, 3), (64, 128, 64, 4, 4), (128, 64, 64, 4, 4),
    (128, 128, 64, 4, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (64, 256, 64, 4, 3),
)  # fmt: skip
# (batch, length, heads, kv heads, head size, what a query sees)
ATTENTION: Mapping[str, tuple[tuple[int, int, int, int, int, str], ...]] = {
    "bert-base": (
        (1, 128, 12, 12, 64, "all"), (8, 128, 12, 12, 64, "all"), (32, 384, 12, 12, 64, "all"),
        (8, 128, 12, 12, 64, "mask"), (32, 384, 12, 12, 64, "mask"), (1, 1024, 12, 12, 64, "all"),
    ),
    "decoders": (
        (1, 128, 32, 32, 128, "causal"), (1, 512, 32, 32, 128, "causal"), (1, 2048, 32, 32, 128, "causal"),
        (1, 2048, 32, 8, 128, "causal"), (1, 2048, 32, 8, 64, "causal"), (4, 512, 32, 32, 128, "mask"),
    ),
}  # fmt: skip
BLOCKS = (
    (16, 64, 4, 2), (32, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2),
    (128, 64, 4, 3),
)  # fmt: skip
MODELS = sorted(PRODUCTS.keys() | ATTENTION.keys())
BACKENDS = {
    CUDNN: SDPBackend.CUDNN_ATTENTION, FLASH: SDPBackend.FLASH_ATTENTION, EFFICIENT: SDPBackend.EFFICIENT_ATTENTION
}  # fmt: skip
NAMES = {TORCH: "torch", OWN: "own", CUDNN: "cudnn", FLASH: "flash", EFFICIENT: "efficient"}
RING_BYTES = 200 << 20
# a kernel of ours that wins by less than this is not worth a choice
MARGIN = 0.98


# --- products -----------------------------------------------------------------------------------------------------


def settings(tokens: int, follows: str, K: int) -> Iterator[dict[str, int]]:
    """Configurations worth a try at this size."""
    blocks = SMALL if tokens <= 256 else LARGE
    keys = ("block_m", "block_n", "block_k", "num_warps", "stages")
    splits: tuple[int, ...] = (1,)
    if follows == "norm" and tokens <= 1024:
        splits = (1, 2) if K < 2048 or tokens > 256 else (2, 4, 6)
    for block in dict.fromkeys(blocks):
        for split in splits:
            yield dict(zip(keys, block, strict=True)) | {"splits": split, "group_m": 8, "choice": FUSED}


def product(follows: str, given: Mapping[str, Tensor], weight: Tensor, config: dict[str, int] | None) -> Tensor:
    """One product and what follows it, by our kernel or, without a configuration, by the library."""
    x, bias, residual, gamma = (given[name] for name in ("x", "bias", "residual", "gamma"))
    if follows == "norm":
        if config is None:
            return dk.add_layer_norm(F.linear(x, weight, bias), residual, gamma, gamma, 1e-5, keep_sum=False)[0]
        norm = ("layer", gamma, gamma, 1e-5)
        return dk.linear_norm(x, weight, bias, residual, *norm, keep_sum=False, config=config)[0]
    kind = "" if follows == "nothing" else follows
    if config is not None:
        return dk.linear_fused(x, weight, bias, kind=kind, config=config)
    if not kind:
        return F.linear(x, weight, bias)
    return dk.bias_activation(F.linear(x, weight), bias, kind)


def operands(tokens: int, N: int, K: int, count: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.float16}
    weights = [torch.randn(N, K, **options) / K**0.5 for _ in range(count)]
    given = {"x": (tokens, K), "bias": (N,), "residual": (tokens, N), "gamma": (N,)}
    return weights, {name: torch.randn(*shape, **options) for name, shape in given.items()}


def tune_product(follows: str, N: int, K: int, tokens: int) -> tuple[str, dict[str, int]]:
    """(shape, what won)."""
    count = max(4, min(24, RING_BYTES // (N * K * 2)))
    weights, given = operands(tokens, N, K, count)
    wanted = product(follows, {k: v.float() for k, v in given.items()}, weights[0].float(), None)
    found = []
    for config in settings(tokens, follows, K):
        try:
            got = product(follows, given, weights[0], config).float()
        # a configuration that the device has no shared memory for
        except triton.runtime.errors.OutOfResources:
            continue
        if float((got - wanted).norm() / wanted.norm()) > 2e-3:
            sys.stdout.write(f"    refused, wrong: {follows} {N} x {K} {config}\n")
            continue
        found.append((graph_time(lambda i, c=config: product(follows, given, weights[i], c), count), config))
    library = graph_time(lambda i: product(follows, given, weights[i], None), count)
    best, config = min(found, key=lambda pair: pair[0])
    plain = graph_time(lambda i: F.linear(given["x"], weights[i], given["bias"]), count)
    chosen = config if best < MARGIN * library else config | {"choice": LIBRARY}
    blocks = " ".join(str(config[key]) for key in ("block_m", "block_n", "block_k", "num_warps", "stages", "splits"))
    sys.stdout.write(
        f"{tokens:6} {follows:8} {N:5} x {K:5}  ours {best:7.2f} us  library {library:7.2f}  alone {plain:7.2f}  "
        f"{2 * tokens * N * K / min(best, library) / 1e6:5.0f} TFLOP/s  [{blocks}]\n"
    )
    bucket = min(max(16, 1 << (tokens - 1).bit_length()), 16384)
    return f"m={bucket},n={N},k={K},then={follows},bytes=2", chosen


# --- attention ----------------------------------------------------------------------------------------------------


def heads(case: tuple[int, int, int, int, int, str]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k and v as views of one fused projection, and the mask: a third of the keys of every other row is padding."""
    B, S, H, G, D, sees = case
    rows = torch.randn(B, S, H + 2 * G, D, device="cuda", dtype=torch.float16)
    q, k, v = (part.transpose(1, 2) for part in rows.split((H, G, G), dim=2))
    mask = None
    if sees == "mask":
        lengths = torch.tensor([S if row % 2 else 2 * S // 3 for row in range(B)], device="cuda")
        mask = (torch.arange(S, device="cuda") < lengths[:, None])[:, None, None].expand(B, 1, S, S)
    return q, k, v, mask


def by_torch(backend: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel(BACKENDS[backend]):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


def attention_settings() -> list[dict[str, int]]:
    keys = ("block_s", "block_t", "num_warps", "stages")
    return [dict(zip(keys, block, strict=True)) | {"choice": OWN} for block in BLOCKS]


def tune_attention(case: tuple[int, int, int, int, int, str]) -> tuple[str, dict[str, int]]:
    B, S, H, G, D, sees = case
    q, k, v, mask = heads(case)
    causal, count = sees == "causal", 12
    wanted = dk.attention_reference(q, k, v, mask, causal=causal).float().flatten(2)
    times: dict[int, float] = {}
    for backend in BACKENDS:
        # torch refuses what a backend cannot do
        try:
            got = by_torch(backend, q, k, v, mask, causal).float()
        except RuntimeError:
            continue
        if float((got - wanted).norm() / wanted.norm()) < 2e-3:
            times[backend] = graph_time(lambda _, b=backend: by_torch(b, q, k, v, mask, causal), count)
    own = []
    for config in attention_settings():
        try:
            got = dk.attention(q, k, v, mask, causal=causal, config=config).float().flatten(2)
        except triton.runtime.errors.OutOfResources:
            continue
        if float((got - wanted).norm() / wanted.norm()) > 2e-3:
            sys.stdout.write(f"    refused, wrong: {case} {config}\n")
            continue
        time = graph_time(lambda _, c=config: dk.attention(q, k, v, mask, causal=causal, config=c), count)
        own.append((time, config))
    times[OWN], config = min(own, key=lambda pair: pair[0])
    winner = min(times, key=lambda name: times[name])
    work = 4 * B * H * S * S * D / (2 if causal else 1)
    each = "  ".join(f"{NAMES[name]} {time:7.2f}" for name, time in times.items())
    blocks = " ".join(str(config[key]) for key in ("block_s", "block_t", "num_warps", "stages"))
    rate = work / times[winner] / 1e6
    sys.stdout.write(f"attention {B:2} x {S:4} {H}/{G} x {D:3} {sees:6}  {each}  {rate:5.0f} TFLOP/s  [{blocks}]\n")
    return f"head_dim={D},length={1 << (S - 1).bit_length()},sees={sees},bytes=2", config | {"choice": winner}


# --- compiling ahead ----------------------------------------------------------------------------------------------


def compile_all(part: int, parts: int, ops: tuple[str, ...], only: tuple[str, ...], tokens: tuple[int, ...]) -> None:
    """Every `parts`-th configuration launched once on small operands: what is compiled depends on no size."""
    with torch.no_grad(), dependent_launches(True):
        for job in jobs(ops, only, tokens)[part::parts]:
            try:
                job()
            except triton.runtime.errors.OutOfResources:
                continue


def jobs(ops: tuple[str, ...], only: tuple[str, ...], tokens: tuple[int, ...]) -> list[Callable[[], object]]:
    """What is to be compiled, as launches."""
    found: list[Callable[[], object]] = []
    if "linear" in ops:
        _, given = operands(128, 256, 256, 0)
        weight = torch.randn(256, 256, device="cuda", dtype=torch.float16)
        seen: dict[tuple[Any, ...], dict[str, int]] = {}
        for follows, count in [(f, t) for f in ("nothing", "gelu", "norm") for t in tokens]:
            for config in (*settings(count, follows, 768), *settings(count, follows, 4096)):
                seen[follows, *config.items()] = config
        found += [partial(product, key[0], given, weight, config) for key, config in seen.items()]
    if "attention" in ops:
        cases = (case for name in only for case in ATTENTION.get(name, ()))
        for D, sees in dict.fromkeys((case[4], case[5]) for case in cases):
            q, k, v, mask = heads((2, 128, 2, 2, D, sees))
            causal = sees == "causal"
            found += [partial(dk.attention, q, k, v, mask, causal=causal, config=one) for one in attention_settings()]
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder in which <op>/<device>.json is written")
    parser.add_argument("--op", nargs="+", choices=["linear", "attention"], default=["linear", "attention"])
    parser.add_argument("--only", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile")
    return parser.parse_args()


def write(folder: Path, op: str, table: dict[str, dict[str, int]]) -> None:
    slug = re.sub(r"[^A-Za-z0-9]+", "_", torch.cuda.get_device_name())
    target = folder / op / f"{slug}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(target.read_text()) if target.exists() else {}
    target.write_text(json.dumps(known | table, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def main() -> int:
    given = arguments()
    what = (tuple(given.op), tuple(given.only), tuple(given.tokens))
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=compile_all, args=(i, given.jobs, *what)) for i in range(given.jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    tables: dict[str, dict[str, dict[str, int]]] = {}
    # as in a forward's graph
    with dependent_launches(True):
        if "attention" in given.op:
            cases = [case for name in given.only for case in ATTENTION.get(name, ())]
            tables["attention"] = dict(map(tune_attention, cases))
        if "linear" in given.op:
            shapes = [
                (*shape, tokens) for tokens in given.tokens for name in given.only for shape in PRODUCTS.get(name, ())
            ]
            tables["linear_fused"] = dict(tune_product(*shape) for shape in shapes)
    if given.out is not None:
        for op, table in tables.items():
            write(given.out, op, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
