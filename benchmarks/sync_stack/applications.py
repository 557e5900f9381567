"""Serves a project by Django's applications, or as a whole green stack."""

import json
import os

from django.core.wsgi import get_wsgi_application

if json.loads(os.environ["SYNC_STACK"])["whole"]:
    from pgbackend import get_asgi_application
else:
    from django.core.asgi import get_asgi_application

asgi = get_asgi_application()
wsgi = get_wsgi_application()
