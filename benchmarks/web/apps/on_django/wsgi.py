"""Defines the application that the threads of a WSGI server serve."""

from __future__ import annotations

from django.core.wsgi import get_wsgi_application

application = get_wsgi_application()
