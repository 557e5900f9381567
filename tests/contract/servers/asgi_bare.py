"""Serves the tests' project by Django's own application alone, as most projects do."""

import os

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.contract.servers.settings")

# isort: split

from django.core.asgi import get_asgi_application

application = get_asgi_application()
