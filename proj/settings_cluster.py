"""Serves the order desk on the cluster of ``proj.cluster``: the settings of one server, and more.

``CLUSTER_HOME`` is the cluster's directory. ``CLUSTER_WAY`` says how the site reaches the primary:

- ``haproxy``, the default: HAProxy leads to it, and the pool is pgbackend's own.
- ``pgbouncer``: through PgBouncer in transaction mode, which goes through HAProxy. The board
  listens beside it (``OPTIONS["listen"]``): that mode does not pass notifications on.
- ``hosts``: all members are named, and libpq looks for the one that can be written to.
"""

from os import environ

from proj.cluster import databases
from proj.settings import *  # noqa: F403
from proj.settings import INSTALLED_APPS, MIDDLEWARE

INSTALLED_APPS = [*INSTALLED_APPS, "proj.cluster"]
# Reads go to the members, and see what their client has written.
MIDDLEWARE = ["pgbackend.routers.ReadYourWritesMiddleware", *MIDDLEWARE]
DATABASE_ROUTERS = ["pgbackend.routers.ReplicaRouter"]
ROOT_URLCONF = "proj.cluster.urls"
CLUSTER_HOME = environ["CLUSTER_HOME"]
DATABASES = databases.of(
    CLUSTER_HOME,
    way=environ.get("CLUSTER_WAY", "haproxy"),
    pool_size=int(environ.get("POOL_SIZE", "4")),
)
