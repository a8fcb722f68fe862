"""Is the plugin cheap and proper to load?"""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys

from dsi.registry import Registry
from dsi.testing.report import Outcome, failed, not_run, passed
from dsi.testing.subject import Subject

_HEAVY = ("torch", "transformers", "diffusers", "triton", "numpy", "jax", "tensorflow")
_NOWHERE = "the policy is a global of no imported module; pass module="
_SECONDS = 60


def light_import(subject: Subject) -> Outcome:
    """Importing the plugin imports nothing heavy: measured in a new interpreter."""
    name = subject.module
    if not name:
        return not_run(_NOWHERE)
    code = (
        f"import sys, importlib; importlib.import_module({name!r}); print(sorted(set({_HEAVY}) & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    if done.returncode:
        return failed(
            f"{name} cannot be imported alone: {done.stderr.strip().splitlines()[-1]}",
            measured=f"exit code {done.returncode}",
            allowed="exit code 0",
            mend="import what the module needs in the module itself",
        )
    lines = done.stdout.splitlines()
    heavy = ast.literal_eval(lines[-1])
    if heavy or len(lines) > 1:
        return failed(
            f"importing {name} imports {', '.join(heavy) or 'nothing heavy'} and prints {len(lines) - 1} lines",
            measured=", ".join(heavy) or f"{len(lines) - 1} lines",
            allowed="nothing",
            mend='name classes by string, "package.module:Class", and import inside functions',
        )
    return passed(f"importing {name} imports nothing heavy")


def hook_signatures(subject: Subject) -> Outcome:
    """The plugin loads, twice with the same result, and registers this policy."""
    name = subject.module
    if not name:
        return not_run(_NOWHERE)
    module = importlib.import_module(name)
    first, second = (Registry.from_plugins({"plugin": module}) for _ in range(2))
    record = first.records[0]
    if record.state != "loaded":
        return failed(
            f"{name} is {record.state}: {record.reason}",
            measured=record.state,
            allowed="loaded",
            mend="hooks are functions (register), marked with @hookimpl, beside DSI_API",
        )
    if not any(policy is subject.policy for policy in first.policies.values()):
        return failed(
            f"{name} registers {', '.join(first.policies) or 'no policy'}, not the policy under test",
            measured="not registered",
            allowed="registered",
            mend="call register(POLICY) in dsi_register_policies",
        )
    if first.digest() != second.digest():
        return failed(
            f"{name} registers something else the second time; every process of a group loads it anew",
            measured="two digests",
            allowed="one",
            mend="register the same objects in each call, whatever ran before",
        )
    return passed(f"{name} loads, and registers the policy")
