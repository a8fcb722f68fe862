"""The command `dsi`; one module a command.

`command_line` parses and prints. A command is a module with a `COMMAND`, which `command_line` lists; what is heavy it
imports when it runs.
"""

from dsi.cli.command_line import main

__all__ = ["main"]
