"""A convolution over maps [B, C, H, W], its weight held for channels-last maps.

Forms of the weight, chosen by device and dtype:

    channels_last   [O, I, kh, kw] with the input channels side by side; what cuDNN and torch's CPU kernels multiply
                    maps of that layout with, without a change of layout first
    packed          CPU: oneDNN's blocked layout; torch's own convolution makes it of the weight at every call. Of one
                    pixel (1 x 1) it is that of a linear layer over the pixels

Measured on a 2-core AMD Zen 5, batch 2, 3 x 3, milliseconds (stock, channels_last, packed): fp32 320 channels at
32 x 32: 34, 24, 16; 1280 at 8 x 8: 70, 55, 19; 1280 at 4 x 4: 60, 25, 4; bf16 2560 -> 1280 at 8 x 8: 33, 31, 10.
1 x 1, 2560 -> 1280, packed as a convolution, whose layout suits some sides alone, and as a linear layer: fp32 at 8 x 8:
110, 3.9; bf16 at 4 x 4: 152, 0.5.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsi.containers.linear import PACK_PADDING, has_bf16
from dsi.containers.unlisted import Formed

# the sides of a map that the packed layout is chosen for; oneDNN takes others too
HINT = 32
# oneDNN's blocks of output channels; one that is not full is filled with zeros
BLOCK = 16
# of output and input channels in a linear layer, the most that a dtype has
PIXEL_BLOCKS = (64, 64)


@attrs.frozen(kw_only=True)
class Window:
    """How a convolution moves over its map, as torch's Conv2d has it.

    Args:
        stride, padding, dilation: by height and width.
        groups: that input and output channels divide into.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Window:
        """That of a stock convolution, whose padding is numbers."""
        padding = tuple(int(side) for side in conv.padding)
        return cls(stride=tuple(conv.stride), padding=padding, dilation=tuple(conv.dilation), groups=conv.groups)


def choose_conv_form(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], groups: int) -> str:
    """The name of the form in which a weight [O, I, kh, kw] is held; see the module's docstring."""
    if device.type != "cpu" or groups != 1 or not torch.backends.mkldnn.is_available():
        return "channels_last"
    # what is padded is not packed
    blocks = PIXEL_BLOCKS if tuple(shape[2:]) == (1, 1) else (BLOCK, 2)
    if shape[0] % blocks[0] or shape[1] % blocks[1]:
        return "channels_last"
    native = dtype is torch.float32 or (dtype is torch.bfloat16 and has_bf16())
    return "packed" if native else "channels_last"


def channels_last(x: Tensor) -> Tensor:
    """The same map with its channels side by side; itself where they are."""
    return x.contiguous(memory_format=torch.channels_last)


def _cheap(packed: Tensor, weight: Tensor) -> Tensor | None:
    """The packed weight, or None where its padding would cost too much."""
    return packed if torch.ops.mkldnn._nbytes(packed) <= weight.nbytes * PACK_PADDING else None


class FusedConv(Formed):
    """A convolution of channels-last maps.

    Args:
        weight: [O, I, kh, kw], memory of its own.
        bias: [O] or None.
        path: the stock submodule inside its layer; "" for the layer itself.
        window: how it moves.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None, path: str, window: Window) -> None:
        super().__init__()
        self.path, self.window, self.shape, self.form = path, window, tuple(weight.shape), "channels_last"
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.weight = nn.Parameter(channels_last(weight), requires_grad=False)

    def choose_form_(self) -> None:
        """Hold the weight in the form that its device and dtype want."""
        self.unpack_()
        weight = self.weight.detach()
        self._hold(weight, choose_conv_form(weight.device, weight.dtype, self.shape, self.window.groups))

    def _hold(self, weight: Tensor, form: str) -> None:
        packed = self._packed(weight) if form == "packed" else None
        self.form = "channels_last" if packed is None else form
        self.weight = nn.Parameter(weight if packed is None else packed, requires_grad=False)

    def _packed(self, weight: Tensor) -> Tensor | None:
        """The weight in oneDNN's layout, or None where its padding would cost too much."""
        w = self.window
        if self._is_linear:
            return _cheap(torch.ops.mkldnn._reorder_linear_weight(weight.flatten(1).contiguous()), weight)
        like = [1, self.shape[1], HINT, HINT]
        moved = weight.contiguous().to_mkldnn()
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        return _cheap(reorder(moved, w.padding, w.stride, w.dilation, w.groups, like), weight)

    @property
    def _is_linear(self) -> bool:
        """A product over each pixel alone."""
        w = self.window
        return self.shape[2:] == (1, 1) and w.stride == (1, 1) and w.padding == (0, 0) and w.groups == 1

    def _dense(self) -> Tensor:
        """A packed weight as a plain tensor [O, I, kh, kw]."""
        return self.weight.detach().to_dense().view(self.shape)

    def unpack_(self) -> None:
        """Hold the weight as a plain tensor, channels-last."""
        if self.form == "packed":
            self.weight = nn.Parameter(channels_last(self._dense()), requires_grad=False)
        self.form = "channels_last"

    def extra_repr(self) -> str:
        return f"{self.shape}, form={self.form}, bias={self.bias is not None}"

    # --- computing --------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, bias: bool = True) -> Tensor:
        """[B, I, H, W] -> [B, O, H', W'], both channels-last; without its bias where somebody else adds it."""
        own: dict[str, Any] = self._parameters
        added = own["bias"] if bias else None
        w = self.window
        if self.form == "packed" and self._is_linear:
            pixels = x.permute(0, 2, 3, 1).contiguous()
            rows: Tensor = torch.ops.mkldnn._linear_pointwise.default(pixels, own["weight"], added, "none", [], "")
            return rows.permute(0, 3, 1, 2)
        if self.form == "packed":
            given: Any = (x, own["weight"], added, w.padding, w.stride, w.dilation, w.groups, "none", [], "")
            product: Tensor = torch.ops.mkldnn._convolution_pointwise.default(*given)
            return product
        return F.conv2d(x, own["weight"], added, w.stride, w.padding, w.dilation, w.groups)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """`forward(x) + residual`."""
        return self.forward(x).add_(residual)

    # --- weights in and out -----------------------------------------------------------------------------------

    def export(self) -> dict[str, Tensor]:
        """The stock parameters by path; copies where the weight is packed."""
        prefix = f"{self.path}." if self.path else ""
        weight = self.weight.detach()
        result = {f"{prefix}weight": self._dense() if self.form == "packed" else weight}
        if self.bias is not None:
            result[f"{prefix}bias"] = self.bias.detach()
        return result

    def load(self, parts: dict[str, Tensor]) -> None:
        """Take new stock parameters, in the form of `export()`."""
        current = self.export()
        prefix, form = f"{self.path}." if self.path else "", self.form
        weight = channels_last(parts[f"{prefix}weight"].to(current[f"{prefix}weight"], copy=True))
        self._hold(weight, form)
        if self.bias is not None:
            self.bias.data.copy_(parts[f"{prefix}bias"])

    # --- torch's own machinery --------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__() if hasattr(super(), "__getstate__") else self.__dict__
        if self.form != "packed":
            return dict(state)
        parameters = dict(self._parameters)
        parameters["weight"] = nn.Parameter(channels_last(self._dense()), requires_grad=False)
        return {**state, "_parameters": parameters, "form": "channels_last"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.choose_form_()
