"""Distributions without pip: a `*.dist-info` with its entry points, and modules, in a folder for sys.path."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from dsi.registry import Registry


def put_distribution(
    site: Path,
    distribution: str,
    modules: Mapping[str, str],
    points: Mapping[str, str] | Iterable[tuple[str, str]] | None = None,
    version: str = "1.0",
) -> Path:
    """Install a distribution into `site`, as an installer would have left it.

    Args:
        site: a folder; made where it is missing.
        distribution, version: its metadata.
        modules: name -> source, dedented here.
        points: entry points of the group "dsi", name -> target; one for each module where left out.

    Returns:
        `site`.
    """
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    pairs = [(name, name) for name in modules] if points is None else points
    pairs = pairs.items() if isinstance(pairs, Mapping) else pairs
    (info / "entry_points.txt").write_text("\n".join(["[dsi]", *(f"{name} = {target}" for name, target in pairs), ""]))
    for name, source in modules.items():
        (site / f"{name}.py").write_text(textwrap.dedent(source))
    return site


def forget_modules(folder: Path, before: set[str]) -> None:
    """Take out of sys.modules what has come from `folder` since `before`."""
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@contextmanager
def on_path(site: Path) -> Iterator[None]:
    """What is installed in `site` is found, beside dsi's own plugins and no others; nothing of it remains."""
    before = set(sys.modules)
    others = {one.name for one in Registry.load({}).records if one.distribution != "dsi"}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.setenv("DSI_DISABLE_PLUGINS", ",".join(sorted(others)))
        yield
    forget_modules(site, before)


def run_dsi(*argv: str, site: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The finished process of `dsi ...`, which finds what is installed in `site`."""
    return subprocess.run(
        [sys.executable, "-c", "import sys; from dsi.cli import main; sys.exit(main(sys.argv[1:]))", *argv],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *filter(None, sys.path)]), **env},
        capture_output=True,
        text=True,
        timeout=240,
    )
