"""Configures the same project with a second alias on SQLite."""

import os

from tests.contract.servers.settings import *  # noqa: F403
from tests.contract.servers.settings import DATABASES

DATABASES["other"] = {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ["OTHER"]}
MIDDLEWARE = []
ROOT_URLCONF = "__main__"
