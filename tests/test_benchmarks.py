"""Tests that the harness beside the peers measures what it says, without the peers themselves."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from benchmarks.web import __main__ as command
from benchmarks.web import (
    answers,
    database,
    endpoints,
    figures,
    load,
    machine,
    report,
    results,
    stacks,
)
from benchmarks.web.measure import Bench, Plan

OURS = [stacks.STACKS[name] for name in stacks.OURS]
APPS = Path(answers.__file__).parent / "apps"


@pytest.fixture(scope="module")
def bench(conninfo: str) -> Iterator[Bench]:
    with database.prepared(conninfo) as made:
        yield Bench(Path(sys.executable), made)


# --- The stacks ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [stacks.REFERENCE, *stacks.OURS])
def test_a_stack_answers_and_writes_what_it_should(bench: Bench, name: str) -> None:
    with bench.server(stacks.STACKS[name]) as server:
        answers.check(server, bench.database)


class Liar:
    """Plays a server that gives prescribed answers."""

    stack = stacks.STACKS["pgbackend"]

    def __init__(self, body: bytes) -> None:
        self.body = body

    def ask(self, path: str, method: str) -> bytes:
        return self.body


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("one", b'{"id": 1}'),
        ("list", b'{"rows": []}'),
        ("page", b"<!doctype html> <title>Books</title> <ul> </ul>"),
        ("update", b'{"updated": 1}'),  # but no row is
        ("insert", b'{"inserted": true}'),
    ],
)
def test_a_wrong_answer_is_noticed(bench: Bench, endpoint: str, body: bytes) -> None:
    with pytest.raises(answers.WrongAnswerError, match=endpoint):
        answers.check(Liar(body), bench.database, [endpoint])


@pytest.mark.parametrize("stack", stacks.STACKS.values(), ids=lambda stack: stack.name)
def test_a_stack_has_each_endpoint_or_says_why_not(stack: stacks.Stack) -> None:
    kind, key, suffix = (
        ("on_starlette", "answers", "_answer")
        if stack.kind == "starlette"
        else ("on_django", "views", "_view")
    )
    tree = ast.parse((APPS / kind / f"{stack.settings[key]}.py").read_text())
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    names |= {
        node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    wanted = {"wait" if name.startswith("wait") else name for name in endpoints.ENDPOINTS}
    missing = {name for name in {*wanted, "park"} if f"{name}{suffix}" not in names}
    assert missing == set(stack.lacks)


# --- The clients --------------------------------------------------------------------------------

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\n"
SIZED = HEAD + b"Content-Length: 5\r\n\r\nhello"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
ERROR = b"HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n"


def answering(*replies: bytes, size: int = 1000) -> Serve:
    """Serve the replies in turn, in pieces of `size`; b"" closes the connection instead."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = 0
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                reply = replies[number % len(replies)]
                number += 1
                if not reply:
                    break
                for start in range(0, len(reply), size):
                    writer.write(reply[start : start + size])
                    await writer.drain()
                    await asyncio.sleep(0.0001)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the clients are done
        writer.close()

    return serve


def loaded(serve: Serve, clients: int = 3, **options: Any) -> load.Outcome:
    """Return the outcome of a load on a server, with two different requests."""
    served: set[asyncio.Task[Any]] = set()

    async def tracked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        served.add(task)
        await serve(reader, writer)

    async def main() -> load.Outcome:
        async with await asyncio.start_server(tracked, "127.0.0.1", 0) as server:
            job = {"warm": 0.03, "seconds": 0.1, "patience": 0.2, **options}
            requests = [f"GET /{n} HTTP/1.1\r\n\r\n" for n in range(2)]
            port = server.sockets[0].getsockname()[1]
            run = load.Load(load.Job(port, os.getpid(), requests, clients, **job))
            try:
                return await run.run()
            finally:
                for client in run.clients:
                    client.transport.abort()
                await asyncio.gather(*served)
                await asyncio.sleep(0.01)

    return asyncio.run(main())


@pytest.mark.parametrize("reply", [SIZED, CHUNKED], ids=["sized", "chunked"])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_answer_is_read_however_it_comes(reply: bytes, size: int) -> None:
    outcome = loaded(answering(reply, size=size))
    assert outcome.answered > 0
    assert (outcome.failed, outcome.wrong, outcome.stuck) == (0, 0, 0)
    assert 0 < outcome.p50 <= outcome.p99 <= outcome.longest
    assert outcome.cpu > 0
    assert outcome.seconds >= 0.1


@pytest.mark.slow
def test_errors_and_lost_connections_count_as_failed() -> None:
    for bad in (ERROR, b""):
        outcome = loaded(answering(SIZED, bad), warm=0.2, seconds=0.3, patience=2)
        assert outcome.failed > 0
        assert 0.5 < outcome.answered / outcome.failed < 2
        assert outcome.wrong == 0


