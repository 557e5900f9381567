"""The packages that a report names where they are installed: those of docs/packages.md, servers."""

from __future__ import annotations

from collections.abc import Iterator

from .versions import installed

PACKAGES = (
    "celery",
    "channels",
    "daphne",
    "django-auditlog",
    "django-cachalot",
    "django-crum",
    "django-debug-toolbar",
    "django-easy-audit",
    "django-environ",
    "django-lifecycle",
    "django-modeltranslation",
    "django-multitenant",
    "django-pgactivity",
    "django-pgbulk",
    "django-pghistory",
    "django-pglock",
    "django-pgschemas",
    "django-pgtransaction",
    "django-pgtrigger",
    "django-pgware",
    "django-postgres-copy",
    "django-reversion",
    "django-rls",
    "django-silk",
    "django-simple-history",
    "django-stubs",
    "django-tasks",
    "django-tasks-db",
    "django-tenants",
    "djangorestframework",
    "granian",
    "gunicorn",
    "hypercorn",
    "opentelemetry-instrumentation-psycopg",
    "procrastinate",
    "prometheus-client",
    "pytest-asyncio",
    "pytest-django",
    "sentry-sdk",
    "uvicorn",
    "wagtail",
    "wrapt",
)


def found() -> Iterator[tuple[str, str]]:
    """Yield the name and the version of each of `PACKAGES` that is installed."""
    for name in PACKAGES:
        if version := installed(name):
            yield name, version
