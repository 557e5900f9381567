"""Registers the marker of this package's one test."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "suite: runs modules of Django's own test suite; minutes")
