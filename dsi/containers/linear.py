"""The fused linear layer: several stock projections as one matrix, in the form that the processor reads fastest.

Forms, chosen once at injection and shown in the plan:

    aten      weight [N, K], torch's own linear (MKL on CPU, cuBLAS on CUDA)
    packed    CPU: oneDNN's blocked layout, bias, residual and (with AVX-512) activation inside the product
    parts     CPU with AVX-512: one block of rows for each thread, each in the order [K, N / threads], for small fp32
              weights: at one row a batched product of MKL's, which costs less to begin than oneDNN's
    columns   CPU: as aten, the memory in the order [K, N]; for small fp32 weights where parts are not to be had, with
              AVX-512 all of them, else those that have many more rows than columns
    upcast    CPU without 16-bit instructions: stored in 16 bits, multiplied in fp32 from a few rows on

Measured on a 2-core AMD Zen 3 (AVX2), M=128, K=768, N=3072, fp32: aten 89 GFLOP/s, packed 127; bf16: aten 18,
upcast 111. At one row and with weights out of cache, fp32, 1408 x 256: aten 10 GB/s, packed 16, columns 21; but
256 x 704: aten 14, packed 15, columns 11. On a 2-core AMD Zen 5 (AVX-512) at one row, fp32, in microseconds: 1408 x 256
columns 66, oneDNN's 42, parts 37; 256 x 704 28, 24, 13; 256 x 384 11, 16, 5; 768 x 768 packed 54, parts 65. bf16, 256 x
384: aten 9 GB/s, packed 13.
"""

from __future__ import annotations

import math
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsi.containers.activations import ACTIVATIONS
from dsi.containers.layouts import Runs, inverse
from dsi.containers.unlisted import Formed

# below half a million fp32 weights oneDNN's blocked layout is not the fastest at one row
# (2-core Zen 3, 1024 x 256: 37 us by columns against 56 us; 2-core Zen 5, 768 x 256: 23 us against 31 us)
PACK_FROM = 1 << 19
# oneDNN's blocks, [out, in]; their padding may cost at most this share of the weight's bytes
BLOCK = (64, 16)
PACK_PADDING = 1.01
# multiplications from which oneDNN's product of a small fp32 weight with many rows costs less than MKL's (2-core Zen 5,
# 128 rows: 96 x 32 18 us against 11, 256 x 32 21 against 21; 2048 rows: 96 x 32 45 us against 71)
ONEDNN_FROM = 1 << 20
# rows from which a 16-bit weight is worth expanding to fp32 for one product
UPCAST_FROM = 4

# kind -> oneDNN's name and algorithm
_FUSED_ACTIVATIONS = {
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}


@attrs.frozen(kw_only=True)
class Source:
    """Where a run of fused rows came from.

    Args:
        path: the stock submodule inside its layer.
        rows: how many output rows it contributes.
        transposed: it stores its weight [in, out].
        bias: it has a bias; among sources that are fused, one without counts as zeros.
        tail: sizes of its weight behind [rows, K], e.g. (1, 1) of a convolution of one pixel.
    """

    path: str
    rows: int
    transposed: bool
    bias: bool
    tail: tuple[int, ...] = ()


def _pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, scalars: list[float], algorithm: str
) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, activation, scalars, algorithm)
    return product


def choose_form(
    device: torch.device, dtype: torch.dtype, out_features: int, in_features: int, *, many: bool = False
) -> str:
    """The name of the form in which an [out_features, in_features] weight is held; see the module's docstring.

    many: it is multiplied with many rows at a time, always.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return "aten"
    if dtype is torch.bfloat16 and has_bf16():
        return "packed" if _packs_tightly(out_features, in_features) else "aten"
    if dtype is torch.float32:
        if out_features * in_features >= PACK_FROM and _packs_tightly(out_features, in_features):
            return "packed"
        return _small_form(out_features, in_features, many=many)
    return "upcast" if dtype in (torch.bfloat16, torch.float16) else "aten"


def _small_form(out_features: int, in_features: int, *, many: bool) -> str:
    if has_avx512() and not many and _parts_of(out_features) > 1:
        return "parts"
    return "columns" if has_avx512() or out_features >= 2 * in_features else "aten"


def _parts_of(out_features: int) -> int:
    """How many blocks of equal size `parts` makes: one for each thread, or one where that does not divide."""
    threads = torch.get_num_threads()
    return threads if out_features % threads == 0 else 1


def _packs_tightly(out_features: int, in_features: int) -> bool:
    padded = math.ceil(out_features / BLOCK[0]) * BLOCK[0] * math.ceil(in_features / BLOCK[1]) * BLOCK[1]
    return padded <= PACK_PADDING * out_features * in_features


def has_bf16() -> bool:
    """Whether the processor multiplies bf16 itself."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_avx512() -> bool:
    """Whether torch's CPU kernels, and so oneDNN's, use AVX-512 here."""
    return "avx512" in torch.backends.cpu.get_cpu_capability().lower()


