"""Tests how a worker's journal is read, also after the worker has crashed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .compare import compare
from .document import _faults
from .results import Results, fold, read


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    """Return a function that writes a journal, and returns its path."""

    def write(*records: dict[str, Any]) -> Path:
        path = tmp_path / "green.0.jsonl"
        path.write_text("".join(json.dumps({"test": "", **record}) + "\n" for record in records))
        return path

    (tmp_path / "log").write_text("Fatal Python error: Segmentation fault")
    return write


def outcome(test: str, outcome: str) -> list[dict[str, Any]]:
    return [
        {"event": "started", "test": test},
        {"event": "outcome", "test": test, "outcome": outcome},
        {"event": "stopped", "test": test, "seconds": 0.1},
    ]


def folded(path: Path, run: str = "green") -> Results:
    results = Results(run, "6.1.3", ["basic"])
    fold(results, path, path.with_name("log"))
    return results


def test_a_worker_that_ended_between_tests_is_a_crash_also_if_another_finished(
    journal: Any,
) -> None:
    first, second = outcome("a", "passed"), outcome("b", "passed")
    crash = {"event": "crash", "test": "after ['a']", "text": "killed"}
    path = journal(*first, crash, *second, {"event": "finished"})
    results = folded(path)
    assert read(path).finished and len(results.crashes) == 1
    stock = folded(journal(*first, *second, {"event": "finished"}), "stock")
    assert not compare(stock, results).is_good
    assert list(_faults({"stock": stock, "green": results}))


def test_a_journal_without_an_end_is_a_crash(journal: Any) -> None:
    results = folded(journal(*outcome("a", "passed")))
    assert "Segmentation fault" in results.crashes[0]


def test_a_test_that_was_interrupted_runs_again(journal: Any) -> None:
    begun = {"event": "started", "test": "b"}
    entry = read(journal(*outcome("a", "passed"), begun))
    assert (entry.begun, entry.running) == (["a", "b"], "b")
    entry = read(journal(*outcome("a", "passed"), begun, {"event": "forgotten", "test": "b"}))
    assert (entry.begun, entry.running, entry.finished) == (["a"], None, False)


def test_the_last_words_of_a_worker_that_was_killed_do_not_matter(journal: Any) -> None:
    path = journal(*outcome("a", "passed"))
    path.write_text(path.read_text() + '{"event": "outc')
    assert read(path).begun == ["a"]


def test_the_page_is_not_written_from_runs_of_different_code(journal: Any) -> None:
    path = journal(*outcome("a", "passed"), {"event": "finished"})
    stock, green = folded(path, "stock"), folded(path)
    assert not list(_faults({"stock": stock, "green": green}))
    green.versions = {"pgbackend": "changed"}
    assert list(_faults({"stock": stock, "green": green}))
