"""The policy in a file of python source that is no part of an installed plugin."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

from dsi.errors import ConfigError
from dsi.policy import Policy


def load_file(path: Path) -> Policy:
    """The one policy in a file; the file is run.

    Raises:
        ConfigError: there is no such file, it cannot be run, or it holds no policy or several.
    """
    spec = importlib.util.spec_from_file_location(f"dsi_policy_file_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError([f"{path} is no python file"])
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    try:
        spec.loader.exec_module(module)
    # it is the author's code that runs here
    except Exception as error:
        raise ConfigError([f"{path} cannot be run: {type(error).__name__}: {error}"]) from error
    finally:
        del sys.modules[module.__name__]
    found = list({id(one): one for one in vars(module).values() if isinstance(one, Policy)}.values())
    if len(found) != 1:
        raise ConfigError([f"{path} holds {len(found)} policies; one is wanted"])
    return found[0]


def load_source(source: str) -> Policy:
    """The one policy in the text of such a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "draft.py"
        path.write_text(source, encoding="utf-8")
        return load_file(path)
