"""What each plugin does to a process that loads it, found out in processes that may die of it.

    probe()  in the host: starts a server, a fresh interpreter with the host's path and environment
    server   forks a child for each plugin, with a time limit: first bare, then with torch and transformers imported
    child    loads one plugin as the registry would, and reports through a pipe, unless the plugin ends it first

Bare, because what a plugin imports by itself can be seen in no other way; with torch, because only what is imported can
be seen to be replaced. Linux and other systems with `fork`.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Any, Literal, NoReturn

import attrs

from dsi.discovery import Source, discover
from dsi.errors import PluginError
from dsi.plugins import load_one, refused
from dsi.watch import Traces, everything, put_back

Verdict = Literal["ok", "warned", "broken", "incompatible", "duplicate", "disabled", "crash", "timeout"]

# what a server needs beside the children: its own start, and torch's import on a busy machine
_START_SECONDS = 300


@attrs.frozen(kw_only=True)
class Probe:
    """What loading one plugin did.

    Args:
        name, distribution, version: as in `dsi.plugins.Record`.
        verdict: "ok"; "warned", loaded and not a good neighbour; the state of its record where it did not load;
            "crash", it ended its process; "timeout", it had not returned in time.
        reason, mend: what was found and what would do.
        seconds, modules: what loading cost, and how many modules it imported, in a process without torch.
        heavy, printed, threads, patched: see `dsi.watch.Traces`; `patched` in a process with torch too.
    """

    name: str
    distribution: str = ""
    version: str = ""
    verdict: Verdict
    reason: str = ""
    mend: str = ""
    seconds: float = 0.0
    modules: int = 0
    heavy: tuple[str, ...] = ()
    printed: str = ""
    threads: tuple[str, ...] = ()
    patched: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Whether nothing is wrong, or the user wants it so."""
        return self.verdict in ("ok", "disabled")


def probe(*, timeout: float = 20.0) -> list[Probe]:
    """A report for every installed plugin, in the order of `discover`; none is loaded in this process.

    Args:
        timeout: seconds that one plugin may take to load.

    Raises:
        PluginError: the server could not be started.
    """
    # the path as it is here, whatever Python would make of it there
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-P", "-m", "dsi.probe", str(timeout)]
    limit = _START_SECONDS + 2 * timeout * len(discover())
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit, stdin=subprocess.DEVNULL)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PluginError(f"plugins cannot be probed: {last}", hint="run python -m dsi.probe 20 to see more")
    return [_read(one) for one in json.loads(done.stdout)]


def _read(data: dict[str, Any]) -> Probe:
    """A probe that came as JSON, which has no tuples."""
    facts: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in data.items()}
    return Probe(**facts)


# --- the server -------------------------------------------------------------------------------------------------------


def serve(timeout: float) -> list[Probe]:
    """A report for every installed plugin; forks, so call it in a process of its own."""
    sources = discover()
    owners: dict[str, Source] = {}
    skipped: dict[int, Probe] = {}
    for number, source in enumerate(sources):
        outcome = refused(source, os.environ, owners)
        owners.setdefault(source.name, source)
        if outcome is not None:
            skipped[number] = _skipped(source, outcome.record.state, outcome.record.reason, outcome.record.mend)
    rest = [number for number in range(len(sources)) if number not in skipped]
    bare = {number: _child(sources[number], timeout) for number in rest}
    for name in ("torch", "transformers.modeling_utils", "transformers.cache_utils"):
        with suppress(ImportError):
            importlib.import_module(name)
    with_torch = {
        number: _child(sources[number], timeout) if found.verdict not in ("crash", "timeout") else found
        for number, found in bare.items()
    }
    return [skipped.get(n) or _both(bare[n], with_torch[n]) for n in range(len(sources))]


def _skipped(source: Source, state: Any, reason: str, mend: str) -> Probe:
    return Probe(
        name=source.name,
        distribution=source.distribution,
        version=source.version,
        verdict=state,
        reason=reason,
        mend=mend,
    )


def _both(bare: Probe, with_torch: Probe) -> Probe:
    """One report of the two: costs as in the bare process, and the worse verdict."""
    worse = bare if not bare.good or with_torch.good else with_torch
    if with_torch.verdict in ("broken", "crash", "timeout") and bare.verdict in ("ok", "warned"):
        worse = with_torch
    costs = {name: getattr(bare, name) for name in ("seconds", "modules", "heavy")}
    patched = tuple(dict.fromkeys((*bare.patched, *with_torch.patched)))
    return attrs.evolve(worse, **costs, patched=patched)


def _child(source: Source, timeout: float) -> Probe:
    """What became of a forked process that loads the plugin."""
    sys.stdout.flush()
    read, write = os.pipe()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.close(read)
            _load_and_exit(source, write, out, err)
        os.close(write)
        report, status, left_behind = _wait(child, read, timeout)
        os.close(read)
        noise = _text(out)
        if status is None:
            reason = f"it had not loaded after {timeout:g} s"
            found = _dead(source, "timeout", reason, _text(err))
        elif report is None:
            found = _dead(source, "crash", f"it ended the process while it was loaded: {_ending(status)}", _text(err))
        else:
            found = _with_orphan(report) if left_behind else report
    return _with_noise(found, noise)


