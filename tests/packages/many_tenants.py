"""Serves 2,000 requests of 50 tenants at once: ``python -m tests.packages.run many_tenants``.

The package is django-tenants, with its middleware (sync) for one half of the requests and an async
one of the project's for the other. Each request reads and writes in gathered tasks, in a TaskGroup
and in a transaction; a fifth of the requests is cancelled, each at a place that the seed draws. The
output is a JSON object of the observations.
"""

import asyncio
import collections
import json
import logging
import os
import random
import time

from tests.packages import project as shared
from tests.packages.project import ENGINE, database, execute, setup

TENANTS = [f"tenant{number}" for number in range(50)]
REQUESTS = 2000
POOL = 5

project = setup(
    __name__,
    "django-tenants",
    state="",
    apps=["django_tenants"],
    engine="django_tenants.postgresql_backend",
    database={"OPTIONS": {"pool": {"min_size": 0, "max_size": POOL, "timeout": 120}}},
    ROOT_URLCONF=__name__,
    ORIGINAL_BACKEND=ENGINE,
    DATABASE_ROUTERS=["django_tenants.routers.TenantSyncRouter"],
    SHARED_APPS=["django_tenants", "django.contrib.contenttypes", "django.contrib.auth"],
    TENANT_APPS=[__name__],
    TENANT_LIMIT_SET_CALLS=bool(os.environ.get("TENANT_LIMIT_SET_CALLS")),
    TENANT_MODEL="many_tenants.Tenant",
    TENANT_DOMAIN_MODEL="many_tenants.Domain",
)

from asgiref.sync import sync_to_async  # noqa: E402
from django.core.handlers.asgi import ASGIHandler  # noqa: E402
from django.db import connection, models, transaction  # noqa: E402
from django.http import HttpResponse  # noqa: E402
from django.test import override_settings  # noqa: E402
from django.urls import path  # noqa: E402
from django_tenants.models import DomainMixin, TenantMixin  # noqa: E402

import pgbackend  # noqa: E402
from tests.packages import run  # noqa: E402


class Tenant(TenantMixin):
    auto_create_schema = False


class Domain(DomainMixin):
    pass


class Note(models.Model):
    owner = models.CharField(max_length=100)
    request = models.IntegerField()
    #: The request's task that has written the row; the two rows of one transaction have the same.
    task = models.CharField(max_length=100)


def create_rows():
    Note.objects.create(owner="public", request=-1, task="")
    for name in TENANTS:
        tenant = Tenant.objects.create(schema_name=name)
        Domain.objects.create(domain=f"{name}.test", tenant=tenant)
    execute(
        ";".join(
            f"CREATE SCHEMA {name};"
            f"CREATE TABLE {name}.many_tenants_note (LIKE many_tenants_note INCLUDING ALL)"
            for name in TENANTS
        )
    )


# --- The project ----------------------------------------------------------------------------------


def choose_tenant(get_response):
    """Choose the tenant as the package's sync middleware does."""

    async def middleware(request):
        connection.set_schema_to_public()
        name = request.get_host().split(":")[0]
        domain = await Domain.objects.select_related("tenant").aget(domain=name)
        connection.set_tenant(domain.tenant)
        return await get_response(request)

    return middleware


choose_tenant.sync_capable, choose_tenant.async_capable = False, True

#: The number of wrong reads, by kind.
seen = collections.Counter()
#: By request: its task, its client's leaving, and the place where the request is cancelled.
tasks, leaving, fates = {}, {}, {}


def uses_threads(number):
    return number // len(TENANTS) % 2 == 0 or number % 10 == 0


def cancel(number):
    """Cancel the request: the server cancels its task, or the client leaves."""
    if uses_threads(number) or number % 2:
        # A cancelled task does not close its threads' connections, nor does it on Django's own
        # engine.
        leaving[number].set()
    else:
        tasks[number].cancel()


def reach(number, place):
    """Cancel the request if `place` is where it is to be cancelled."""
    if fates.get(number) == place:
        cancel(number)


def look(owner, rows):
    seen["reads"] += 1
    if connection.schema_name != owner:
        seen["connection of another"] += 1
    if "public" in rows:
        seen["reads of public"] += 1
    elif {*rows} - {owner}:
        seen["reads of others"] += 1


OWNERS = Note.objects.values_list("owner", flat=True).distinct()


async def reads_and_writes(owner, number, task):
    look(owner, [name async for name in OWNERS.all()])
    reach(number, f"{task} before")
    await Note.objects.acreate(owner=owner, request=number, task=task)
    reach(number, f"{task} after")
    look(owner, [name async for name in OWNERS.all()])


