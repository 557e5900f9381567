"""Configures the tests' project with the views of this folder."""

from tests.settings import *  # noqa: F403
from tests.settings import TEMPLATES

ROOT_URLCONF = "tests.contract.servers.urls"
ASGI_APPLICATION = "tests.contract.servers.asgi.application"
TEMPLATES[0]["DIRS"] = ["tests/contract/servers/templates"]
# Requests may go to several processes, which must share one key.
SECRET_KEY = "of all processes"
