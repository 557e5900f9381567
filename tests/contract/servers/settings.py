"""The tests' settings, with the views of this folder."""

from tests.settings import *  # noqa: F403
from tests.settings import TEMPLATES

ROOT_URLCONF = "tests.contract.servers.urls"
ASGI_APPLICATION = "tests.contract.servers.asgi.application"
TEMPLATES[0]["DIRS"] = ["tests/contract/servers/templates"]
# Where requests meet several processes, what one signs another reads.
SECRET_KEY = "of all processes"
