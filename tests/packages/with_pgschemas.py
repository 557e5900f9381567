"""Uses django-pgschemas: the tenant is in a context variable, and in the `search_path`."""

from tests.packages import project as shared
from tests.packages.project import ENGINE, LAST, WHO, another, execute, setup

project = setup(
    __name__,
    "django-pgschemas",
    state="`ContextVar`, an attribute of the connection, `SET search_path` in its `_cursor()`",
    apps=["django_pgschemas"],
    middleware=["django_pgschemas.routing.middleware.HeadersRoutingMiddleware"],
    engine="django_pgschemas.postgresql",
    line='`PGSCHEMAS_ORIGINAL_BACKEND = "pgbackend"`, as for any engine below the package\'s own',
    PGSCHEMAS_ORIGINAL_BACKEND=ENGINE,
    PGSCHEMAS_LIMIT_SET_CALLS=True,
    PGSCHEMAS_TENANT_HEADER="who",
    DATABASE_ROUTERS=["django_pgschemas.routers.TenantAppsRouter"],
    TENANTS={
        "public": {"APPS": ["django.contrib.auth", "django.contrib.contenttypes"]},
        "default": {
            "TENANT_MODEL": "with_pgschemas.Tenant",
            "APPS": [],
            "URLCONF": "tests.packages.run",
        },
    },
)

from django.db import connection, models, transaction  # noqa: E402
from django_pgschemas.models import TenantModel  # noqa: E402
from django_pgschemas.schema import Schema, get_current_schema  # noqa: E402


class Tenant(TenantModel):
    auto_create_schema = False


class Note(models.Model):
    owner = models.CharField(max_length=100)


OWNERS = Note.objects.values_list("owner", flat=True).distinct()


create_tables = shared.create_tables


def create_rows():
    Note.objects.create(owner="public")
    for who in WHO:
        Tenant.objects.create(schema_name=who)
        execute(f"CREATE SCHEMA {who}")
        execute(f"CREATE TABLE {who}.with_pgschemas_note (LIKE with_pgschemas_note INCLUDING ALL)")


def said(who, seen):
    schema = get_current_schema().schema_name
    return who if {schema, *seen} == {who} else f"{schema}, {seen}"


def write_and_read(who):
    with transaction.atomic():
        Note.objects.create(owner=who)
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_schema()")
        assert cursor.fetchone() == (who,)
    return said(who, list(OWNERS.all()))


async def awrite_and_read(who):
    await Note.objects.acreate(owner=who)
    return said(who, [owner async for owner in OWNERS.all()])


def work(request, who, number):
    if number == LAST:
        with Schema.create(another(who)):
            assert write_and_read(another(who)) == another(who)
    return write_and_read(who)


async def awork(request, who, number):
    with Schema.create(another(who)):
        assert await awrite_and_read(another(who)) == another(who)
    return await awrite_and_read(who)


def wrong_rows():
    found = []
    for who in WHO:
        rows = execute(f"DELETE FROM {who}.with_pgschemas_note RETURNING owner")
        found += [f"{owner} in {who}" for (owner,) in rows if owner != who]
    rows = execute("DELETE FROM public.with_pgschemas_note WHERE owner <> 'public' RETURNING owner")
    return found + [f"{owner} in public" for (owner,) in rows]
