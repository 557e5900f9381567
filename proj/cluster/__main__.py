"""Serves the order desk on a cluster, ``python -m proj.cluster``; Ctrl-C ends all of it.

With an argument it steers the cluster that is being served in another shell:

    status               print what runs where
    switchover [MEMBER]  let a standby take the primary's place, in good order
    kill [MEMBER]        kill the primary, or another member, with its Patroni
    start MEMBER         start a member that was killed
    restart-pgbouncer    kill PgBouncer and start it anew
    move-haproxy         start HAProxy anew, at other ports
"""

import asyncio
import os
import signal
import sys
from contextlib import suppress

from pgbackend import routers
from proj import serving
from proj.cluster import rest, steering
from proj.cluster.programs import ClusterError
from proj.cluster.topology import topology

PAGES = {**serving.PAGES, "Cluster": "/cluster/"}


def main(argv):
    """Serve, or carry out a command."""
    commands = {
        "status": _status,
        "switchover": _switch_over,
        "kill": _kill,
        "start": _start,
        "restart-pgbouncer": lambda home: steering.order(home, "restart_pgbouncer"),
        "move-haproxy": lambda home: steering.order(home, "move_haproxy"),
    }
    try:
        if not argv:
            _serve()
        elif argv[0] in commands:
            commands[argv[0]](steering.served().home, *argv[1:])
        else:
            sys.exit(f"proj.cluster: unknown command {argv[0]!r}\n{__doc__}")
    except (ClusterError, KeyError) as error:
        sys.exit(f"proj.cluster: {error.args[0]}")
    except TypeError:
        sys.exit(f"proj.cluster: wrong arguments\n{__doc__}")


def _serve():
    # The default actions of these signals would end the process before its ``with`` blocks do.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    os.environ["DJANGO_SETTINGS_MODULE"] = "proj.settings_cluster"
    # Only this machine can reach the site, so anyone who can may start a rush, or a failover.
    os.environ.setdefault("KITCHEN_RUSH_OPEN", "1")
    first_port = os.environ.get("CLUSTER_PORT")
    sock = serving.listen(os.environ.get("PORT", "8000"))
    serving.raise_open_files()
    print("Starting three members, HAProxy and PgBouncer ...", flush=True)
    running = steering.cluster(int(first_port) if first_port else None)
    with suppress(KeyboardInterrupt), sock, running as layout, steering.noted(layout):
        _serve_on(sock, layout)


def _serve_on(sock, layout):
    os.environ["CLUSTER_HOME"] = layout.home
    password = serving.prepare()
    serving.welcome(sock.getsockname()[1], password, PAGES)
    print(
        "  In another shell: python -m proj.cluster switchover, kill, start, status\n", flush=True
    )
    try:
        serving.serve(sock)
    finally:
        serving.close_connections()
        routers.stop_monitors()  # which would warn that the members vanish
        print("\nThe kitchen is closed.")


def _status(home):
    now = asyncio.run(topology(home))
    for member in now["members"]:
        lag = "" if member["lag"] is None else f", lag {member['lag']} bytes"
        print(f"{member['name']}  port {member['port']}  {member['role']}, {member['state']}{lag}")
    for server in now["haproxy"]["sees"]:
        up = "up" if server["up"] else "down"
        print(
            f"haproxy  {server['leads_to']}: {server['server']} {up}, {server['sessions']} sessions"
        )
    for pool in now["pgbouncer"]["pools"]:
        print("pgbouncer ", ", ".join(f"{name} {value}" for name, value in pool.items()))


def _switch_over(home, candidate=None):
    print(rest.switch_over(steering.served(), candidate))


def _kill(home, name=None):
    name = name or rest.leader(steering.served()).name
    steering.order(home, "kill", name=name)
    print(f"Member {name!r} is killed; start it again with: python -m proj.cluster start {name}")


def _start(home, name):
    steering.order(home, "start", name=name)


if __name__ == "__main__":
    main(sys.argv[1:])
