"""Writes the configuration files of Patroni, HAProxy and PgBouncer.

docs/cluster.md says which of the values matter, and why they are what they are.
"""

import json
import os
from pathlib import Path

from proj.cluster.layout import DATABASE, HOST, READ_ONLY, USER

#: Settings that Patroni keeps for the whole cluster. 20 s is the shortest `ttl` that it permits: a
#: primary that vanishes is replaced when its lock has not been renewed for so long.
DCS = {
    "ttl": 20,
    "loop_wait": 1,
    "retry_timeout": 5,
    "maximum_lag_on_failover": 1048576,
    # A commit is acknowledged when a standby has it too, and only such a standby is promoted.
    "synchronous_mode": True,
}

PARAMETERS = {
    "max_connections": 60,
    "shared_buffers": "32MB",
    "wal_keep_size": "64MB",
    "wal_log_hints": "on",
    "wal_retrieve_retry_interval": "200ms",
    # The machine is not lost in a demonstration, only processes are.
    "fsync": "off",
    # Else a killed server leaves files in /dev/shm.
    "dynamic_shared_memory_type": "mmap",
    # The sessions of a killed client end soon.
    "client_connection_check_interval": "500ms",
}


def patroni(layout, member, bindir):
    """Return the configuration of one member's Patroni, which reads YAML, and so JSON."""
    others = [other for other in layout.members if other is not member]
    address = f"{HOST}:{member.port}"
    rest = f"{HOST}:{member.rest_port}"
    words = layout.passwords
    # Nobody gets in without a password: other users of this machine reach its ports.
    hba = ["local all all scram-sha-256", f"host all all {HOST}/32 scram-sha-256"]
    hba.append(f"host replication replicator {HOST}/32 scram-sha-256")
    content = {
        "scope": "kitchen",
        "name": member.name,
        "restapi": {
            "listen": rest,
            "connect_address": rest,
            "authentication": {"username": "patroni", "password": words["patroni"]},
        },
        "raft": {
            "data_dir": f"{member.home}/raft",
            "self_addr": f"{HOST}:{member.raft_port}",
            "partner_addrs": [f"{HOST}:{other.raft_port}" for other in others],
            "password": words["patroni"],
        },
        "bootstrap": {
            "dcs": {
                **DCS,
                **layout.dcs,
                "postgresql": {
                    "use_pg_rewind": True,
                    "remove_data_directory_on_rewind_failure": True,
                    "remove_data_directory_on_diverged_timelines": True,
                    "parameters": {**PARAMETERS, **layout.parameters},
                },
            },
            "initdb": [{"encoding": "UTF8"}, {"locale": "C.UTF-8"}, "no-sync"],
        },
        "postgresql": {
            "listen": address,
            "connect_address": address,
            "data_dir": str(member.data),
            "bin_dir": str(bindir),
            "pgpass": f"{member.home}/pgpass",
            "authentication": {
                "superuser": {"username": "postgres", "password": words["postgres"]},
                "replication": {"username": "replicator", "password": words["replicator"]},
            },
            "parameters": {"unix_socket_directories": member.home},
            "pg_hba": hba,
            "basebackup": [{"checkpoint": "fast"}, "no-sync"],
        },
        "watchdog": {"mode": "off"},
    }
    return json.dumps(content, indent=1)


def haproxy(layout):
    """Return HAProxy's configuration: a port that leads to the primary, one to the standbys."""
    return f"""\
global
  maxconn 1000
  stats socket {layout.home}/haproxy/socket mode 600 level user
defaults
  mode tcp
  timeout connect 2s
  timeout client 30m
  timeout server 30m
  timeout check 1s
  # Else a connection to a server that refuses is tried three times more there, once a second, while
  # another one is the primary already. Who connects tries again himself.
  retries 0
  option clitcpka
  option srvtcpka
  # Patroni says over HTTP what each server is. A server that is no longer what it was loses its
  # sessions at once: else they would go on, and write to a server that was demoted.
  default-server inter 500ms fastinter 100ms downinter 200ms fall 2 rise 1
  default-server on-marked-down shutdown-sessions
{_listener(layout, "primary", layout.primary_port, "primary")}
{_listener(layout, "standbys", layout.standby_port, "replica")}
"""


def _listener(layout, name, port, check):
    servers = [
        f"  server {member.name} {HOST}:{member.port} check port {member.rest_port}"
        for member in layout.members
    ]
    head = [f"listen {name}", f"  bind {HOST}:{port}", "  balance leastconn"]
    checks = [f"  option httpchk OPTIONS /{check}", "  http-check expect status 200"]
    return "\n".join([*head, *checks, *servers])


def pgbouncer(layout):
    """Return PgBouncer's configuration: a database that is written to, one that is read."""
    return f"""\
[databases]
{DATABASE} = host={HOST} port={layout.primary_port}
{READ_ONLY} = host={HOST} port={layout.standby_port} dbname={DATABASE}
[pgbouncer]
listen_addr = {HOST}
listen_port = {layout.pgbouncer_port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {layout.home}/pgbouncer/users
admin_users = {USER}
pool_mode = transaction
default_pool_size = 10
max_client_conn = 500
# While no primary can be reached, a server is tried five times a second (by default each 15 s), and
# a client waits for 30 s (by default 120 s).
server_login_retry = 0.2
server_connect_timeout = 3
query_wait_timeout = 30
client_tls_sslmode = disable
server_tls_sslmode = disable
ignore_startup_parameters = extra_float_digits
"""


def pgbouncer_users(layout):
    """Return PgBouncer's list of users, whom it lets in and as whom it logs in."""
    return "".join(f'"{name}" "{layout.passwords[name]}"\n' for name in (USER, "postgres"))


def write_private(path, text, account):
    """Write a file that only the account may read."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    if account is not None:
        os.chown(part, account.uid, account.gid)
    part.rename(path)
