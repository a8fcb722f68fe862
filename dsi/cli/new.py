"""`dsi new`: a plugin package whose mapping is to be filled in."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from dsi.cli.command import Answer, Command
from dsi.cli.package_template import FILL, Names, Sketch, files
from dsi.discovery import discover
from dsi.errors import ConfigError

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def run(args: argparse.Namespace) -> Answer:
    """Write the package, and say what is left to do."""
    names = _names(args.name)
    folder = Path(args.into) / names.distribution
    # before anything is imported, and again by mkdir
    if folder.exists():
        raise ConfigError([f"NAME: {folder} is there already; dsi new overwrites nothing"])
    sketch = _sketch(args.layer)
    written = files(names, sketch)
    _write(folder, written)
    open_places = sum(text.count(f'"{FILL}') for text in written.values())
    module = folder / names.package / "__init__.py"
    text = "\n".join(
        [
            f"wrote {folder}",
            f"1. fill in the {open_places} places marked {FILL!r} in {module}",
            f"2. pip install -e '{folder}[test]'",
            f"3. pytest {folder}",
        ]
    )
    data = {"folder": str(folder), "files": sorted(written), "policy": f"{names.plugin}:{names.plugin}"}
    return Answer(text=text, data={**data, "open": open_places})


def _names(name: str) -> Names:
    if not _NAME.fullmatch(name) or len(name) > 60:
        raise ConfigError([f"NAME: {name!r} is no name for a package; use small letters, digits and single hyphens"])
    plugin = name.removeprefix("dsi-")
    owner = next((one for one in discover() if one.name == plugin), None)
    if owner is not None:
        raise ConfigError([f"NAME: the plugin {plugin} is that of {owner.distribution} {owner.version}; use another"])
    distribution = f"dsi-{plugin}"
    return Names(plugin=plugin, distribution=distribution, package=distribution.replace("-", "_"))


def _sketch(layer: str | None) -> Sketch:
    if layer is None:
        return Sketch()
    # read when huggingface_hub is imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    from dsi.cli.sketch import sketch_of

    return sketch_of(layer)


def _write(folder: Path, written: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True)
        for path, text in written.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            # x: what somebody else has written meanwhile is theirs
            with (folder / path).open("x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise ConfigError([f"--into: {folder} cannot be written: {error.strerror or error}"]) from error


def _arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="NAME", help="of the plugin, e.g. acme; the package will be dsi-acme")
    command.add_argument("--layer", metavar="MODULE:CLASS", help="the layer class: what it tells is filled in")
    command.add_argument("--into", metavar="FOLDER", default=".", help="where to put the package's folder (here)")


COMMAND = Command(name="new", help="write a plugin package to be filled in", run=run, arguments=_arguments)