def by_columns(weight: Tensor) -> Tensor:
    """The same [N, K] matrix in memory of the order [K, N]."""
    return weight.t().contiguous().t()


def _pack(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's layout, or None where its padding would cost too much."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return packed if torch.ops.mkldnn._nbytes(packed) <= weight.nbytes * PACK_PADDING else None


class FusedLinear(Formed):
    """`y = x @ W.T + b`, with W the rows of all sources stacked.

    Args:
        weight: [N, K], contiguous, already in the container's row order.
        bias: [N] or None.
        sources: whose rows they are, in order of the stored layout.
        permutation: int64 [N], the row order's permutation over all sources' stored rows, or None.
        form: "aten", "packed", "columns", "parts" or "upcast".
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        sources: tuple[Source, ...],
        permutation: Tensor | None = None,
        form: str = "aten",
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.sources = sources
        self._runs = None if permutation is None else Runs.of(permutation)
        # it is multiplied with many rows at a time, always
        self.many = False
        self.wide = has_avx512()
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self._hold(weight, form)

    @property
    def permutation(self) -> Tensor | None:
        """The row order's permutation over all sources' stored rows, int64 [N]."""
        return None if self._runs is None else self._runs.permutation()

    def _hold(self, weight: Tensor, form: str) -> None:
        packed = _pack(weight) if form == "packed" else None
        self.form = "aten" if form == "packed" and packed is None else form
        if form == "columns":
            weight = by_columns(weight)
        if form == "parts":
            blocks = weight.view(_parts_of(self.out_features), -1, self.in_features)
            weight = blocks.transpose(1, 2).contiguous()
        self.weight = nn.Parameter(weight if packed is None else packed, requires_grad=False)

    def choose_form_(self) -> None:
        """Hold the weight in the form that its device and dtype want."""
        self.unpack_()
        weight = self.weight.detach()
        shape = self.out_features, self.in_features
        self._hold(weight, choose_form(weight.device, weight.dtype, *shape, many=self.many))

    def unpack_(self) -> None:
        """Hold the weight as a plain matrix."""
        if self.form in ("packed", "parts"):
            self.weight = nn.Parameter(self.dense_weight(), requires_grad=False)
            self.form = "aten"

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, form={self.form}, bias={self.bias is not None}"

    # --- computing --------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        own: dict[str, Any] = self._parameters
        if self.form == "parts":
            return self._by_parts(x, own["weight"], own["bias"], own["bias"])
        if self.form == "packed" or (self.form == "columns" and self._by_onednn(x)):
            return self._pointwise(x, "none", "")
        if self.form == "upcast" and x.numel() >= UPCAST_FROM * self.in_features:
            return self._upcast(x)
        return F.linear(x, own["weight"], own["bias"])

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """`forward(x) + residual`, in one product where the form allows it; residual is [..., N]."""
        own: dict[str, Any] = self._parameters
        one_row = x.numel() == self.in_features
        if self.form == "parts" and one_row:
            total = self._by_parts(x, own["weight"], own["bias"], residual)
            return total if own["bias"] is None else total.add_(own["bias"])
        onednn = self.form == "packed" or (self.form == "columns" and self._by_onednn(x))
        if onednn and not one_row:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, own["weight"], own["bias"], "add")
        if not onednn and self.form in ("aten", "columns") and own["bias"] is None and x.dim() == 2:
            return torch.addmm(residual, x, own["weight"].t())
        # at one row oneDNN's fused sum costs more than a sum of its own
        return self.forward(x).add_(residual)

    def activate(self, x: Tensor, kind: str) -> Tensor:
        """`activation(forward(x))`."""
        onednn = self.form == "packed" or (self.form == "columns" and self._by_onednn(x))
        if onednn and self.wide and kind in _FUSED_ACTIVATIONS:
            return self._pointwise(x, *_FUSED_ACTIVATIONS[kind])
        return ACTIVATIONS[kind](self.forward(x))

    def _by_onednn(self, x: Tensor) -> bool:
        """Whether a product with a weight held by columns is oneDNN's: at one row MKL's costs less to begin."""
        if self.many:
            return self.wide and x.numel() * self.out_features >= ONEDNN_FROM
        return self.wide and x.numel() > self.in_features

    def _by_parts(self, x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor | None) -> Tensor:
        """x @ weight^T, the weight [parts, K, N / parts]: plus `first` [..., N] at one row, plus `bias` at several."""
        parts = weight.shape[0]
        if x.numel() == self.in_features:
            row = (x if x.dim() == 2 else x.view(1, -1)).expand(parts, 1, -1)
            found = torch.bmm(row, weight) if first is None else torch.baddbmm(first.view(parts, 1, -1), row, weight)
            return found.view(*x.shape[:-1], self.out_features)
        flat = x.reshape(-1, self.in_features)
        biases = [None] * parts if bias is None else bias.view(parts, -1)
        blocks = [_pointwise(flat, w.t(), b, "none", [], "") for w, b in zip(weight, biases, strict=True)]
        return torch.cat(blocks, dim=-1).view(*x.shape[:-1], self.out_features)

    def _pointwise(self, x: Tensor, activation: str, algorithm: str) -> Tensor:
        own: dict[str, Any] = self._parameters
        return _pointwise(x, own["weight"], own["bias"], activation, [], algorithm)

    def _upcast(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return _pointwise(x.float(), self.weight.float(), bias, "none", [], "").to(x.dtype)

    # --- weights in and out -----------------------------------------------------------------------------------

    def dense_weight(self) -> Tensor:
        """[N, K] in the container's row order; a copy when packed or in parts."""
        if self.form == "parts":
            return self.weight.detach().transpose(1, 2).reshape(self.out_features, self.in_features)
        return self.weight.to_dense() if self.form == "packed" else self.weight.detach()

    def export(self) -> dict[str, Tensor]:
        """The sources' stock parameters by path, e.g. "self_attn.q_proj.weight".

        Views of this layer's memory where the form and the layout allow it, copies elsewhere.
        """
        weight, bias, order = self.dense_weight(), None if self.bias is None else self.bias.detach(), self.permutation
        if order is not None:
            back = inverse(order).to(weight.device)
            weight, bias = weight[back], None if bias is None else bias[back]
        result: dict[str, Tensor] = {}
        start = 0
        for source in self.sources:
            rows = weight[start : start + source.rows]
            rows = rows.t() if source.transposed else rows
            result[f"{source.path}.weight"] = rows.view(*rows.shape, *source.tail) if source.tail else rows
            if source.bias and bias is not None:
                result[f"{source.path}.bias"] = bias[start : start + source.rows]
            start += source.rows
        return result

    def load(self, parts: dict[str, Tensor]) -> None:
        """Take new stock parameters, in the form of `export()`."""
        weight, bias = stack(self.sources, self.permutation, parts)
        current = self.dense_weight()
        self._hold(weight.to(current), "packed" if self.form == "packed" else self.form)
        if self.bias is not None and bias is not None:
            self.bias.data.copy_(bias)

    # --- torch's own machinery --------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__() if hasattr(super(), "__getstate__") else self.__dict__
        if self.form != "packed":
            return dict(state)
        parameters = dict(self._parameters)
        parameters["weight"] = nn.Parameter(self.dense_weight(), requires_grad=False)
        return {**state, "_parameters": parameters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.form == "packed":
            self._hold(self.weight.detach(), "packed")


def stack(
    sources: tuple[Source, ...], permutation: Tensor | None, parts: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Fuse stock parameters.

    Args:
        sources: whose rows, in stored order.
        permutation: int64 [N] row order, or None.
        parts: stock parameters by path; the weights [rows, K], or [K, rows] where the source is transposed.

    Returns:
        (weight [N, K] contiguous, bias [N] or None), new memory.
    """
    weights = [parts[f"{s.path}.weight"].t() if s.transposed else parts[f"{s.path}.weight"] for s in sources]
    weights = [weight.flatten(1) for weight in weights]
    weight = torch.cat(weights) if len(weights) > 1 else weights[0].clone(memory_format=torch.contiguous_format)
    bias = None
    if any(source.bias for source in sources):
        bias = torch.cat([parts[f"{s.path}.bias"] if s.bias else weight.new_zeros(s.rows) for s in sources])
    if permutation is not None:
        order = permutation.to(weight.device)
        weight, bias = weight[order], None if bias is None else bias[order]
    return weight.contiguous(), bias
