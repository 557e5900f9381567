"""Configures the same project with daphne's `runserver` instead of Django's."""

from tests.contract.servers.settings import *  # noqa: F403
from tests.contract.servers.settings import INSTALLED_APPS

INSTALLED_APPS = ["daphne", *INSTALLED_APPS]
