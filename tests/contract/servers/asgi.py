"""Serves channels' consumers beside the views of the tests' project, as channels documents it."""

import os

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.contract.servers.settings")

from proj.asgi import application as site

# isort: split

from channels.routing import ProtocolTypeRouter, URLRouter
from django.urls import path

from . import consumers


def with_channels(site):
    """Return an application that serves the consumers, and `site` for all other requests."""
    return ProtocolTypeRouter(
        {
            "http": URLRouter(
                [
                    path("consumer/", consumers.Http.as_asgi()),
                    path("<path:_>", site),
                    path("", site),
                ]
            ),
            "lifespan": site,
            "websocket": URLRouter(
                [
                    path("text/", consumers.Text.as_asgi()),
                    path("json/", consumers.Json.as_asgi()),
                    path("sync/", consumers.Sync.as_asgi()),
                ]
            ),
        }
    )


application = with_channels(site)
