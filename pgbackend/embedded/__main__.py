"""The command line: ``python -m pgbackend.embedded run [--base DIR] -- COMMAND...``.

It runs a command with ``DATABASE_URL`` set to a server, which ends with the command.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .errors import EmbeddedError
from .handle import server

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def _run(command: Sequence[str], base: Path | None, settings: Mapping[str, str]) -> NoReturn:
    """Become the command.

    Signals and status are its own, and the lock that it inherits holds the server.
    """
    pg = server(base, settings=settings)
    pg.outlive_exec()
    os.execvpe(command[0], list(command), {**os.environ, "DATABASE_URL": pg.url})


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m pgbackend.embedded run [--base DIR] [--set NAME=VALUE] -- COMMAND...``."""
    parser = argparse.ArgumentParser(prog="python -m pgbackend.embedded", description=main.__doc__)
    commands = parser.add_subparsers(dest="action", required=True)
    run = commands.add_parser("run", help="run a command with DATABASE_URL set to a server")
    run.add_argument("--base", type=Path, help="keep the data here (default: a throwaway server)")
    run.add_argument(
        "--set", type=_setting, action="append", default=[], metavar="NAME=VALUE", dest="settings"
    )
    run.usage = "%(prog)s [--base DIR] [--set NAME=VALUE] -- COMMAND..."
    # Divided here: argparse's way with a second '--' differs between Python's versions.
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    given, command = parser.parse_args(words[:end]), words[end + 1 :]
    if not command:
        run.error("no command: write it after '--'")
    try:
        _run(command, given.base, dict(given.settings))
    except (EmbeddedError, ValueError) as exc:
        print(f"{parser.prog}: {exc}", file=sys.stderr)
        return 1
    except OSError as exc:
        print(f"{parser.prog}: {command[0]}: {exc.strerror}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main())
