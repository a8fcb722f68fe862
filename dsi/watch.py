"""What happened to the process while somebody else's code ran: `Traces`, and the globals put back.

    with watch() as traces:
        plugin = load()
    traces.printed, traces.threads, traces.heavy, traces.patched

A plugin that registers is welcome; one that prints, starts threads, imports torch or replaces a part of it while it is
loaded does that to everyone. Text for stdout goes to stderr, so that `--json` stays JSON, and what was replaced is put
back. Only what is imported already can be watched: torch is, wherever a model is.
"""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import ModuleType, UnionType
from typing import Any

import attrs

HEAVY = ("torch", "transformers", "diffusers", "triton", "accelerate", "numpy")
"""Packages that loading a plugin imports none of."""

MANY_MODULES = 300
"""More modules than this are a heavy import too, whatever their names."""

# (module, attributes of which those of their own are watched too); what models are made of, and what everybody calls
_WATCHED = (
    ("builtins", ()),
    ("torch", ("Tensor",)),
    ("torch.nn", ("Module", "Linear", "LayerNorm", "RMSNorm", "Embedding", "Conv2d", "GroupNorm", "Dropout")),
    ("torch.nn.functional", ()),
    ("transformers.modeling_utils", ("PreTrainedModel",)),
    ("transformers.cache_utils", ("DynamicCache",)),
)


@attrs.define(kw_only=True)
class Traces:
    """What was left behind.

    Args:
        seconds: how long it took.
        modules: how many modules it imported.
        heavy: those of `HEAVY` that it imported.
        printed: the text that it meant for stdout.
        threads: names of the threads that still run.
        patched: dotted names of globals that it replaced, and settings that it changed; put back by now.
    """

    seconds: float = 0.0
    modules: int = 0
    heavy: tuple[str, ...] = ()
    printed: str = ""
    threads: tuple[str, ...] = ()
    patched: tuple[str, ...] = ()

    def complaints(self) -> Iterator[tuple[str, str]]:
        """(what was found, what would do) for each thing that harms others but is no reason to refuse the plugin."""
        if self.heavy or self.modules > MANY_MODULES:
            what = ", ".join(self.heavy) or f"{self.modules} modules"
            yield f"it imports {what} while it is loaded", "import them inside the functions that need them"
        if self.printed:
            line = " ".join(self.printed.split())[:60]
            yield f"it prints to stdout while it is loaded ({line!r})", "use logging.getLogger(__name__)"
        if self.threads:
            names = ", ".join(self.threads)
            yield f"it starts threads while it is loaded ({names})", "start them when they are first needed"


