"""The command line's entry: finds the command, runs it, and turns errors into messages and exit statuses.

What a user got wrong is reported as "error: ..." on standard error with exit status 2, without a traceback.
"""

from __future__ import annotations

import difflib
import errno
import importlib.metadata
import os
import sys
from collections.abc import Sequence

from lead_engine.base.console import is_main
from lead_engine.base.errors import UserError
from lead_engine.cli.commands import COMMANDS

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Under torchrun only rank 0 prints messages."""
    speaks = is_main()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments, speaks)
    except UserError as error:
        return _fail(str(error), speaks)
    except KeyboardInterrupt:
        _fail("interrupted", speaks, label="")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output left (`| head`). Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_USER_ERROR
    except OSError as error:
        # One without a file name is our bug, and keeps its traceback, unless a disk is full.
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _fail(f"{error.filename or 'writing the output'}: {error.strerror}", speaks)


def _dispatch(arguments: list[str], speaks: bool) -> int:
    if not arguments:
        return _fail("no command given\n\n" + _overview(), speaks)
    for argument in arguments:
        if not argument.isprintable() and argument != argument.encode(errors="replace").decode():
            raise UserError(f"{argument!r}: not UTF-8 text; give names in UTF-8")
    name, rest = arguments[0], arguments[1:]
    if name in ("-h", "--help"):
        _say(_overview(), speaks)
    elif name == "--version":
        _say(f"lead-engine {importlib.metadata.version('lead-engine')}", speaks)
    elif name in COMMANDS:
        COMMANDS[name](f"lead-engine {name}", rest, speaks)
    else:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"commands are {', '.join(COMMANDS)}"
        raise UserError(f"{name}: no such command; {hint}")
    return 0


def _say(text: str, speaks: bool) -> None:
    if speaks:
        print(text, flush=True)


def _fail(message: str, speaks: bool, label: str = "error: ") -> int:
    # A rank that fails alone would otherwise end the run without a word.
    place = "" if speaks else f"[rank {os.environ['RANK']}] "
    sys.stdout.flush()
    print(f"{place}{label}{message}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    closing = "lead-engine COMMAND --help lists its options."
    return "\n".join(["usage: lead-engine COMMAND [OPTIONS]", "", "commands:", *lines, "", closing])
