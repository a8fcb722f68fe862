"""Modules whose weights the layer around them writes to `state_dict` and reads from it, under the stock names."""

from __future__ import annotations

from typing import Any

from torch import nn


class Unlisted(nn.Module):
    """Adds nothing to a `state_dict`."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: the layer around it writes the stock names."""

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing: the layer around it reads the stock names."""


class Formed(Unlisted):
    """Holds its weight in a form that its device and dtype choose."""

    def unpack_(self) -> None:
        """Hold the weight in its plain form."""
        raise NotImplementedError

    def choose_form_(self) -> None:
        """Hold the weight in the form that is the fastest where it is."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves and casts; the form is chosen anew for the new device and dtype."""
        self.unpack_()
        super()._apply(fn, recurse)
        self.choose_form_()
        return self
