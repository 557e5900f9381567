"""Leaves slow tests out of a run without ``--slow``.

The mark `slow` is for tests that take long by their kind: they start servers, browsers or other
test runs. The mark `sweep` is for a test with a great many cases of one kind: of its cases, one in
`one_in` stays in the quick run, and the others get the mark `slow`. With ``--sweeps drawn`` these
others are left out of a run with ``--slow``, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import pytest

LEFT_OUT = pytest.StashKey[int]()


def mark_sweeps(items: Sequence[pytest.Item], seed: str) -> None:
    """Mark as slow the cases of sweeps that have no place in the quick run."""
    sweeps: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sweep") is not None:
            sweeps[item.nodeid.partition("[")[0]].append(item)
    for name, cases in sweeps.items():
        marker = cases[0].get_closest_marker("sweep")
        assert marker is not None
        quick = {*drawn(cases, Random(f"{seed} {name}"), **marker.kwargs)}
        for case in cases:
            if case not in quick:
                case.add_marker("slow")
                case.add_marker("not_drawn")


def drawn(cases: Sequence[Any], random: Random, *, one_in: int) -> Iterator[Any]:
    """Draw one case of each `one_in` neighbours, so that all regions of a sweep are visited."""
    for start in range(0, len(cases), one_in):
        yield random.choice(cases[start : start + one_in])


def leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the slow tests and those on a cluster, unless somebody asks for them."""
    if not _is_named("scaleout", config):
        _deselect("scaleout", config, items)
    if config.option.sweeps == "drawn":
        _deselect("not_drawn", config, items)
    if not is_asked_for(config):
        config.stash[LEFT_OUT] = _deselect("slow", config, items)


def _deselect(name: str, config: pytest.Config, items: list[pytest.Item]) -> int:
    """Deselect the tests with a mark; return their number."""
    marked = [item for item in items if item.get_closest_marker(name) is not None]
    if marked:
        items[:] = [item for item in items if item.get_closest_marker(name) is None]
        config.hook.pytest_deselected(items=marked)
    return len(marked)


def is_asked_for(config: pytest.Config) -> bool:
    """Return whether slow tests are to be run: by ``--slow``, by ``-m``, or by their node ids."""
    return config.option.slow or _is_named("slow", config)


def _is_named(mark: str, config: pytest.Config) -> bool:
    """Return whether ``-m`` names the mark, or arguments name tests by their node ids."""
    return mark in config.option.markexpr or any("::" in argument for argument in config.args)
