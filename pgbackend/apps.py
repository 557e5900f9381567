"""The app `"pgbackend"` for `INSTALLED_APPS`: it is optional, and brings `manage.py pgbackend`.

`ENGINE` needs no app. With the app, the hooks are installed while Django starts, and the process
answers `manage.py pgbackend status` and `dump` as soon as it serves (operating/control.py).
"""

from __future__ import annotations

from django.apps import AppConfig

from . import conf


class PgbackendConfig(AppConfig):
    name = "pgbackend"
    verbose_name = "PostgreSQL connections"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Install the hooks, and let the process answer the command, if an alias is pgbackend's.

        Without the app, the hooks are installed when something first looks at an alias: a model
        does, for the default alias. If that has another engine, the ASGI handler may be built
        before the hooks.
        """
        if conf.load_own_engines():
            from .operating import control

            control.start_when_serving()
