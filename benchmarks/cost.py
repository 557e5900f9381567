"""Measures the cost of an operation of the ORM in this process: ``python benchmarks/cost.py``.

The time of the processor is measured, not that of the clock: the server's own time does not count.
Each operation runs on Django's engine and on pgbackend, in one process: in sync code, in green code
and by the a-methods. The stacks take turns, in another order each round. A turn begins with as many
operations as are counted later, and does not count them: Python specialises its instructions for
the code that runs, and a turn would pay for the specialisations of the turn before it. For the same
reason, sync code is measured before any other code has run, as in a process that serves nothing
else. The output is the median of the rounds in microseconds, and the median of their ratios to
Django's engine in a sync context in the same round: a machine may be slower for some rounds than
for others.
The server has a processor of its own, if there are two: the cost of waiting for an answer differs
several times over with where the kernel has placed both processes, and the kernel changes its mind.
With ``--instructions`` the number of instructions of Python's own code is counted instead. It says
nothing of C code, and is the same on a busy machine (Python 3.12 and later).
In the stack "green, observed", an exporter of metrics is on.
With ``--without NAME`` a shortcut of pgbackend is switched off, or all of them (``--without 0``).
With ``--loop uvloop`` the operations run on uvloop, as under uvicorn.
The program starts a server of its own, or uses that of ``DATABASE_URL``.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import django
from django.conf import settings

sys.path.insert(0, str(Path(__file__).parents[1]))

from pgbackend import embedded

#: By operation and stack: ``median``, in microseconds or instructions, and ``ratio``.
Found: TypeAlias = dict[str, dict[str, dict[str, float]]]

ENGINES = {"stock": "django.db.backends.postgresql", "ours": "pgbackend"}
#: Ways to send parameters that are not the default of pgbackend.
OPTIONS = {
    "bound": {"server_side_binding": True},
    "prepared": {"server_side_binding": True, "prepare_threshold": 5},
}
#: The stack to which the others are compared.
BASE = "stock sync"
STACKS = (
    *(BASE, "sync", "green", "a-method", "stock a-method"),
    *("green, bound by the server", "green, prepared", "green, observed"),
)
OPERATIONS: dict[str, tuple[Callable[[str], Any], Callable[[str], Awaitable[Any]] | None]] = {}


def configure(url: str) -> None:
    server = embedded.database_settings(url)
    settings.configure(
        DATABASES={
            alias: {**server, "ENGINE": engine, "CONN_MAX_AGE": None}
            for alias, engine in (("default", ENGINES["ours"]), *ENGINES.items())
        }
        | {
            alias: {
                **server,
                "ENGINE": ENGINES["ours"],
                "OPTIONS": {**server.get("OPTIONS", {}), **options},
            }
            for alias, options in OPTIONS.items()
        },
        USE_TZ=True,
    )
    django.setup()


def define() -> Callable[[], None]:
    """Make the table and the operations on it; return a function that fills the table anew."""
    from django.db import connections, models

    class Row(models.Model):
        name = models.CharField(max_length=40)
        number = models.IntegerField()
        price = models.DecimalField(max_digits=8, decimal_places=2)
        at = models.DateTimeField(auto_now_add=True)

        class Meta:
            app_label = "cost"
            db_table = "benchmark_cost"

        def __str__(self) -> str:
            return self.name

    with connections["stock"].schema_editor() as editor:
        editor.execute("DROP TABLE IF EXISTS benchmark_cost")
        editor.create_model(Row)
    _fill_table(Row)
    loaded = {alias: Row.objects.using(alias).get(pk=1) for alias in (*ENGINES, *OPTIONS)}
    awaited = _awaited_operations(Row, loaded)
    for name, work in _operations(Row, loaded).items():
        OPERATIONS[name] = (work, awaited.get(name))
    return functools.partial(_fill_table, Row)


def _fill_table(row: Any) -> None:
    """Give the table the rows to measure with, and remove those that operations have added."""
    from django.db import connections

    with connections["stock"].cursor() as cursor:
        cursor.execute("TRUNCATE benchmark_cost RESTART IDENTITY")
    row.objects.using("stock").bulk_create(
        row(name=f"row {number}", number=number, price=number) for number in range(1, 101)
    )


def _operations(row: Any, loaded: dict[str, Any]) -> dict[str, Callable[[str], Any]]:
    from django.db import connections, models, transaction

    def raw(alias: str) -> None:
        with connections[alias].cursor() as cursor:
            cursor.execute("SELECT 1")
            cursor.fetchone()

    def block(alias: str) -> None:
        with transaction.atomic(using=alias):
            row.objects.using(alias).get(pk=7)

    def insert(alias: str) -> None:
        with transaction.atomic(using=alias):
            row.objects.using(alias).create(name="one more", number=1, price=1)

    return {
        "SELECT 1": raw,
        "get(pk)": lambda alias: row.objects.using(alias).get(pk=7),
        "100 rows": lambda alias: list(row.objects.using(alias).all()),
        "save()": lambda alias: loaded[alias].save(using=alias),
        "get(pk) in atomic()": block,
        "update(F)": lambda alias: (
            row.objects.using(alias).filter(pk=7).update(number=models.F("number") + 1)
        ),
        "create() in atomic()": insert,  # the last: the table grows
    }


def _awaited_operations(
    row: Any, loaded: dict[str, Any]
) -> dict[str, Callable[[str], Awaitable[Any]]]:
    async def rows(alias: str) -> None:
        async for _ in row.objects.using(alias).all():
            pass

    return {
        "get(pk)": lambda alias: row.objects.using(alias).aget(pk=7),
        "100 rows": rows,
        "save()": lambda alias: loaded[alias].asave(using=alias),
    }


class Instructions:
    """Counts the bytecode instructions that all threads execute while it is on."""

    def __init__(self) -> None:
        self.count = 0
        monitoring: Any = sys.monitoring  # type: ignore[attr-defined, unused-ignore]
        self.event = monitoring.events.INSTRUCTION
        self.tool = monitoring.PROFILER_ID
        monitoring.use_tool_id(self.tool, "cost")
        monitoring.register_callback(self.tool, self.event, self._note)
        self.set_events = monitoring.set_events

    def _note(self, code: object, offset: int) -> None:
        self.count += 1

    def __call__(self) -> float:
        """Start or go on counting; return the instructions counted so far, in millions."""
        self.set_events(self.tool, self.event)
        return self.count / 1e6


#: The meter of an operation's cost: seconds, or millions of instructions.
meter: Callable[[], float] = time.process_time


def sync(alias: str) -> Callable[[str, int], float]:
    def measure(name: str, count: int) -> float:
        work = OPERATIONS[name][0]
        for _ in range(count):
            work(alias)
        started = meter()
        for _ in range(count):
            work(alias)
        return (meter() - started) / count

    return measure


def green(alias: str, runner: asyncio.Runner) -> Callable[[str, int], float]:
    from pgbackend import aio

    def measure(name: str, count: int) -> float:
        async def main() -> float:
            return await aio.run(sync(alias), name, count)

        return runner.run(main())

    return measure


def awaited(alias: str, runner: asyncio.Runner) -> Callable[[str, int], float | None]:
    def measure(name: str, count: int) -> float | None:
        work = OPERATIONS[name][1]
        if work is None:
            return None

        async def main() -> float:
            for _ in range(count):
                await work(alias)
            started = meter()
            for _ in range(count):
                await work(alias)
            return (meter() - started) / count

        return runner.run(main())

    return measure


def observed(measure: Callable[[str, int], float]) -> Callable[[str, int], float]:
    """Return `measure` with durations measured for exporters (docs/monitoring.md) meanwhile."""
    from pgbackend.totals import observe, stop_observing

    def measure_observed(name: str, count: int) -> float:
        observe("cost")
        try:
            return measure(name, count)
        finally:
            stop_observing("cost")

    return measure_observed


def measure(
    fill_table: Callable[[], None],
    rounds: int,
    count: int,
    chosen: list[str],
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> Found:
    """Return the cost of each operation, by operation and stack."""
    others = [stack for stack in chosen if stack not in (BASE, "sync")]
    found: Found = {name: {} for name in OPERATIONS}
    with asyncio.Runner(loop_factory=new_loop) as runner:
        stacks: dict[str, Callable[[str, int], float | None]] = {
            BASE: sync("stock"),
            "sync": sync("ours"),
            "green": green("ours", runner),
            "a-method": awaited("ours", runner),
            "stock a-method": awaited("stock", runner),
            "green, bound by the server": green("bound", runner),
            "green, prepared": green("prepared", runner),
            "green, observed": observed(green("ours", runner)),
        }
        for together in ([BASE, "sync"], [BASE, *others]):
            turns = {stack: stacks[stack] for stack in together if stack in (BASE, *chosen)}
            fill_table()
            for name in OPERATIONS:
                found[name].update(_measure_one(turns, name, rounds, count))
    return found


def _measure_one(
    stacks: dict[str, Callable[[str, int], float | None]], name: str, rounds: int, count: int
) -> dict[str, dict[str, float]]:
    """Return the cost of the operation `name`, by stack."""
    times: dict[str, list[float]] = {stack: [] for stack in stacks}
    for number in range(rounds):
        for stack in _in_turn(list(stacks), number):
            gc.collect()
            seconds = stacks[stack](name, count)
            if seconds is not None:
                times[stack].append(seconds * 1e6)
    return {
        stack: {"median": statistics.median(values), "ratio": _ratio(values, times[BASE])}
        for stack, values in times.items()
        if values
    }


def _in_turn(stacks: list[str], number: int) -> list[str]:
    """Order the stacks anew each round, as each pays for what the one before left in the caches."""
    first = number % len(stacks)
    order = stacks[first:] + stacks[:first]
    return order[::-1] if number // len(stacks) % 2 else order


def _ratio(values: list[float], base: list[float]) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(one / other for one, other in zip(values, base, strict=True))


@contextmanager
def _server_apart() -> Iterator[Any]:
    """Run a server on the last processor and this process on the first, if there are two."""
    if not hasattr(os, "sched_setaffinity"):  # not Linux
        with embedded.server() as server:
            yield server
        return
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, processors[-1:])  # the server inherits that
    with embedded.server() as server:
        os.sched_setaffinity(0, processors[:1])
        yield server


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--count", type=int, default=100, help="operations in a round")
    parser.add_argument("--stacks", nargs="*", default=list(STACKS), choices=STACKS)
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--instructions", action="store_true", help="count them; take no time")
    parser.add_argument(
        "--without", nargs="*", default=[], metavar="NAME", help="shortcuts to switch off; 0: all"
    )
    options = parser.parse_args()
    if options.without:
        off = "0" if options.without == ["0"] else ",".join(f"-{name}" for name in options.without)
        os.environ["PGBACKEND_SHORTCUTS"] = off
    if options.instructions:
        global meter  # noqa: PLW0603 - chosen once, before anything is measured
        meter = Instructions()
    with _server_apart() as server:
        os.environ.pop("DJANGO_ALLOW_ASYNC_UNSAFE", None)
        configure(server.url)
        fill_table = define()
        new_loop = importlib.import_module(options.loop).new_event_loop
        found = measure(fill_table, options.rounds, options.count, options.stacks, new_loop)
    if options.json:
        print(json.dumps(found))
    else:
        _print_table(found, "instr." if options.instructions else "us")


def _print_table(found: Found, unit: str) -> None:
    stacks = list(found["get(pk)"])
    print(f"{'':22}" + "".join(f"{stack:>26}" for stack in stacks))
    for name, costs in found.items():
        cells = [
            f"{costs[s]['median']:9.1f} {unit}  {costs[s]['ratio']:5.2f}" if s in costs else ""
            for s in stacks
        ]
        print(f"{name:22}" + "".join(f"{cell:>26}" for cell in cells))


if __name__ == "__main__":
    main()
