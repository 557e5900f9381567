"""The shop's settings with a replica, which tests must never reach: its address is nobody's."""

from shop.settings import *  # noqa: F403
from shop.settings import DATABASES, MIDDLEWARE

OPTIONS = {**DATABASES["default"].get("OPTIONS", {}), "replica_of": "default"}
DATABASES["replica"] = {**DATABASES["default"], "HOST": "203.0.113.1", "OPTIONS": OPTIONS}
DATABASES["replica"].pop("TEST")
DATABASE_ROUTERS = ["pgbackend.routers.ReplicaRouter"]
MIDDLEWARE = ["pgbackend.routers.ReadYourWritesMiddleware", *MIDDLEWARE]
