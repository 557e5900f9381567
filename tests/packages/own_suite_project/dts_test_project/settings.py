"""Configures one run; what differs between runs is in `SUITE_JOB`."""

import json
import os

from pgbackend.embedded import database_settings

_job = json.loads(os.environ["SUITE_JOB"])

ORIGINAL_BACKEND = _job["engine"]
DATABASES = {
    "default": {
        **database_settings(_job["url"]),
        "ENGINE": "django_tenants.postgresql_backend",
        "NAME": _job["databases"]["default"],
    }
}
DATABASE_ROUTERS = ["django_tenants.routers.TenantSyncRouter"]
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
SHARED_APPS = [
    "django_tenants",
    "customers",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
]
TENANT_APPS = ["dts_test_app", "dts_multi_type2"]
INSTALLED_APPS = [*SHARED_APPS, *TENANT_APPS]
TENANT_MODEL = "customers.Client"
TENANT_DOMAIN_MODEL = "customers.Domain"
MIDDLEWARE = ["django_tenants.middleware.main.TenantMainMiddleware"]
ROOT_URLCONF = "dts_test_project.urls"
SECRET_KEY = "own suite"
