"""Provides fixtures of the tests of what operators use."""

from __future__ import annotations

from tests.driver.conftest import link, pools, pools_by_link  # noqa: F401 - pytest's
from tests.support.fixtures import (  # noqa: F401 - pytest's
    fresh_tables,
    leases,
    make_books,
    site,
    threads,
    transactional_db,
)
