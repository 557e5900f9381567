"""Serves the site as a whole green stack: sync views, too, run on the event loop, with no thread.

``GREEN=1 make demo`` serves it, and so does ``uvicorn proj.asgi_green:application``. The sync views
of this site are the admin, the sign-in and ``kitchen.views.takings``.
"""

from pgbackend import get_asgi_application
from proj.asgi import site

application = site(get_asgi_application)
