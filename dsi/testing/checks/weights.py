"""Do weights go in and out under their stock names, and are they there once?"""

from __future__ import annotations

import copy
import gc
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsi.config import load_config
from dsi.planner import make_plan
from dsi.testing.compare import check_same, forward, same_bits
from dsi.testing.report import Failed, Outcome, failed, passed
from dsi.testing.subject import Subject

_STOCK_LAYOUT = "a container exports each stock parameter under its stock name, shape and dtype, unchanged"


def check_equal_states(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str, mend: str) -> None:
    """Two state dicts are equal: names in their order, shapes, dtypes, bits.

    Raises:
        Failed: they are not.
    """
    if list(found) != list(wanted):
        extra, missing = sorted(found.keys() - wanted.keys()), sorted(wanted.keys() - found.keys())
        measured = f"{len(extra)} more, {len(missing)} missing: {', '.join((extra + missing)[:3]) or 'another order'}"
        raise Failed(what, measured=measured, allowed="stock's names", mend=mend)
    wrong = [name for name, tensor in wanted.items() if not same_bits(found[name], tensor)]
    if wrong:
        raise Failed(what, measured=f"{len(wrong)} differ: {', '.join(wrong[:3])}", allowed="equal bits", mend=mend)


def state_dict_round_trip(subject: Subject) -> Outcome:
    """`state_dict` is stock's; loading another model's makes it that model."""
    pair = subject.fresh_twins()
    check_equal_states(pair.model.state_dict(), pair.stock.state_dict(), "state_dict()", _STOCK_LAYOUT)
    other = subject.stock(seed=1)
    given = pair.model.load_state_dict(other.state_dict())
    if given.missing_keys or given.unexpected_keys:
        raise Failed("load_state_dict()", measured=str(given), allowed="all keys match", mend=_STOCK_LAYOUT)
    check_equal_states(pair.model.state_dict(), other.state_dict(), "state_dict() after a load", _STOCK_LAYOUT)
    inputs = subject.inputs(2, 7)
    check_same(
        forward(pair.model, inputs),
        forward(other, inputs),
        subject.tolerances.fp32,
        what="a forward after load_state_dict()",
        mend="keep nothing that is derived from weights beside them, or derive it again when they are loaded",
    )
    return passed(f"{len(other.state_dict())} tensors go out and in under their stock names")


def save_pretrained_round_trip(subject: Subject) -> Outcome:
    """What `save_pretrained` writes, the stock class reads."""
    pair = subject.twins()
    with tempfile.TemporaryDirectory() as folder:
        pair.model.save_pretrained(folder)
        loaded, info = type(pair.stock).from_pretrained(folder, output_loading_info=True)
        written = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    faults = {name: found for name, found in info.items() if found}
    if faults:
        what = "from_pretrained() of what was saved"
        raise Failed(what, measured=str(faults)[:200], allowed="no key left", mend=_STOCK_LAYOUT)
    name = type(pair.stock).__name__
    # of transformers, of diffusers
    said = written.get("architectures") or [written.get("_class_name")]
    if said != [name]:
        raise Failed("the model's class in config.json", measured=str(said), allowed=name, mend=_STOCK_LAYOUT)
    check_equal_states(loaded.state_dict(), pair.stock.state_dict(), "weights after save_pretrained()", _STOCK_LAYOUT)
    return passed("the stock class reads what save_pretrained wrote, bit for bit")


def meta_load(subject: Subject) -> Outcome:
    """Built on the meta device, planned, weights assigned, then injected: what a streaming loader does."""
    stock, wanted = subject.stock(), subject.plan.to_dict()
    with torch.device("meta"):
        model = subject.build(copy.deepcopy(subject.config))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32)
    if not subject.of_maps:
        model.config.dtype = torch.float32
    _check_plan(subject, model, wanted)
    model.load_state_dict(copy.deepcopy(stock.state_dict()), assign=True)
    if not subject.of_maps:
        model.tie_weights()
    _copy_unsaved_(model, stock)
    subject.inject(model)
    inputs = subject.inputs(2, 7)
    worst = check_same(
        forward(model, inputs),
        forward(stock, inputs),
        subject.tolerances.fp32,
        what="a forward of a model built on the meta device",
        mend="read everything from the layer when the container is made, nothing when the stock layer is",
    )
    what = "a model built on the meta device gets the same plan, and equals stock once it is loaded"
    return passed(what, measured=worst, allowed=subject.tolerances.fp32)


def _check_plan(subject: Subject, skeleton: nn.Module, wanted: Mapping[str, Any]) -> None:
    config = load_config(None, {"injection_policy": subject.policy})
    made = make_plan(skeleton, config, subject.registry, assume_loaded=True).to_dict()
    different = sorted(key for key in wanted if made[key] != wanted[key] and key != "device")
    if different:
        raise Failed(
            f"the plan of a skeleton differs in {', '.join(different)}",
            measured=f"{len(different)} differences",
            allowed="none",
            mend="read facts from the config and from attributes, never from the weights",
        )


def _copy_unsaved_(model: nn.Module, stock: nn.Module) -> None:
    """What no checkpoint holds, as a loader computes it anew: buffers, and the kit's own epsilons."""
    modules = dict(stock.named_modules())
    for path, module in model.named_modules():
        for name, buffer in modules[path]._buffers.items():
            if buffer is not None and module._buffers[name].is_meta:
                module._buffers[name] = buffer.clone()
        for name, value in vars(modules[path]).items():
            if isinstance(value, Tensor):
                setattr(module, name, value.clone())
            elif isinstance(value, float):
                setattr(module, name, value)


def no_second_copy(subject: Subject) -> Outcome:
    """Bytes of all tensors alive, before and after, the original's included."""
    model = subject.fresh()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    # what others left behind is no one's copy
    before = held()
    engine: Any = subject.inject(model)
    forward(model, subject.inputs(1, 4))
    share = 1 + max(0, held() - before) / weights
    del engine
    what, allowed = "bytes of weights after the injection, as a multiple of before", subject.tolerances.memory
    if not share <= allowed:
        return failed(
            what,
            measured=share,
            allowed=allowed,
            mend="let go of the stock tensors once they are fused; keep no clone, also not for restore()",
        )
    return passed(what, measured=share, allowed=allowed)


def held() -> int:
    """Bytes of the weights that Python can reach, each memory once; row orders and masks are no weights."""
    gc.collect()
    memories: dict[int, int] = {}
    packed = 0
    for thing in gc.get_objects():
        # by its exact type: isinstance wakes lazy modules, and the compiler's fake tensors have no memory
        if type(thing) not in (Tensor, nn.Parameter) or thing.is_meta:
            continue
        if thing.dtype in (torch.int64, torch.int32, torch.bool):
            continue
        if thing.is_mkldnn:
            packed += int(torch.ops.mkldnn._nbytes(thing.detach()))
        else:
            storage = thing.untyped_storage()
            memories[storage.data_ptr()] = storage.nbytes()
    return sum(memories.values()) + packed
