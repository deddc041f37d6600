"""The command line: a command parses, calls the library and prints; nothing else lives here."""

from condense_core.cli.app import main

__all__ = ["main"]
