"""Does the optimized model follow casts, moves and captures?"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from dsi.runtime.capture import end_failed_capture
from dsi.testing.compare import check_same, forward, tensors, whole_fp32
from dsi.testing.report import Failed, Outcome, not_run, passed
from dsi.testing.subject import Subject, containers

_NO_CUDA = "no CUDA"
_CAST = "keep no tensor of the old dtype or device: register it, or make it anew in finish()"


def dtype_moves(subject: Subject) -> Outcome:
    """`.to(bfloat16)`, `.half()` and back: as accurate as stock cast the same way."""
    pair = subject.fresh_twins()
    stock = copy.deepcopy(pair.stock)
    inputs = subject.inputs(3, 7)
    exact = forward(pair.stock, inputs)
    for dtype in (torch.bfloat16, torch.float16):
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        found, wanted = forward(pair.model.to(dtype), given), forward(stock.to(dtype), given)
        ours, theirs = _error(found, exact), _error(wanted, exact)
        dtypes = [{t.dtype for _, t in tensors(one)} for one in (found, wanted)]
        # one draw, and the weights are rounded anew by each cast: what is lost here is a tensor left behind, not a bit
        if dtypes[0] != dtypes[1] or not ours <= 3 * theirs:
            raise Failed(
                f"a forward after .to({dtype})",
                measured=f"{ours:.2g}, {dtypes[0]}",
                allowed=f"{3 * theirs:.2g}, {dtypes[1]}",
                mend=_CAST,
            )
    given = forward(pair.model.float(), inputs)
    worst = check_same(
        given, forward(stock.float(), inputs), subject.tolerances.fp32, what="a forward back in fp32", mend=_CAST
    )
    return passed("casts and the cast back equal stock's", measured=worst, allowed=subject.tolerances.fp32)


def _error(found: Any, exact: Any) -> float:
    pairs = list(zip(tensors(found), tensors(exact), strict=True))
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for (_, a), (_, b) in pairs)


def device_moves(subject: Subject) -> Outcome:
    """To CUDA and back."""
    if not torch.cuda.is_available():
        return not_run(_NO_CUDA)
    pair = subject.fresh_twins()
    inputs = subject.inputs(3, 7)
    wanted = forward(pair.model, inputs)
    model = pair.model.to("cuda")
    stray = [name for name, tensor in model.state_dict().items() if tensor.device.type != "cuda"]
    if stray:
        raise Failed("after .to('cuda')", measured=", ".join(stray[:3]), allowed="all on cuda", mend=_CAST)
    with whole_fp32():
        there, stock = (forward(one, _on_cuda(inputs)) for one in (model, copy.deepcopy(pair.stock).cuda()))
    worst = check_same(there, stock, _CUDA_FP32, what="a forward on CUDA", mend=_CAST)
    check_same(forward(model.to("cpu"), inputs), wanted, 0.0, what="a forward back on the CPU", mend=_CAST)
    return passed("a move to CUDA and back equals stock", measured=worst, allowed=_CUDA_FP32)


# sums in another order, and fp32 products on tensor cores are off by default
_CUDA_FP32 = 1e-4


def cuda_graph_replay(subject: Subject) -> Outcome:
    """Each layer, captured as it is called, and replayed on new inputs, gives what an eager call gives.

    Layer by layer, because what the stock model does around its layers is not the policy's.
    """
    if not torch.cuda.is_available():
        return not_run(_NO_CUDA)
    model = subject.fresh_twins().model.to("cuda")
    first, *others = (recorded(model, _on_cuda(subject.inputs(2, 8, seed=seed)), subject) for seed in (0, 1, 2))
    worst = 0.0
    for layer, call in first.items():
        static = call.copy()
        graph, output = _capture(layer, static)
        for given in others:
            static.fill_(given[layer])
            graph.replay()
            worst = max(
                worst,
                check_same(
                    output,
                    given[layer].on(layer),
                    subject.tolerances.fp32,
                    what="a replay on new inputs",
                    mend="read nothing back to the host, and branch on no value: what is captured is what runs",
                ),
            )
    return passed(f"{len(first)} layers replay on new inputs", measured=worst, allowed=subject.tolerances.fp32)


def _on_cuda(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() for name, value in inputs.items()}


class LayerArguments:
    """What a layer was called with.

    Args:
        args, kwargs: as its parent gave them.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.leaves, self.form = tree_flatten((args, kwargs))

    def copy(self) -> LayerArguments:
        """The same in memory of its own."""
        args, kwargs = tree_unflatten(
            [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves], self.form
        )
        return LayerArguments(args, kwargs)

    def fill_(self, other: LayerArguments) -> None:
        """Take over the values of another call of the same form."""
        for own, new in zip(self.leaves, other.leaves, strict=True):
            if isinstance(own, Tensor):
                own.copy_(new)

    @torch.no_grad()
    def on(self, layer: nn.Module) -> Any:
        """What the layer gives for them."""
        args, kwargs = tree_unflatten(self.leaves, self.form)
        return layer(*args, **kwargs)


def recorded(model: nn.Module, inputs: dict[str, Any], subject: Subject) -> dict[nn.Module, LayerArguments]:
    """What each container is called with in one forward without a cache."""
    calls: dict[nn.Module, LayerArguments] = {}

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[layer] = LayerArguments(args, kwargs).copy()

    hooks = [one.register_forward_pre_hook(record, with_kwargs=True) for one in containers(model)]
    try:
        # without a cache nothing of a sequence outlives the call
        forward(model, inputs, **({"use_cache": False} if subject.decodes else {}))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _capture(layer: nn.Module, static: LayerArguments) -> tuple[Any, Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            static.on(layer)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            output = static.on(layer)
    except Exception:
        # the checks after this one draw random numbers
        end_failed_capture()
        raise
    return graph, output
