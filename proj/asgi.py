"""Serves the site from an ASGI server.

Static files are served by Django's own handler, with ``DEBUG`` off too: a demonstration needs no
second server and no further package. A site with traffic runs ``collectstatic`` and lets the web
server in front serve them; then no request for a static file arrives here.

``proj.asgi_green`` serves the same site with its sync views on the event loop.
"""

from os import environ

from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler
from django.core.asgi import get_asgi_application

environ.setdefault("DJANGO_SETTINGS_MODULE", "proj.settings")


class WithLifespan:
    """Answers the server's ``lifespan`` events, which Django does not, and passes on all others."""

    def __init__(self, application, *, on_shutdown):
        self.application = application
        self.on_shutdown = on_shutdown

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await self.application(scope, receive, send)

    async def _live(self, receive, send):
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        try:
            await self.on_shutdown()
        finally:
            await send({"type": "lifespan.shutdown.complete"})


def site(make_application):
    """Return the whole site around the application of Django's that is made by the argument."""
    project = make_application()
    from kitchen import perloop  # apps are loaded by the line above

    return WithLifespan(ASGIStaticFilesHandler(project), on_shutdown=perloop.close)


application = site(get_asgi_application)
