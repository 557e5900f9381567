"""Provides fixtures of the shortcuts' tests: those of the backend's tests and of the driver's."""

from __future__ import annotations

from tests.driver.conftest import pools  # noqa: F401 - pytest's
from tests.support.fixtures import (  # noqa: F401
    fresh_tables,
    leases,
    make_books,
    site,
    threads,
    transactional_db,
)
