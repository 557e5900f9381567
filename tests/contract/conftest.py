"""Fixtures of the contract's tests: one kind of loop a run, with its tasks shuffled by a seed.

``pytest tests/contract --loop uvloop --seed 7``; both are printed in the header of the run.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import Runner
from tests.driver.conftest import link, pools, pools_by_link, table  # noqa: F401 - pytest's
from tests.support.fixtures import leases, make_books, site, threads  # noqa: F401
from tests.support.loops import LoopFactory, shuffled

collect_ignore = ["project"]  # a project with tests of its own: see test_c12_tests.py


@pytest.fixture
def loop_factory(request: pytest.FixtureRequest) -> LoopFactory:
    """Makes the loops of this run; each test draws an order of its own from the seed."""
    options = request.config.option
    return shuffled(options.loop, (options.seed, request.node.nodeid))


@pytest.fixture
def run(loop_factory: LoopFactory) -> Runner:
    """Run a coroutine on a new loop of this run's kind, its tasks shuffled by this run's seed."""
    return Runner(loop_factory)


@pytest.fixture(autouse=True)
def _fresh_tables(transactional_db: None) -> Iterator[None]:
    """Each test writes for real; pytest-django empties the tables after it."""
    yield