def _wait(child: int, pipe: int, timeout: float) -> tuple[Probe | None, int | None, bool]:
    """The child's report or None, its exit status, None where it had to be killed, and whether it left others."""
    data, status, deadline = b"", None, time.monotonic() + timeout
    while status is None and time.monotonic() < deadline:
        ready, _, _ = select.select([pipe], [], [], 0.01)
        if ready:
            data += os.read(pipe, 1 << 16)
        # not until end of file: a process that the plugin left behind holds the pipe too
        ended, found = os.waitpid(child, os.WNOHANG)
        status = found if ended else None
    while select.select([pipe], [], [], 0)[0] and (more := os.read(pipe, 1 << 16)):
        data += more
    left_behind = False
    # the child's own group: it, and what it left behind
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
        left_behind = True
    if status is None:
        os.waitpid(child, 0)
        return None, None, left_behind
    return _report(data), status, left_behind


def _report(data: bytes) -> Probe | None:
    # the plugin had the pipe in its hands too
    with suppress(ValueError, TypeError):
        return _read(json.loads(data))
    return None


def _ending(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exit code {os.waitstatus_to_exitcode(status)}"


def _dead(source: Source, verdict: Verdict, reason: str, stderr: str) -> Probe:
    last = (stderr.strip().splitlines() or [""])[-1][:200]
    return Probe(
        name=source.name,
        distribution=source.distribution,
        version=source.version,
        verdict=verdict,
        reason=f"{reason} ({last})" if last else reason,
        mend=f"uninstall {source.distribution or source.name}, or set DSI_DISABLE_PLUGINS={source.name}: "
        "it takes every process down that loads plugins",
    )


def _with_noise(found: Probe, noise: str) -> Probe:
    """With what was written to the standard output past Python's `sys.stdout`."""
    if not noise:
        return found
    printed = found.printed + noise
    if found.verdict not in ("ok", "warned"):
        return attrs.evolve(found, printed=printed)
    if found.printed:
        return attrs.evolve(found, printed=printed)
    return attrs.evolve(_warned(found, *next(Traces(printed=printed).complaints())), printed=printed)


def _with_orphan(found: Probe) -> Probe:
    if found.verdict not in ("ok", "warned"):
        return found
    return _warned(found, "it leaves a process running", "start processes when they are first needed, and end them")


def _warned(found: Probe, reason: str, mend: str) -> Probe:
    both = ((found.reason, reason), (found.mend, mend))
    reason, mend = ("; ".join(part for part in pair if part) for pair in both)
    return attrs.evolve(found, verdict="warned", reason=reason, mend=mend)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(1 << 16).decode(errors="replace")


# --- the child --------------------------------------------------------------------------------------------------------


def _load_and_exit(source: Source, pipe: int, out: IO[bytes], err: IO[bytes]) -> NoReturn:
    os.setsid()
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    code = 1
    # whatever comes, the copy of the server that this is goes no further
    try:
        report = _load(source)
        os.write(pipe, json.dumps(attrs.asdict(report)).encode())
        sys.stdout.flush()
        code = 0
    except BaseException as error:  # noqa: BLE001 - the process ends here, and its last line is read
        os.write(2, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(code)


def _load(source: Source) -> Probe:
    packages = tuple({name.partition(".")[0] for name in sys.modules} - {"__main__"})
    before, environ, path = everything(packages), dict(os.environ), list(sys.path)
    outcome = load_one(source)
    patched = [*outcome.traces.patched, *put_back(before), *_outside(environ, path)]
    record, traces = outcome.record, outcome.traces
    verdict: Any = record.state if record.state != "loaded" else "warned" if record.reason else "ok"
    reason, mend = record.reason, record.mend
    if patched and record.state == "loaded":
        verdict = "broken"
        reason = f"it replaced {', '.join(patched[:5])}, which is not its own"
        mend = "change nothing that is not the plugin's own: a container may compute as it likes"
    return Probe(
        name=source.name,
        distribution=source.distribution,
        version=source.version,
        verdict=verdict,
        reason=reason,
        mend=mend,
        seconds=round(traces.seconds, 4),
        modules=traces.modules,
        heavy=traces.heavy,
        printed=traces.printed[:1000],
        threads=traces.threads,
        patched=tuple(patched[:50]),
    )


def _outside(environ: dict[str, str], path: list[str]) -> Iterator[str]:
    """What changed of the environment variables and of the module path."""
    now = dict(os.environ)
    yield from (
        f"os.environ[{name!r}]" for name in sorted(environ.keys() | now.keys()) if environ.get(name) != now.get(name)
    )
    if sys.path != path:
        yield "sys.path"


if __name__ == "__main__":
    sys.stdout.write(json.dumps([attrs.asdict(one) for one in serve(float(sys.argv[1]))]))
