"""Serves the site from a WSGI server. The live pages need ASGI; ordering and the admin work too."""

from os import environ

from django.core.wsgi import get_wsgi_application

environ.setdefault("DJANGO_SETTINGS_MODULE", "proj.settings")

application = get_wsgi_application()
