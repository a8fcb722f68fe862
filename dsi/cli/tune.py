"""`dsi tune`: measure the launch settings of a model's decode step on this device, for this user."""

from __future__ import annotations

import argparse
from typing import Any

from dsi.cli.command import Answer, Command, columns
from dsi.cli.model import add_arguments, plan_of, prepare
from dsi.errors import ConfigError


def _arguments(command: argparse.ArgumentParser) -> None:
    add_arguments(command)
    command.add_argument(
        "--rows", type=int, nargs="+", choices=(1, 2, 4, 8, 16, 32), default=[1, 8], help="batch sizes (default: 1 8)"
    )
    command.add_argument(
        "--budget", type=float, help="seconds after which attention to no longer context is begun (default: none)"
    )


def run(args: argparse.Namespace) -> Answer:
    """The settings found, which later processes of this user take.

    Raises:
        DsiError: there is no CUDA device.
        ConfigError: the model is not of 16-bit numbers.
    """
    import torch

    from dsi.attention_tuning import heads_of, tune_attentions
    from dsi.tuning import products_of, require_device, tune_all, write
    from dsi_kernels.tuned import user_folder

    require_device()
    model, config, registry = prepare(args)
    plan = plan_of(model, config, registry)
    if plan.dtype_after not in (torch.float16, torch.bfloat16):
        raise ConfigError([f"tune: the model is {plan.dtype_after}; give --dtype bfloat16 or float16"])
    device = torch.cuda.get_device_name()
    with torch.no_grad():
        rows = tuple(args.rows)
        found = list(tune_all(products_of(plan, model), rows, plan.dtype_after))
        found += tune_attentions(heads_of(plan), rows, plan.dtype_after, budget=args.budget)
    files = [str(path) for path in write(found, user_folder(), device)]
    lines: list[Any] = [["op", "shape", "us", "cuBLAS", "settings"]]
    lines += [[one.op, one.shape, f"{one.time:.2f}", _known(one.library), str(one.settings)] for one in found]
    data = {
        "device": device,
        "files": files,
        "found": [
            {"op": one.op, "shape": one.shape, "us": one.time, "cublas_us": one.library, "settings": one.settings}
            for one in found
        ],
    }
    return Answer(text="\n".join([device, columns(lines), *(f"written: {path}" for path in files)]), data=data)


def _known(time: float | None) -> str:
    return "" if time is None else f"{time:.2f}"


COMMAND = Command(name="tune", help="measure a model's launch settings on this device", run=run, arguments=_arguments)
