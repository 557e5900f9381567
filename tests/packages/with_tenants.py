"""Uses django-tenants: the tenant is in attributes of the connection, and in its `search_path`."""

from tests.packages import project as shared
from tests.packages.project import ENGINE, LAST, WHO, another, execute, green, setup

project = setup(
    __name__,
    "django-tenants",
    state="attributes of the connection, `SET search_path` in its `_cursor()`",
    apps=["django_tenants"],
    middleware=["django_tenants.middleware.main.TenantMainMiddleware"],
    engine="django_tenants.postgresql_backend",
    line='`ORIGINAL_BACKEND = "pgbackend"`, as the package asks for any engine below its own',
    ORIGINAL_BACKEND=ENGINE,
    DATABASE_ROUTERS=["django_tenants.routers.TenantSyncRouter"],
    SHARED_APPS=["django_tenants", "django.contrib.contenttypes", "django.contrib.auth"],
    TENANT_APPS=[__name__],
    TENANT_MODEL="with_tenants.Tenant",
    TENANT_DOMAIN_MODEL="with_tenants.Domain",
)

from django.db import connection, models  # noqa: E402
from django_tenants.models import DomainMixin, TenantMixin  # noqa: E402
from django_tenants.utils import schema_context  # noqa: E402


class Tenant(TenantMixin):
    auto_create_schema = False


class Domain(DomainMixin):
    pass


class Note(models.Model):
    owner = models.CharField(max_length=100)


OWNERS = Note.objects.values_list("owner", flat=True).distinct()


def create_rows():
    Note.objects.create(owner="public")
    for who in WHO:
        tenant = Tenant.objects.create(schema_name=who)
        Domain.objects.create(domain=f"{who}.test", tenant=tenant)
        execute(f"CREATE SCHEMA {who}")
        execute(f"CREATE TABLE {who}.with_tenants_note (LIKE with_tenants_note INCLUDING ALL)")


create_tables = shared.create_tables


def said(who, seen):
    schema, tenant = connection.schema_name, connection.tenant.schema_name
    return who if {schema, tenant, *seen} == {who} else f"{schema}, {tenant}, {seen}"


def write_and_read(who):
    Note.objects.create(owner=who)
    return said(who, list(OWNERS.all()))


async def awrite_and_read(who):
    await Note.objects.acreate(owner=who)
    return said(who, [owner async for owner in OWNERS.all()])


def work(request, who, number):
    if number == LAST:
        with schema_context(another(who)):
            assert write_and_read(another(who)) == another(who)
    return write_and_read(who)


async def awork(request, who, number):
    if number == 0:
        return await green(work, request, who, LAST)
    with schema_context(another(who)):
        assert await awrite_and_read(another(who)) == another(who)
    return await awrite_and_read(who)


def wrong_rows():
    found = []
    for who in WHO:
        rows = execute(f"DELETE FROM {who}.with_tenants_note RETURNING owner")
        found += [f"{owner} in {who}" for (owner,) in rows if owner != who]
    rows = execute("DELETE FROM public.with_tenants_note WHERE owner <> 'public' RETURNING owner")
    return found + [f"{owner} in public" for (owner,) in rows]
