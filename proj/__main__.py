"""Runs the whole demonstration with one command, ``python -m proj``; Ctrl-C ends all of it.

The command starts a PostgreSQL server of its own (or uses ``DATABASE_URL``), migrates, loads the
menu, makes the user ``chef`` and serves the site with uvicorn. ``python -m proj manage <command>``
runs one of Django's management commands against the same database. With ``GREEN=1`` in the
environment, sync views are served on the event loop, too (proj/asgi_green.py).
"""

import os
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from pgbackend import embedded
from proj import serving

DATA = Path(__file__).resolve().parent.parent / ".pgbackend" / "demo"


def main(argv):
    """Run the demonstration, or with ``manage`` one command."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "proj.settings")
    # The default action of SIGTERM would end the process before its ``with`` blocks do.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    if argv and argv[0] != "manage":
        sys.exit(f"proj: unknown argument {argv[0]!r}: it takes none, or 'manage' and a command")
    with suppress(KeyboardInterrupt):
        _manage(argv[1:]) if argv else _demonstrate()


def _manage(argv):
    from django.core.management import execute_from_command_line

    with _database():
        execute_from_command_line(["python -m proj manage", *argv])


def _demonstrate():
    sock = serving.listen(os.environ.get("PORT", "8000"))
    serving.raise_open_files()
    # Only this machine can reach the demonstration, so anyone who can may start a rush.
    os.environ.setdefault("KITCHEN_RUSH_OPEN", "1")
    with sock, _database():
        password = serving.prepare()
        serving.welcome(sock.getsockname()[1], password)
        try:
            serving.serve(sock)
        finally:
            serving.close_connections()
            print("\nThe kitchen is closed.")


@contextmanager
def _database():
    """Provide a server for the block: that of ``DATABASE_URL``, or one that keeps its data here.

    A command and the demonstration may run at the same time: they share the server.
    """
    try:
        server = embedded.server(DATA)
    except (embedded.EmbeddedError, ValueError) as error:
        sys.exit(f"proj: {error}")
    with server:
        os.environ["DATABASE_URL"] = server.url
        yield


if __name__ == "__main__":
    main(sys.argv[1:])
