"""Runs the whole demonstration with one command, ``python -m proj``; Ctrl-C ends all of it.

The command starts a PostgreSQL server of its own (or uses ``DATABASE_URL``), migrates, loads the
menu, makes the user ``chef`` and serves the site with uvicorn. ``python -m proj manage <command>``
runs one of Django's management commands against the same database. With ``GREEN=1`` in the
environment, sync views are served on the event loop, too (proj/asgi_green.py).
"""

import os
import secrets
import signal
import socket
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from pgbackend import embedded

HOST = "127.0.0.1"
CHEF = "chef"
DATA = Path(__file__).resolve().parent.parent / ".pgbackend" / "demo"
PAGES = {"Order": "/", "Board": "/board/", "Status": "/status/", "Admin": "/admin/"}


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
    sock = _listen(os.environ.get("PORT", "8000"))
    _raise_open_files()
    # Only this machine can reach the demonstration, so anyone who can may start a rush.
    os.environ.setdefault("KITCHEN_RUSH_OPEN", "1")
    with sock, _database():
        password = _prepare()
        _welcome(sock.getsockname()[1], password)
        try:
            _serve(sock)
        finally:
            _close_connections()
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


def _listen(port):
    """Take the server's socket before anything else is started: a taken port then costs nothing."""
    sock = socket.socket()
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((HOST, int(port)))
        sock.listen(2048)
    except (OSError, ValueError, OverflowError) as error:
        sock.close()
        reason = getattr(error, "strerror", None) or "that is no port"
        sys.exit(f"proj: cannot listen on {HOST}:{port} ({reason}): set PORT to another port")
    return sock


def _raise_open_files():
    """Raise the limit of open files: a rush of 500 needs 2,000, many systems allow 1,024."""
    try:
        import resource
    except ImportError:  # Windows, where sockets are not counted this way
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _prepare():
    """Bring the database up to date; return the chef's password if it was made up here."""
    import django
    from django.core.management import call_command

    django.setup()
    _check_database()
    call_command("migrate", verbosity=0)
    call_command("seed_menu", verbosity=0)
    given = os.environ.get("KITCHEN_PASSWORD")
    password = given or secrets.token_urlsafe(9)
    _make_chef(password)
    _close_connections()
    return None if given else password


def _check_database():
    """Exit with the server's own words if it lets nobody in; a pool would try for half a minute."""
    from django.db import connection

    try:
        connection.Database.connect(**connection.get_connection_params()).close()
    except connection.Database.OperationalError as error:
        sys.exit(f"proj: the database cannot be used: {error}")


def _make_chef(password):
    from django.contrib.auth import get_user_model

    chef, _ = get_user_model().objects.get_or_create(username=CHEF)
    chef.is_staff = chef.is_superuser = True
    chef.set_password(password)
    chef.save()


def _close_connections():
    """Close the connections of synchronous code; the site's own go with its event loop."""
    from django.db import connections

    for connection in connections.all(initialized_only=True):
        connection.close()
        connection.close_pool()


def _welcome(port, password):
    width = max(map(len, PAGES))
    print("\nQuince is open. Ctrl-C closes it.\n")
    for name, path in PAGES.items():
        print(f"  {name:<{width}}  http://{HOST}:{port}{path}")
    print(f"\n  Sign in as {CHEF!r}, password {password or 'as in KITCHEN_PASSWORD'}\n", flush=True)


def _serve(sock):
    import uvicorn

    from kitchen import sse

    class Server(uvicorn.Server):
        async def shutdown(self, sockets=None):
            # uvicorn waits for open responses, and a live page's stream would never end by itself.
            sse.end_all()
            await super().shutdown(sockets)

    config = uvicorn.Config(
        "proj.asgi_green:application"
        if os.environ.get("GREEN") == "1"
        else "proj.asgi:application",
        log_level="warning",
        lifespan="on",
        # Only an order that waits for the kitchen service can still be running then.
        timeout_graceful_shutdown=3,
    )
    Server(config).run(sockets=[sock])


if __name__ == "__main__":
    main(sys.argv[1:])
