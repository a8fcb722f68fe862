"""Does the injection stay on one model, come off again, and survive what users do to models?"""

from __future__ import annotations

import copy

# nothing but what this module has written itself is read back
import pickle
from collections.abc import Mapping
from typing import Any

from torch import nn

from dsi.errors import InjectionError
from dsi.testing.checks.weights import check_equal_states
from dsi.testing.compare import check_same, forward
from dsi.testing.report import Failed, Outcome, failed, passed
from dsi.testing.subject import Subject, containers

_UNDO = "undo every change: leave no attribute, hook, wrapper or value on the stock layer, its parts or its config"


def restore(subject: Subject) -> Outcome:
    """After use, `restore()` gives back the modules, the parameters, their bits and everything beside them."""
    model = subject.fresh()
    before = _state(model)
    engine = subject.inject(model)
    forward(model, subject.inputs(2, 6))
    if not subject.of_maps:
        forward(model, subject.inputs(2, 6), output_hidden_states=True)
    engine.restore()
    after = _state(model)
    different = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    if different:
        return failed(
            f"after restore(): {', '.join(different[:4])}",
            measured=f"{len(different)} differences",
            allowed="none",
            mend=_UNDO,
        )
    stock = subject.stock()
    check_equal_states(model.state_dict(), stock.state_dict(), "weights after restore()", _UNDO)
    inputs = subject.inputs(2, 7)
    check_same(forward(model, inputs), forward(stock, inputs), 0.0, what="a forward after restore()", mend=_UNDO)
    return passed("restore() gives back the same objects and bits")


# what transformers sets when outputs are first recorded
_OWN_MARKS = frozenset({"_output_capturing_hooks_installed"})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _state(model: nn.Module) -> dict[str, Any]:
    """Objects and plain values of every module, each under its own key."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"{path} (module)"] = id(module), type(module)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            found[f"{path}.{name}"] = tensor if tensor is None else (id(tensor), tensor.shape, tensor.stride())
        for name, value in vars(module).items():
            if name not in _OWN_MARKS and not name.startswith("_forward"):
                plain = isinstance(value, bool | int | float | str | type(None))
                found[f"{path}.{name} (attribute)"] = value if plain else type(value)
        for name in _HOOKS:
            hooks = [hook for hook in getattr(module, name).values() if "output_capturing" not in hook.__module__]
            found[f"{path}.{name}"] = len(hooks)
    config = getattr(model, "config", None)
    if config is not None:
        found["config"] = str(dict(config)) if isinstance(config, Mapping) else config.to_json_string()
    return found


def apply_twice(subject: Subject) -> Outcome:
    """A second `init_inference` is refused by name, and the model works on."""
    pair = subject.fresh_twins()
    try:
        subject.inject(pair.model)
    except InjectionError as error:
        if "optimized already" not in str(error):
            raise
    else:
        return failed(
            "a second init_inference",
            measured="no error",
            allowed="InjectionError",
            mend="a container must stay recognisable: keep it a dsi.containers.Container in the module tree",
        )
    inputs = subject.inputs(2, 6)
    mend = "a refused injection changes nothing"
    worst = check_same(
        *subject.both(pair, inputs), subject.tolerances.fp32, what="a forward after the refusal", mend=mend
    )
    return passed("a second init_inference is refused", measured=worst, allowed=subject.tolerances.fp32)


def instance_only(subject: Subject) -> Outcome:
    """No class, module or registry was touched, and a second model is what it was."""
    stock = subject.stock()
    changes = subject.world.changes(stock)
    if changes:
        return failed(
            f"the injection changed {', '.join(changes[:4])}",
            measured=f"{len(changes)} attributes",
            allowed="none",
            mend="change the instance that is given, never a class or a module: other models use them",
        )
    second = subject.fresh(seed=1)
    inputs = subject.inputs(2, 7)
    before = forward(second, inputs)
    forward(subject.twins().model, inputs)
    check_same(
        forward(second, inputs), before, 0.0, what="a second model of the class", mend="share no state between models"
    )
    if containers(stock) or containers(second):
        return failed(
            "containers in a model that was never injected",
            measured="containers",
            allowed="none",
            mend="share no modules between models",
        )
    return passed("classes, modules and a second model are untouched")


def deepcopy(subject: Subject) -> Outcome:
    """A deep copy computes the same, and is a model of its own."""
    return _copied(subject, "copy.deepcopy", copy.deepcopy)


def pickling(subject: Subject) -> Outcome:
    """What comes back from pickle computes the same, and is a model of its own."""
    # the copy of an instance override (generate) is a partial over the model itself, as the original's is
    return _copied(subject, "pickle", lambda model: pickle.loads(pickle.dumps(model)))  # noqa: S301


def _copied(subject: Subject, name: str, duplicate: Any) -> Outcome:
    pair = subject.fresh_twins()
    inputs = subject.inputs(2, 7)
    wanted = forward(pair.model, inputs)
    made = duplicate(pair.model)
    mend = "keep state in attributes that copy and pickle know: no closures, locks or handles without __getstate__"
    check_same(forward(made, inputs), wanted, 0.0, what=f"a forward of what {name} made", mend=mend)
    if len(containers(made)) != len(containers(pair.model)):
        raise Failed(
            f"containers in what {name} made",
            measured=len(containers(made)),
            allowed=len(containers(pair.model)),
            mend=mend,
        )
    made.load_state_dict(subject.stock(seed=1).state_dict())
    what = f"a forward of the original after the weights of what {name} made were changed"
    check_same(forward(pair.model, inputs), wanted, 0.0, what=what, mend="the copy shares memory with the original")
    what = f"a forward of what {name} made with other weights"
    worst = check_same(
        forward(made, inputs), forward(subject.stock(seed=1), inputs), subject.tolerances.fp32, what=what, mend=mend
    )
    return passed(f"{name} makes an equal, separate model", measured=worst, allowed=subject.tolerances.fp32)
