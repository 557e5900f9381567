"""Serves the project by Django's application, or as a whole green stack."""

import json
import os

if json.loads(os.environ["SYNC_STACK"])["whole"]:
    from pgbackend import get_asgi_application
else:
    from django.core.asgi import get_asgi_application

application = get_asgi_application()
