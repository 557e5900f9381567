"""Configures all Django stacks; the harness passes what differs between them by the environment.

There is no middleware: the cost of Django's own is the same in all stacks, and would hide what is
compared.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.web.apps import given

_STACK = given.stack()
_DATABASE = given.database()

DEBUG = False
ALLOWED_HOSTS = ["127.0.0.1"]
SECRET_KEY = "of no use"  # noqa: S105 - nothing is signed
ROOT_URLCONF = "benchmarks.web.apps.on_django.urls"
MIDDLEWARE: list[str] = []
INSTALLED_APPS = ["benchmarks.web.apps.on_django", *_STACK.get("apps", ())]
USE_TZ = True
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [Path(__file__).parents[1] / "templates"],
    }
]
DATABASES = {
    "default": {
        **_DATABASE,
        "ENGINE": _STACK["engine"],
        "CONN_MAX_AGE": _STACK.get("max_age", 0),
        "OPTIONS": {
            **_DATABASE.get("OPTIONS", {}),
            "application_name": given.application_name(),
            **({"pool": _STACK["pool"]} if "pool" in _STACK else {}),
        },
    }
}
# The log tells why a server answered with 500.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler", "level": "ERROR"}},
    "loggers": {"django": {"handlers": ["console"], "propagate": False}},
}
