"""Configures the generated site: its own settings, as in production, on another database."""

from mysite.settings.base import *  # noqa: F403
from mysite.settings.base import INSTALLED_APPS

from benchmarks.sync_stack.database_settings import (
    LOGGING,  # noqa: F401 - a setting
    databases,
)

DEBUG = False
ALLOWED_HOSTS = ["127.0.0.1"]
SECRET_KEY = "of no use"  # noqa: S105 - the sessions are of a benchmark
# Wagtail's search needs it on PostgreSQL.
INSTALLED_APPS = [*INSTALLED_APPS, "django.contrib.postgres"]
DATABASES = databases()
# The generated production settings ask for `collectstatic`; the pages are the same without.
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
}
WAGTAIL_ENABLE_UPDATE_CHECK = False
