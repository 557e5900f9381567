"""Provides fixtures of the backend's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fixtures import leases, make_books, site, threads  # noqa: F401 - pytest's


@pytest.fixture(autouse=True)
def _fresh_sessions(transactional_db: None) -> Iterator[None]:
    """Let each test commit; pytest-django empties the tables afterwards."""
    yield
