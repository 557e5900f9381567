"""Provides the projects' settings, a database of each project's own, users and middleware."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

import django
import psycopg
from asgiref.sync import iscoroutinefunction, sync_to_async
from django.apps import apps as registry
from django.conf import settings

#: The engine under test: pgbackend, or Django's own.
ENGINE = os.environ.get("PACKAGES_ENGINE", "pgbackend")
STOCK = ENGINE == "django.db.backends.postgresql"
#: The users who send requests; each name is a tenant's as well.
WHO = ["ann", "bob", "eve"]
#: The number of the last work of a view, when its tasks are done.
LAST = 3

_LOG_IN = f"{__name__}.log_in"
_LOOK = f"{__name__}.look"


@dataclass
class Project:
    """Describes a project that uses one package."""

    module: ModuleType
    package: str
    """The name of its distribution."""
    state: str
    """Where the package keeps its state, in words."""
    middleware: list[str]
    line: str
    """What a project must write because of pgbackend, in words."""

    def told(self) -> dict[str, str]:
        """Return the project's row of the table in docs/packages.md."""
        version = metadata.version(self.package)
        told = {"package": self.package, "version": version, "state": self.state}
        return {**told, "line": self.line}

    def middleware_among(self, kind: str) -> list[str]:
        """Return the package's middleware between two of the project's, sync or async by `kind`."""
        return [f"{_LOG_IN}_{kind}", *self.middleware, f"{_LOOK}_{kind}"]


def setup(
    module: str,
    package: str,
    *,
    state: str,
    apps: Iterable[str] = (),
    middleware: Iterable[str] = (),
    engine: str = ENGINE,
    line: str = "",
    database: Mapping[str, Any] | None = None,
    **more: Any,
) -> Project:
    """Configure Django for the project in `module`; its models come after this call."""
    configure([*apps, module], engine=engine, database=database, **more)
    app = sys.modules[module]
    # This one module is the app, and the module of its models.
    registry.get_containing_app_config(module).models_module = app
    sys.modules[f"{module}.models"] = app
    return Project(app, package, state, [*middleware], line)


def configure(
    apps: Iterable[str],
    *,
    engine: str = ENGINE,
    database: Mapping[str, Any] | None = None,
    **more: Any,
) -> None:
    """Configure Django with `apps`, for the engine and the database of this process."""
    contrib = ["django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions"]
    default = {**params(), "ENGINE": engine, **(database or {})}
    defaults = {
        "ALLOWED_HOSTS": ["*"],
        "DATABASES": {"default": default},
        "DEBUG_PROPAGATE_EXCEPTIONS": True,
        "DEFAULT_AUTO_FIELD": "django.db.models.BigAutoField",
        "INSTALLED_APPS": [*contrib, *apps],
        "LOGGING_CONFIG": None,
        "PASSWORD_HASHERS": ["django.contrib.auth.hashers.MD5PasswordHasher"],
        "ROOT_URLCONF": "tests.packages.run",
        "SECRET_KEY": "packages",
        "USE_TZ": True,
    }
    settings.configure(**{**defaults, **more})
    django.setup()


def params() -> dict[str, Any]:
    given = psycopg.conninfo.conninfo_to_dict(os.environ["DATABASE_URL"])
    names = {"host": "HOST", "port": "PORT", "user": "USER", "password": "PASSWORD"}
    return {
        **{names[key]: value for key, value in given.items() if key in names},
        "NAME": os.environ["PACKAGES_DATABASE"],
    }


@contextmanager
def database():
    """Make the database, and drop it afterwards."""
    name = os.environ["PACKAGES_DATABASE"]
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as session:
        session.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        session.execute(f'CREATE DATABASE "{name}"')
        try:
            yield
        finally:
            session.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


def execute(sql: str, *params: Any) -> list[Any]:
    """Run SQL in a session that Django does not know; return the rows."""
    url = psycopg.conninfo.make_conninfo(
        os.environ["DATABASE_URL"], dbname=os.environ["PACKAGES_DATABASE"]
    )
    with psycopg.connect(url, autocommit=True) as session:
        cursor = session.execute(sql, params or None)
        return cursor.fetchall() if cursor.description else []


def create_tables() -> None:
    """Make the tables of all models, without the migrations, which take longer."""
    from django.db import connection

    with connection.schema_editor() as editor:
        for model in registry.get_models(include_auto_created=True):
            if model._meta.managed and not model._meta.proxy and not model._meta.auto_created:
                editor.create_model(model)


def create_users() -> None:
    from django.contrib.auth.models import User

    for who in WHO:
        User.objects.create(username=who)


def another(who: str) -> str:
    """Return one of the other users."""
    return WHO[WHO.index(who) - 1]


def rows_of_others(model: Any) -> list[str]:
    """Describe the rows whose `author` is not their `owner`, and delete all rows."""
    found = [(row.owner, row.author) for row in model.objects.all()]
    model.objects.all().delete()
    return [f"a row of {owner} by {author}" for owner, author in found if owner != author]


async def green(function: Callable[..., Any], *args: Any) -> Any:
    """Call sync code from an async view: green, or on stock in the request's thread."""
    if STOCK:
        return await sync_to_async(function)(*args)
    from pgbackend import aio

    return await aio.run(function, *args)


# --- The project's own middleware -----------------------------------------------------------------


def log_in_sync(get_response):
    from django.contrib.auth.models import User

    def middleware(request):
        request.user = User.objects.get(username=request.headers["who"])
        return get_response(request)

    return middleware


def log_in_async(get_response):
    from django.contrib.auth.models import User

    assert iscoroutinefunction(get_response)

    async def middleware(request):
        request.user = await User.objects.aget(username=request.headers["who"])
        return await get_response(request)

    return middleware


log_in_async.sync_capable, log_in_async.async_capable = False, True


def look_sync(get_response):
    """Use the database, in middleware between the package's and the view."""
    from django.contrib.auth.models import User

    def middleware(request):
        assert User.objects.count() == len(WHO)
        return get_response(request)

    return middleware


def look_async(get_response):
    from django.contrib.auth.models import User

    async def middleware(request):
        assert await User.objects.acount() == len(WHO)
        return await get_response(request)

    return middleware


look_async.sync_capable, look_async.async_capable = False, True
