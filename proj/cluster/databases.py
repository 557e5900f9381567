"""Writes the setting ``DATABASES`` for a cluster: aliases for the primary and for each member."""

from proj.cluster.layout import DATABASE, HOST, USER, Layout

WAYS = ("haproxy", "pgbouncer", "hosts")


def of(home, way, pool_size):
    """Return ``DATABASES`` for a site that reaches the primary in this way (see the settings).

    Each member has an alias for reads besides. An alias must not lead to one standby now and to
    another then: the router knows for each alias how far its server is. The one that is the primary
    at present serves as well as a replica without any lag.
    """
    layout = Layout.read(home)
    databases = {"default": _entry(layout, pool_size, **_WAYS[way](layout))}
    for member in layout.members:
        databases[member.name] = _entry(
            layout,
            pool_size,
            PORT=str(member.port),
            OPTIONS={"replica_of": "default"},
            TEST={"MIRROR": "default"},
        )
    return databases


def _entry(layout, pool_size, OPTIONS=None, **more):  # noqa: N803 - Django's name
    return {
        "ENGINE": "pgbackend",
        "NAME": DATABASE,
        "USER": USER,
        "PASSWORD": layout.passwords[USER],
        "HOST": HOST,
        **more,
        "OPTIONS": {
            "connect_timeout": 2,
            "pool": {"min_size": 1, "max_size": pool_size},
            **(OPTIONS or {}),
        },
    }


def _through_haproxy(layout):
    # A function is asked at each connect: when HAProxy moves, new connections go where it is.
    return {"PORT": lambda: str(Layout.read(layout.home).primary_port)}


def _through_pgbouncer(layout):
    # PgBouncer does not pass notifications on: the board listens at the primary itself.
    hosts = _to_the_hosts(layout)
    listen = {"host": hosts["HOST"], "port": hosts["PORT"], **hosts["OPTIONS"]}
    return {
        "PORT": str(layout.pgbouncer_port),
        "OPTIONS": {"pooler": "transaction", "listen": listen},
    }


def _to_the_hosts(layout):
    return {
        "HOST": ",".join(HOST for _ in layout.members),
        "PORT": ",".join(str(member.port) for member in layout.members),
        "OPTIONS": {"target_session_attrs": "read-write"},
    }


_WAYS = {
    "haproxy": _through_haproxy,
    "pgbouncer": _through_pgbouncer,
    "hosts": _to_the_hosts,
}