async def writes_two(owner, number, task):
    async with transaction.atomic():
        await Note.objects.acreate(owner=owner, request=number, task=task)
        reach(number, f"{task} before")
        look(owner, [name async for name in OWNERS.all()])
        await Note.objects.acreate(owner=owner, request=number, task=task)
        reach(number, f"{task} after")


def in_a_thread(owner, number, task):
    look(owner, list(OWNERS.all()))
    Note.objects.create(owner=owner, request=number, task=task)


GATHERED = ["gathered 1", "gathered 2", "gathered 3"]
PLACES = ["start", "end"]
PLACES += [
    f"{task} {when}" for task in [*GATHERED, "group", "pair"] for when in ("before", "after")
]
#: The rows that an uncancelled request leaves, without those that a thread writes.
ROWS = collections.Counter([*GATHERED, "group", "pair", "pair"])


async def view(request, number):
    owner = request.get_host().split(".")[0]
    reach(number, "start")
    await asyncio.gather(*(reads_and_writes(owner, number, task) for task in GATHERED))
    async with asyncio.TaskGroup() as group:
        group.create_task(reads_and_writes(owner, number, "group"))
        group.create_task(writes_two(owner, number, "pair"))
        if number % 10 == 0:
            group.create_task(sync_to_async(in_a_thread)(owner, number, "thread"))
    reach(number, "end")
    look(owner, [name async for name in OWNERS.all()])
    return HttpResponse(b"[]")


urlpatterns = [path("<int:number>", view)]


# --- The requests ---------------------------------------------------------------------------------


async def serve():
    applications = []
    for middleware in (
        "django_tenants.middleware.main.TenantMainMiddleware",
        f"{__name__}.choose_tenant",
    ):
        with override_settings(MIDDLEWARE=[middleware]):
            applications.append(ASGIHandler())
    numbers = range(REQUESTS)
    draw = random.Random(20)
    cancelled = draw.sample(numbers, REQUESTS // 5)
    # Half of them cancel themselves; the others are cancelled whenever so many requests have ended.
    for place, number in enumerate(cancelled[::2]):
        fates[number] = PLACES[place % len(PLACES)]
    others = cancelled[1::2]
    moments = {*draw.sample(range(REQUESTS // 2), len(others))}
    ended = 0

    def end(_):
        nonlocal ended
        ended += 1
        while ended in moments and others:
            number = others.pop()
            if not tasks[number].done():
                cancel(number)
                break

    for number in numbers:
        headers = {"host": f"{TENANTS[number % len(TENANTS)]}.test"}
        application = applications[number // len(TENANTS) % 2]
        leaving[number] = asyncio.Event()
        coroutine = run.ask(application, f"/{number}", headers, leaving[number])
        tasks[number] = asyncio.create_task(coroutine)
        tasks[number].add_done_callback(end)
    results = await asyncio.gather(*tasks.values(), return_exceptions=True)
    await asyncio.sleep(0)
    left = [record for record in pgbackend.statistics() if record.leased or record.waiting]
    return results, [str(record) for record in left]


def rows_in_the_database():
    schemas = ["public", *TENANTS]
    query = " UNION ALL ".join(
        f"SELECT '{name}', owner, request, task FROM {name}.many_tenants_note" for name in schemas
    )
    return execute(query)


def what_is_left(results):
    of_others = torn = 0
    by_request = collections.defaultdict(collections.Counter)
    for schema, owner, number, task in rows_in_the_database():
        of_others += schema != owner
        by_request[number][task] += 1
    torn = sum(rows["pair"] not in {0, 2} for rows in by_request.values())
    finished = [number for number, result in enumerate(results) if result == []]
    wanted = {
        number: ROWS + collections.Counter(["thread"] * (number % 10 == 0)) for number in finished
    }
    return {
        "rows of others": of_others,
        "torn transactions": torn,
        "requests that lack rows": sum(by_request[n] != wanted[n] for n in finished),
    }


def main():
    logging.disable(logging.CRITICAL)
    with database():
        shared.create_tables()
        create_rows()
        connection.close()
        begun = time.monotonic()
        results, left = asyncio.run(serve())
        seconds = time.monotonic() - begun
        errors = [each for each in results if isinstance(each, Exception)]
        answer = {
            "seconds": round(seconds, 1),
            "finished": sum(each == [] for each in results),
            "cancelled": sum(isinstance(each, asyncio.CancelledError) for each in results),
            "left": sum(each is None for each in results),
            "errors": [f"{type(each).__name__}: {each}"[:300] for each in errors[:5]],
            "number of errors": len(errors),
            "seen": dict(seen),
            "leases": left,
            "open transactions": execute(
                "SELECT count(*) FROM pg_stat_activity "
                "WHERE datname = current_database() AND state LIKE 'idle in transaction%'"
            )[0][0],
            **what_is_left(results),
        }
        print(json.dumps(answer))
        connection.close_pool()
