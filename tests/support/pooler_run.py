"""Runs the tests of the contract through PgBouncer in transaction mode: ``pytest --pooler newer``.

All connections of the alias 'default' then go through PgBouncer, with OPTIONS["pooler"], and every
message is recorded. `DOES_NOT_APPLY` is the one place that tells which tests are left out, and why.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

LEFT_OUT = pytest.StashKey[list[str]]()

#: Patterns of the ids of tests that do not apply, with the reason.
DOES_NOT_APPLY: dict[str, str] = {}

#: What tests send themselves, by the beginning of the line that tells it.
OWN_ACTS: tuple[str, ...] = ()


def add_option(parser: pytest.Parser) -> None:
    """Add the option ``--pooler``."""
    parser.addoption(
        "--pooler",
        choices=["older", "newer"],
        help="run the contract's tests through this PgBouncer, in transaction mode",
    )


def leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that do not apply to a run through a pooler."""
    if not config.option.pooler:
        return
    left = [item for item in items if reason(item.nodeid) is not None]
    items[:] = [item for item in items if reason(item.nodeid) is None]
    config.hook.pytest_deselected(items=left)
    config.stash[LEFT_OUT] = [item.nodeid for item in left]


def reason(nodeid: str) -> str | None:
    """Return why a test does not apply; None if it does."""
    name = nodeid.removeprefix("tests/contract/")
    for pattern, why in DOES_NOT_APPLY.items():
        if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}[[]*"):
            return why
    return None
