"""Prepares the database of the order desk, and serves it with uvicorn until a signal ends it.

``python -m proj`` does so on one server, ``python -m proj.cluster`` on a cluster.
"""

import asyncio
import os
import secrets
import socket
import sys

HOST = "127.0.0.1"
CHEF = "chef"
PAGES = {
    "Order": "/",
    "Board": "/board/",
    "Status": "/status/",
    "Admin": "/admin/",
    "Connections": "/admin/pgbackend/connections/",
    "Health": "/health/ready/",
}


def listen(port):
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


def raise_open_files():
    """Raise the limit of open files: a rush of 500 needs 2,000, many systems allow 1,024."""
    try:
        import resource
    except ImportError:  # Windows, where sockets are not counted this way
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def prepare():
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
    close_connections()
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


def close_connections():
    """Close the connections of synchronous code; the site's own go with its event loop."""
    from django.db import connections

    for connection in connections.all(initialized_only=True):
        connection.close()
        connection.close_pool()


def welcome(port, password, pages=PAGES):
    width = max(map(len, pages))
    print("\nQuince is open. Ctrl-C closes it.\n")
    for name, path in pages.items():
        print(f"  {name:<{width}}  http://{HOST}:{port}{path}")
    print(f"\n  Sign in as {CHEF!r}, password {password or 'as in KITCHEN_PASSWORD'}\n", flush=True)


def serve(sock):
    import uvicorn

    from kitchen import sse

    class Server(uvicorn.Server):
        async def shutdown(self, sockets=None):
            # uvicorn waits for open responses, and a live page's stream would never end by itself.
            sse.end_all()
            await super().shutdown(sockets)
            # A client that does not take the rest of its response keeps its connection open.
            for connection in [*self.server_state.connections]:
                connection.transport.abort()
            await asyncio.sleep(0.01)  # the loop closes them in its next turns

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