class _Noise:
    """Stands for stdout: keeps and passes to stderr what one thread writes, and leaves every other thread alone."""

    def __init__(self, stdout: Any) -> None:
        self.stdout, self.thread, self.kept = stdout, threading.get_ident(), [""]

    def write(self, text: str) -> int:
        # whoever kept hold of it writes to the real one once the watch is over
        if threading.get_ident() != self.thread or sys.stdout is not self:
            self.stdout.write(text)
        else:
            self.kept.append(text)
            sys.stderr.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def close(self) -> None:
        """Nothing: the real one is not theirs to close."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stdout, name)


@contextmanager
def watch() -> Iterator[Traces]:
    """Traces of the block, complete once it is over, whether or not it raised."""
    traces = Traces()
    stdout, noise = sys.stdout, _Noise(sys.stdout)
    modules, threads = set(sys.modules), set(threading.enumerate())
    globals_before, settings_before = snapshot(), _settings()
    started = time.perf_counter()
    sys.stdout = noise
    try:
        yield traces
    finally:
        traces.seconds = time.perf_counter() - started
        # a plugin may have put a stdout of its own there
        sys.stdout = stdout
        traces.printed = "".join(noise.kept)
        new = sys.modules.keys() - modules
        traces.modules, traces.heavy = len(new), tuple(name for name in HEAVY if name in new)
        traces.threads = tuple(one.name for one in threading.enumerate() if one not in threads and one.is_alive())
        settings = _reset(settings_before)
        traces.patched = (*put_back(globals_before), *settings)


# --- globals ----------------------------------------------------------------------------------------------------------

Globals = list[tuple[str, Any, Mapping[str, Any]]]
"""(name, owner, its attributes) of modules and classes."""


def snapshot() -> Globals:
    """The globals that are watched, as they are."""
    found: Globals = []
    for name, classes in _WATCHED:
        module = sys.modules.get(name)
        if module is None:
            continue
        found.append((name, module, _own(module)))
        owners = ((f"{name}.{cls}", getattr(module, cls, None)) for cls in classes)
        found.extend((label, owner, _own(owner)) for label, owner in owners if owner is not None)
    return found


def everything(packages: tuple[str, ...]) -> Globals:
    """Every module of the packages that is imported, with every class that it defines."""
    found: Globals = []
    for name, module in list(sys.modules.items()):
        if not _is_a(module, ModuleType) or name.partition(".")[0] not in packages:
            continue
        found.append((name, module, _own(module)))
        classes = [one for one in vars(module).values() if _is_a(one, type) and one.__module__ == name]
        found.extend((f"{name}.{cls.__qualname__}", cls, _own(cls)) for cls in classes)
    return found


def _own(owner: Any) -> dict[str, Any]:
    """What the module or class computes with: functions, classes and descriptors; counters and caches may change."""
    return {
        name: value
        for name, value in vars(owner).items()
        # a builtin `_` is the prompt's
        if (callable(value) or _is_a(value, property | staticmethod | classmethod))
        and (not name.startswith("__") or name in ("__init__", "__call__"))
        and name != "_"
    }


def _is_a(value: Any, cls: type | UnionType) -> bool:
    # isinstance would read `__class__`, which deprecated names of torch answer with a warning
    return issubclass(type(value), cls)


def put_back(before: Globals) -> tuple[str, ...]:
    """Undo what was replaced or deleted since, and name it."""
    names = []
    for label, owner, attributes in before:
        now = vars(owner)
        for name, value in attributes.items():
            if (found := now.get(name, before)) is not value and not _is_its_own(label, name, found):
                names.append(f"{label}.{name}")
                # a class of C code takes nothing back, and nothing could have been set on it
                with suppress(AttributeError, TypeError):
                    setattr(owner, name, value)
    return tuple(names)


def _is_its_own(label: str, name: str, found: Any) -> bool:
    """Whether a package wrapped a function of its own: importing torch._dynamo does that to torch.manual_seed."""
    package = str(getattr(found, "__module__", "")).partition(".")[0]
    return package == label.partition(".")[0] and getattr(found, "__name__", "") == name


# --- settings ---------------------------------------------------------------------------------------------------------


def _settings() -> list[tuple[str, Any, Callable[[Any], object]]]:
    """(name, value, what sets it) of the process-wide settings that change what a model computes or prints."""
    found: list[tuple[str, Any, Callable[[Any], object]]] = [
        ("sys.excepthook", sys.excepthook, lambda value: setattr(sys, "excepthook", value)),
        ("warnings.showwarning", warnings.showwarning, lambda value: setattr(warnings, "showwarning", value)),
    ]
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "set_num_threads"):
        found += [
            ("torch's default dtype", torch.get_default_dtype(), torch.set_default_dtype),
            ("torch's grad mode", torch.is_grad_enabled(), torch.set_grad_enabled),
            ("torch's number of threads", torch.get_num_threads(), torch.set_num_threads),
        ]
    return found


def _reset(before: list[tuple[str, Any, Callable[[Any], object]]]) -> tuple[str, ...]:
    now = {name: value for name, value, _ in _settings()}
    changed = [(name, value, put) for name, value, put in before if now[name] != value]
    for _, value, put in changed:
        put(value)
    return tuple(name for name, _, _ in changed)
