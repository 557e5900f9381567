"""The same, with daphne's `runserver` in the place of Django's."""

from tests.contract.servers.settings import *  # noqa: F403
from tests.contract.servers.settings import INSTALLED_APPS

INSTALLED_APPS = ["daphne", *INSTALLED_APPS]