def test_another_answer_to_the_same_request_counts_as_wrong() -> None:
    outcome = loaded(answering(SIZED, SIZED, SIZED, SIZED.replace(b"hello", b"howdy")))
    assert outcome.wrong >= outcome.failed > 0
    assert outcome.answered > outcome.failed


def test_a_request_that_is_never_answered_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_DRAIN_SECONDS", 0.05)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    outcome = loaded(serve, clients=4)
    assert (outcome.answered, outcome.failed, outcome.stuck) == (0, 0, 4)
    assert outcome.longest > 0.2


def test_the_window_lasts_until_each_client_could_be_answered() -> None:
    """See Note [Whole turns]: here all are answered at once, later than the window should end."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                await asyncio.sleep(0.2)
                writer.write(SIZED)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the clients are done
        writer.close()

    outcome = loaded(serve, clients=5, warm=0.0, seconds=0.05, patience=5)
    assert outcome.answered >= 5
    assert 15 < outcome.answered / outcome.seconds < 30


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize("seconds", [0.24, 0.29])
def test_a_rate_is_counted_in_whole_turns(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """See Note [Whole turns]: a burst comes each 0.1 s; a window is not a whole number of them."""
    monkeypatch.setattr(load, "_DRAIN_SECONDS", 0.05)
    clients = 8
    together = asyncio.Barrier(clients)
    bursts: list[float] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                async with asyncio.timeout(0.5):
                    if await together.wait() == 0:
                        bursts.append(time.perf_counter())
                await asyncio.sleep(0.1)
                writer.write(SIZED)
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            pass  # the clients are done
        writer.close()

    outcome = loaded(serve, clients=clients, warm=0.0, seconds=seconds, patience=5)
    turns, rest = divmod(outcome.answered, clients)
    assert (turns > 1, rest) == (True, 0)
    assert outcome.seconds == pytest.approx(bursts[turns] - bursts[0], abs=0.03)


# --- The measurements ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_measurement_tells_what_a_stack_did(bench: Bench) -> None:
    chosen = [endpoints.ENDPOINTS[name] for name in ("one", "insert")]
    plan = Plan(OURS, chosen, clients=[4, 1], rounds=1, seconds=0.5, warm=0.1, patience=5)
    turns = list(bench.measure(plan))
    assert [(turn[0].endpoint, turn[0].stack) for turn in turns] == [
        (endpoint.name, stack.name) for endpoint in chosen for stack in OURS
    ]
    for turn in turns:
        assert [sample.clients for sample in turn] == [1, 4]
        for sample in turn:
            assert sample.answered >= sample.clients
            assert (sample.failed, sample.wrong, sample.stuck) == (0, 0, 0), sample
            assert 0 < sample.connections <= stacks.POOL["max_size"]
            assert sample.cpu > 0
            assert sample.memory > 10_000
    assert bench.database.rows("SELECT count(*) FROM bench_entry") == [(0,)]


@pytest.mark.slow
@pytest.mark.parametrize("stack", OURS, ids=lambda stack: stack.name)
def test_all_that_is_parked_is_answered(bench: Bench, stack: stacks.Stack) -> None:
    parked = bench.park(stack, 60)
    assert (parked.parked, parked.answered, parked.failed, parked.stuck) == (60, 60, 0, 0)
    assert 0 < parked.connections <= stacks.POOL["max_size"]
    assert parked.memory_idle <= parked.memory_connected <= parked.memory_parked


@pytest.mark.slow
def test_the_command_measures_and_the_report_tells_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "interpreter", lambda given: Path(sys.executable))
    path = tmp_path / "run.json"
    arguments = ["--quick", "--stacks", "pgbackend", "--endpoints", "one", "--clients", "2"]
    arguments += ["--parked", "20", "--cost-rounds", "0", "--seconds", "0.1", "--out", str(path)]
    assert command.main(arguments) == 0, capsys.readouterr().err
    run = results.Run.load(path)
    assert (len(run.samples), len(run.parked)) == (1, 1)
    assert str(tmp_path) not in run.command
    assert run.versions["Python"] == ".".join(map(str, sys.version_info[:3]))
    report.main([str(path), "--docs", str(tmp_path)])
    page = (tmp_path / "benchmarks.md").read_text()
    assert run.command in page
    assert run.versions["Django"] in page

    monkeypatch.setattr(command.machine, "has_code_of", lambda version: True)
    assert command.main([*arguments, "--resume", "--rounds", "2"]) == 0, capsys.readouterr().err
    resumed = results.Run.load(path)
    assert [sample.round for sample in resumed.samples] == [0, 1], "the first is there already"
    assert resumed.samples[0] == run.samples[0]
    assert resumed.command.startswith(f"{run.command}; ") and "--resume" in resumed.command
    assert len(resumed.parked) == 1
    assert command.main([*arguments, "--resume", "--seconds", "7"]) == 1
    assert f"the run in {path.name} had --seconds" in capsys.readouterr().err


@pytest.mark.parametrize("commit", ["no commit known", "0123456789", "0123456789-dirty"])
def test_a_run_of_another_pgbackend_is_not_gone_on_with(commit: str) -> None:
    assert not machine.has_code_of(f"0.1.0 ({commit})")


def test_the_recorded_command_has_no_path() -> None:
    given = ["--python", "/some/python", "--quick", "--out=/some/file", "--rounds", "2"]
    assert command._command(given) == "python -m benchmarks.web --quick --rounds 2"


# --- The report ---------------------------------------------------------------------------------


def sample(stack: str, number: int, answered: int, **values: Any) -> results.Sample:
    given = {
        "endpoint": "one",
        "clients": 64,
        "seconds": 2.0,
        "failed": 0,
        "wrong": 0,
        "stuck": 0,
        "p50": 0.01,
        "p99": 0.02,
        "longest": 0.03,
        "cpu": 1.0,
        "own_cpu": 0.1,
        "connections": 10,
        "memory": 51200,
        **values,
    }
    return results.Sample(number, stack, answered=answered, **given)


@pytest.fixture
def run() -> results.Run:
    """Make a small result: ours answers three times as much as stock, and fails a little."""
    samples = [
        *(sample("stock", number, 1000 + 100 * number) for number in range(3)),
        *(sample("pgbackend", number, 3000 + 300 * number, failed=30) for number in range(3)),
        *(sample("wsgi", number, 9000, cpu=0.5) for number in range(3)),
        sample("stock", 0, 0, clients=1, p50=0, p99=0),
        sample("pgbackend", 0, 10, clients=1),
        sample("asyncpg", 0, 10, endpoint="stream", clients=1),
    ]
    parked = results.Parked("pgbackend", 100, 100, 100, 0, 0, 1.5, 10, 1000, 1200, 6000)
    options = {"warm": 0.5, "seconds": 2.0, "patience": 45.0}
    stock, green = {"median": 100.0, "ratio": 1.0}, {"median": 115.0, "ratio": 1.2}
    cost = {"get(pk)": {"stock sync": stock, "green": green}}
    machine, versions = {"cores": "2"}, {"Django": "6.1"}
    described = ("python -m benchmarks.web", "2026-01-01 00:00 UTC", machine, versions)
    return results.Run(
        *described, database.SETTINGS, options, samples, [parked], cost, seconds=60.0
    )


def test_a_figure_is_the_median_and_its_ratio_is_to_the_same_round(run: results.Run) -> None:
    found = figures.Figures(run)
    rate = found.figure(figures.RATE, "pgbackend", "one", 64)
    assert rate is not None
    assert rate.values == (1500, 1650, 1800)
    assert (rate.median, rate.ratio) == (1650, 3.0)
    assert rate.spread == pytest.approx(150 / 1650)
    assert found.figure(figures.CPU, "stock", "one", 1) is None, "it answered nothing"
    assert found.failures("pgbackend", "one", 64) == pytest.approx(90 / 9990)


def test_the_page_tells_of_wrong_answers(run: results.Run, tmp_path: Path) -> None:
    report.write(run, tmp_path)
    assert "Wrong answers" not in (tmp_path / "benchmarks.md").read_text()
    run.samples[3].wrong = 7
    report.write(run, tmp_path)
    told = "**Wrong answers: 7 of pgbackend, QuerySets (`one`, 64 clients).**"
    assert told in (tmp_path / "benchmarks.md").read_text()


def test_the_page_tells_what_is_won_and_what_is_lost(run: results.Run, tmp_path: Path) -> None:
    report.write(run, tmp_path)
    page = (tmp_path / "benchmarks.md").read_text()
    assert "| **pgbackend, QuerySets** | 5 | 1,650 ±9% · 3.00×, **1% failed** |" in page
    assert "| Django, a-methods, pool | 2 / 0 / 0 |" in page
    lost = "| pgbackend, QuerySets | `one` | rate | 64 | 2.73× | 64 | 1,650 | 4,500 |"
    assert f"{lost} Django, WSGI, pool |" in page
    assert "50" in page.partition("## Requests in flight")[2].splitlines()[6]
    assert "115 (1.20×)" in page
    assert "it has no `aiterator()`" not in page, "of a stack that took no part"
    for link in re.findall(r"\]\(([^)]+)\)", page):
        assert (tmp_path / link).exists()


def test_the_plots_are_images_for_light_and_dark_pages(run: results.Run, tmp_path: Path) -> None:
    pictures = [path for path in report.write(run, tmp_path) if path.suffix == ".svg"]
    assert len(pictures) == 4
    for path in pictures:
        root = ET.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        text = path.read_text()
        assert "prefers-color-scheme:dark" in text
        assert "nan" not in text
        assert {"pgbackend, QuerySets", "one"} <= {
            part.text for part in root.iter("{http://www.w3.org/2000/svg}text")
        }


def test_a_run_is_kept_as_it_is(run: results.Run, tmp_path: Path) -> None:
    run.save(tmp_path / "run.json")
    assert results.Run.load(tmp_path / "run.json") == run
    assert json.loads((tmp_path / "run.json").read_text())["samples"][0]["stack"] == "stock"
