"""The command line."""

from lead_engine.cli.command_line import main

__all__ = ["main"]
