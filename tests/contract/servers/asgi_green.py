"""Serves channels' consumers beside the whole green stack."""

from tests.contract.servers.asgi import with_channels

# isort: split

from proj.asgi_green import application as site

application = with_channels(site)
