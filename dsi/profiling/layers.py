"""One forward, measured layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import nn

from dsi.containers import StandIn
from dsi.profiling.clock import Interval, start_interval
from dsi.report import size


@attrs.frozen(kw_only=True)
class LayerTime:
    """One row of a profile.

    Args:
        path: of the module in the model.
        name: its class.
        calls: how often it ran.
        milliseconds: in all calls together.
        bytes: of its weights, which each call reads once at least.
    """

    path: str
    name: str
    calls: int
    milliseconds: float
    bytes: int


@attrs.frozen(kw_only=True)
class Profile:
    """A per-layer table; `rows` leave out the modules that did not run.

    Args:
        rows: fused layers whole, elsewhere the smallest modules that have weights, in the model's order.
        total: milliseconds of the whole forward; what the rows leave is spent between them.
    """

    rows: tuple[LayerTime, ...]
    total: float

    def table(self) -> str:
        """The profile as text."""
        width = max((len(row.path) for row in self.rows), default=4)
        lines = [f"{'layer':{width}}  {'calls':>5}  {'ms':>9}  {'share':>6}  {'weights':>9}  {'GB/s':>6}  class"]
        for row in self.rows:
            share = row.milliseconds / self.total if self.total else 0.0
            rate = row.bytes * row.calls / row.milliseconds / 1e6 if row.milliseconds else 0.0
            lines.append(
                f"{row.path:{width}}  {row.calls:5d}  {row.milliseconds:9.3f}  {share:6.1%}  {size(row.bytes):>9}  "
                f"{rate:6.1f}  {row.name}"
            )
        rest = self.total - sum(row.milliseconds for row in self.rows)
        lines.append(f"{'between':{width}}  {'':5}  {rest:9.3f}  {rest / self.total if self.total else 0:6.1%}")
        lines.append(f"{'whole forward':{width}}  {1:5d}  {self.total:9.3f}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def profile_layers(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Profile:
    """Run one forward with a timer around each layer; the timers are gone afterwards, also when the forward raises.

    Args:
        model: the model.
        args, kwargs: of its forward.
    """
    device = next(model.parameters()).device
    running: list[Interval] = []
    spent: dict[str, list[Interval]] = {}
    hooks = []
    measured = dict(_measured(model))

    def enter(module: nn.Module, inputs: Any) -> None:
        running.append(start_interval(device, use_cuda_events=True))

    try:
        for path, module in measured.items():

            def leave(module: nn.Module, inputs: Any, output: Any, path: str = path) -> None:
                interval = running.pop()
                interval.stop()
                spent.setdefault(path, []).append(interval)

            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
        whole = start_interval(device, use_cuda_events=True)
        with torch.no_grad():
            model(*args, **kwargs)
        whole.stop()
    finally:
        for hook in hooks:
            hook.remove()
    total = whole.milliseconds()
    rows = [
        LayerTime(
            path=path,
            name=module._get_name(),
            calls=len(spent[path]),
            milliseconds=sum(interval.milliseconds() for interval in spent[path]),
            bytes=sum(p.numel() * p.element_size() for p in module.parameters()),
        )
        for path, module in measured.items()
        if path in spent
    ]
    return Profile(rows=tuple(rows), total=total)


def _measured(model: nn.Module, path: str = "", seen: set[nn.Module] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Containers whole; elsewhere modules with parameters of their own. Each once, where it stands first."""
    seen = set() if seen is None else seen
    if model in seen:
        return
    seen.add(model)
    if isinstance(model, StandIn) or (path and next(model.parameters(recurse=False), None) is not None):
        yield path, model
        return
    for name, child in model.named_children():
        yield from _measured(child, f"{path}.{name}" if path else name, seen)
