"""Tests C15 by random programs: each statement sees what its blocks declare, whatever came before.

A program is a tree of steps, drawn by a seed: blocks of settings and of transactions, which nest
and fail; statements of many kinds; raw SQL that sets settings, or fails. It runs in sync code, and
green, alone and beside others over fewer connections. What each statement sees, a tenant or a
custom setting, is compared with what the innermost block declares.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from django.db import DatabaseError, connection, connections, transaction
from psycopg import sql

import pgbackend
from pgbackend import aio
from tests.conftest import Runner
from tests.library.models import Author
from tests.support.fixtures import settings_of_default
from tests.support.tenants import OUTSIDE, TENANTS, look, tenant

pytestmark = [pytest.mark.usefixtures("tenants")]

#: How many programs a test runs; a quick run has some of them.
PROGRAMS = {"quick": 45, "all": 300}


class Failure(Exception):
    """Raised by a program, to make a block roll back."""


class Program:
    """Runs random steps, and checks what each statement sees."""

    def __init__(self, seed: object, *, in_portal: bool) -> None:
        self.rng = random.Random(str(seed))
        self.in_portal = in_portal
        self.tenants = [OUTSIDE]
        self.numbers: list[str | None] = [None]
        self.steps: list[str] = []

    def run(self) -> None:
        try:
            self.block(depth=0)
            self.check()
        except AssertionError as exc:
            exc.add_note("\n".join(self.steps))
            raise

    def block(self, depth: int) -> None:
        for _ in range(self.rng.randint(1, 4)):
            kinds: list[Callable[[int], None]] = [
                self.orm, self.raw, self.iterate, self.sets, self.fails, self.many, self.composed,
            ]  # fmt: skip
            if depth < 4:
                kinds += [self.declare, self.declare, self.atomic, self.atomic]
                kinds += [self.pinned] if self.in_portal and not connection.in_atomic_block else []
            step = self.rng.choice(kinds)
            self.steps.append("    " * depth + step.__name__)
            step(depth)

    def check(self) -> None:
        assert (tenant(), look()) == (self.tenants[-1], self.numbers[-1])

    # --- Blocks ---

    def declare(self, depth: int) -> None:
        settings: dict[str, Any] = {}
        seen, number = self.tenants[-1], self.numbers[-1]
        if self.rng.random() < 0.7:
            seen = self.rng.choice(TENANTS)
            settings["search_path"] = [seen, "public"]
        if self.rng.random() < 0.5:
            number = str(self.rng.randrange(1000))
            settings["app.tenant"] = number
        self.steps[-1] += f" {settings}"
        self.tenants.append(seen)
        self.numbers.append(number)
        try:
            with pgbackend.session(**settings):
                self.block(depth + 1)
        finally:
            del self.tenants[-1], self.numbers[-1]

    def atomic(self, depth: int) -> None:
        fails = self.rng.random() < 0.4
        self.steps[-1] += " fails" if fails else ""
        with suppress(Failure), transaction.atomic():
            self.block(depth + 1)
            if fails:
                raise Failure

    def pinned(self, depth: int) -> None:
        with pgbackend.pinned():
            self.block(depth + 1)

    # --- Statements ---

    def orm(self, depth: int) -> None:
        assert tenant() == self.tenants[-1]

    def raw(self, depth: int) -> None:
        assert look() == self.numbers[-1]

    def composed(self, depth: int) -> None:
        with connection.cursor() as cursor:
            cursor.execute(
                sql.SQL("/* {} */ (SELECT name FROM library_author)").format(sql.SQL("x"))
            )
            assert cursor.fetchone() == (self.tenants[-1],)

    def iterate(self, depth: int) -> None:
        for author in Author.objects.iterator(chunk_size=1):
            assert author.name == self.tenants[-1]
            if depth < 4:
                self.declare(depth + 1)
            break

    def many(self, depth: int) -> None:
        with connection.cursor() as cursor:
            cursor.executemany(
                "UPDATE library_author SET id = id WHERE name = %s", [("x",), ("y",)]
            )
            cursor.execute("SELECT name FROM library_author")
            assert cursor.fetchone() == (self.tenants[-1],)

    def sets(self, depth: int) -> None:
        """Set what is declared by raw SQL, in vain, and something else."""
        local = "LOCAL" if connection.in_atomic_block else ""
        with connection.cursor() as cursor:
            if self.numbers[-1] is not None:
                cursor.execute(f"SET {local} app.tenant TO 'raw'")
            cursor.execute(f"SET {local} app.other TO 'raw'")
        self.raw(depth)

    def fails(self, depth: int) -> None:
        text = self.rng.choice(
            ["SELECT 1/0", "SELEC", "SELECT nothing", "VACUUM nothing", "CALL x()"]
        )
        with suppress(DatabaseError), transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(text)


def one_connection(size: int = 1) -> dict[str, Any]:
    given = connections.settings["default"]["OPTIONS"]
    return {**given, "pool": {"min_size": size, "max_size": size}}


@pytest.fixture(params=["quick", pytest.param("all", marks=pytest.mark.slow)])
def programs(request: pytest.FixtureRequest) -> int:
    return PROGRAMS[request.param]


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> str:
    return str(request.config.option.seed)


def test_a_program_in_sync_code_sees_what_it_declares(seed: str, programs: int) -> None:
    for number in range(programs):
        Program((seed, number), in_portal=False).run()


def test_a_green_program_sees_what_it_declares(run: Runner, seed: str, programs: int) -> None:
    async def main() -> None:
        for number in range(programs):
            await aio.run(Program((seed, number), in_portal=True).run)

    with settings_of_default(OPTIONS=one_connection()):
        run(main(), timeout=60)


def test_green_programs_side_by_side_see_what_they_declare(
    run: Runner, seed: str, programs: int
) -> None:
    async def one_of(number: int) -> None:
        for n in range(programs // 10):
            await aio.run(Program((seed, number, n), in_portal=False).run)

    async def main() -> None:
        await asyncio.gather(*map(one_of, range(8)))

    with settings_of_default(OPTIONS=one_connection(3)):
        run(main(), timeout=60)


def test_programs_in_one_transaction_see_what_they_declare(
    run: Runner, seed: str, programs: int
) -> None:
    async def main() -> None:
        for number in range(programs // 10):
            async with transaction.atomic():
                made = [Program((seed, number, n), in_portal=False) for n in range(3)]
                await asyncio.gather(*(aio.run(program.run) for program in made))

    with settings_of_default(OPTIONS=one_connection()):
        run(main(), timeout=60)


def test_programs_that_are_cancelled_leave_nothing_to_others(
    run: Runner, seed: str, programs: int
) -> None:
    async def cancelled(number: int, turns: int) -> None:
        task = asyncio.create_task(aio.run(Program((seed, number), in_portal=False).run))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def main() -> None:
        for number in range(programs // 3):
            rng = random.Random(f"{seed} {number}")
            others = [aio.run(Program((seed, number, n), in_portal=False).run) for n in range(2)]
            await asyncio.gather(*others, *(cancelled(number, rng.randrange(40)) for _ in range(3)))

    with settings_of_default(OPTIONS=one_connection(2)):
        run(main(), timeout=60)


@pytest.mark.usefixtures("threads")
def test_programs_in_threads_of_one_transaction_see_what_they_declare(
    run: Runner, seed: str, programs: int
) -> None:
    async def main() -> None:
        for number in range(programs // 15):
            async with transaction.atomic():
                made = [Program((seed, number, n), in_portal=False) for n in range(2)]
                await asyncio.gather(
                    *(asyncio.to_thread(program.run) for program in made),
                    aio.run(Program((seed, number, "green"), in_portal=False).run),
                )

    with settings_of_default(OPTIONS=one_connection()):
        run(main(), timeout=60)
