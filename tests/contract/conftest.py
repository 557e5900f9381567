"""Provides fixtures of the contract's tests: one kind of loop a run, tasks shuffled by a seed.

``pytest tests/contract --loop uvloop --seed 7``; both are printed in the header of the run.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.db import connections

from tests.conftest import Runner
from tests.driver.conftest import link, pools, pools_by_link, table  # noqa: F401 - pytest's
from tests.support.fixtures import (  # noqa: F401 - pytest's
    fresh_tables,
    leases,
    make_books,
    site,
    threads,
    transactional_db,
)
from tests.support.loops import LoopFactory, shuffled
from tests.support.tenants import do, tenants  # noqa: F401 - pytest's
from tests.support.through_pooler import through_pooler

collect_ignore = ["project"]  # a project with tests of its own: see test_c12_tests.py


@pytest.fixture(scope="session", autouse=True)
def pooler(request: pytest.FixtureRequest, conninfo: str) -> Iterator[None]:
    """Run all tests through a pooler, if ``--pooler`` says so."""
    if not request.config.option.pooler:
        yield
        return
    request.getfixturevalue("django_db_setup")  # its end drops the database: after ours
    blocker = request.getfixturevalue("django_db_blocker")
    with blocker.unblock(), through_pooler(request.config, conninfo):
        yield


@pytest.fixture
def loop_factory(request: pytest.FixtureRequest) -> LoopFactory:
    """Return a factory of this run's loops; each test draws an order of its own from the seed."""
    options = request.config.option
    return shuffled(options.loop, (options.seed, request.node.nodeid))


@pytest.fixture
def run(loop_factory: LoopFactory) -> Runner:
    """Run a coroutine on a new loop of this run's kind, its tasks shuffled by this run's seed."""
    return Runner(loop_factory)


@pytest.fixture(scope="module")
def other_alias(django_db_setup: None) -> Iterator[str]:
    """Add a second alias of the same database."""
    connections.settings["other"] = {**connections.settings["default"]}
    yield "other"
    connections["other"].close()
    connections["other"].close_pool()
    del connections["other"]
    del connections.settings["other"]
