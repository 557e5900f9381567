"""Provides fixtures of the contract's tests: one kind of loop a run, tasks shuffled by a seed.

``pytest tests/contract --loop uvloop --seed 7``; both are printed in the header of the run.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connection

from tests.conftest import Runner
from tests.driver.conftest import link, pools, pools_by_link, table  # noqa: F401 - pytest's
from tests.support.fixtures import leases, make_books, site, threads  # noqa: F401
from tests.support.loops import LoopFactory, shuffled

collect_ignore = ["project"]  # a project with tests of its own: see test_c12_tests.py


@pytest.fixture
def loop_factory(request: pytest.FixtureRequest) -> LoopFactory:
    """Return a factory of this run's loops; each test draws an order of its own from the seed."""
    options = request.config.option
    return shuffled(options.loop, (options.seed, request.node.nodeid))


@pytest.fixture
def run(loop_factory: LoopFactory) -> Runner:
    """Run a coroutine on a new loop of this run's kind, its tasks shuffled by this run's seed."""
    return Runner(loop_factory)


@pytest.fixture
def transactional_db(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """Let tests commit, and empty only the tables that a test has written to.

    pytest-django's fixture of this name empties every table, and makes Django's own rows again;
    there are a thousand tests here.
    """
    with django_db_blocker.unblock():
        yield
        _empty_tables()


@pytest.fixture(autouse=True)
def _fresh_tables(transactional_db: None) -> Iterator[None]:
    """Let each test commit."""
    yield


def _empty_tables() -> None:
    from django.contrib.contenttypes.models import ContentType

    written = " UNION ALL ".join(
        f"SELECT '{name}' WHERE EXISTS (SELECT FROM {name})" for name in _tables()
    )
    with connection.cursor() as cursor:
        cursor.execute(written)
        if names := [name for (name,) in cursor.fetchall()]:
            cursor.execute(f"TRUNCATE {', '.join(names)} CASCADE")
    connection.close()
    ContentType.objects.clear_cache()


@functools.cache
def _tables() -> list[str]:
    """Return the tables of all models, except for those that Django has filled itself."""
    kept = {"django_content_type", "auth_permission"}
    return sorted(set(connection.introspection.django_table_names()) - kept)
