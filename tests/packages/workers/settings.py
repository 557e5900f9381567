"""Provides the settings of the project, for the workers and the code that sends tasks."""

from __future__ import annotations

import os
from importlib.util import find_spec

from tests.packages.project import ENGINE, params

SECRET_KEY = "packages"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {"default": {**params(), "ENGINE": ENGINE}}
INSTALLED_APPS = [
    "django.contrib.contenttypes",
    *([] if find_spec("django.tasks") else ["django_tasks"]),
    "django_tasks_db",
    "procrastinate.contrib.django",
    "tests.packages.workers",
]
TASKS = {"default": {"BACKEND": "django_tasks_db.DatabaseBackend"}}
PROCRASTINATE_IMPORT_PATHS = ["tests.packages.workers.tasks"]

_FOLDER = os.environ.get("PACKAGES_FOLDER", "")
CELERY_BROKER_URL = "filesystem://"
CELERY_BROKER_TRANSPORT_OPTIONS = {
    "data_folder_in": f"{_FOLDER}/queue",
    "data_folder_out": f"{_FOLDER}/queue",
    "control_folder": f"{_FOLDER}/control",
    "polling_interval": 0.05,
}
CELERY_RESULT_BACKEND = f"file://{_FOLDER}/results"
CELERY_IMPORTS = ["tests.packages.workers.tasks"]
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
