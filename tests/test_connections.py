"""Tests that benchmarks/connections measures and models what docs/scale-out.md says of it."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from django.db import connections

from benchmarks.connections import advise, load, report, results
from benchmarks.connections.model import Demands, connections_needed, predict
from benchmarks.connections.plan import CURVES, WORKS, Calibration
from pgbackend.metrics import Leased, Released
from tests.conftest import Runner

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

# --- The model, beside closed forms and chains that are solved otherwise ------------------------


def birth_and_death(demands: Demands, requests: int, servers: int) -> tuple[float, float]:
    """Return the rate and the connections in use, by the chain's balance from state to state."""
    weights = [1.0]
    for busy in range(1, requests + 1):
        arriving = (requests - busy + 1) / demands.elsewhere
        weights.append(weights[-1] * arriving / (min(busy, servers) / demands.held))
    in_use = sum(min(n, servers) * w for n, w in enumerate(weights)) / sum(weights)
    return in_use / demands.held, in_use


@pytest.mark.parametrize("requests", [1, 2, 16, 64, 200])
@pytest.mark.parametrize("servers", [1, 2, 10, 24])
def test_the_machine_repairman_with_servers(requests: int, servers: int) -> None:
    demands = Demands(elsewhere=0.4, held=0.04)
    rate, in_use = birth_and_death(demands, requests, servers)
    found = predict(demands, requests, servers)
    assert (found.rate, found.in_use) == pytest.approx((rate, in_use), rel=1e-9)
    assert found.cycle == pytest.approx(requests / rate)
    assert found.queued == pytest.approx(max(0.0, requests / rate - 0.44), abs=1e-9)


def test_one_server_and_many_sources_are_an_open_queue() -> None:
    """M/M/1 at a load of one half: on average one request is there, and half a one waits."""
    requests, rate, held = 5_000, 10.0, 0.05
    found = predict(Demands(elsewhere=requests / rate, held=held), requests, 1)
    assert found.in_use == pytest.approx(0.5, rel=0.01)
    assert found.queued == pytest.approx(held, rel=0.02)


def chain_with_cpu(demands: Demands, requests: int, servers: int) -> float:
    """Return the rate of a chain of the pool and the event loop, by stepping it to its balance."""
    states = [(a, b) for a in range(requests + 1) for b in range(requests + 1 - a)]
    shares = dict.fromkeys(states, 1 / len(states))
    step = 0.5 / (requests / demands.elsewhere + servers / demands.held + 1 / demands.cpu)
    for _ in range(1_500):
        moved = dict(shares)
        for (pool, cpu), share in shares.items():
            for to, rate in (
                ((pool + 1, cpu), (requests - pool - cpu) / demands.elsewhere),
                ((pool - 1, cpu + 1), min(pool, servers) / demands.held),
                ((pool, cpu - 1), (cpu > 0) / demands.cpu),
            ):
                if rate:
                    moved[pool, cpu] -= share * rate * step
                    moved[to] += share * rate * step
        shares = moved
    return sum(share for (_, cpu), share in shares.items() if cpu) / demands.cpu


@pytest.mark.parametrize("servers", [1, 3])
def test_the_event_loop_is_one_more_server(servers: int) -> None:
    demands = Demands(elsewhere=0.5, held=0.3, cpu=0.2)
    expected = chain_with_cpu(demands, 6, servers)
    assert predict(demands, 6, servers).rate == pytest.approx(expected, rel=1e-6)


def test_ten_thousand_requests_are_bounded_by_the_pool_or_by_the_event_loop() -> None:
    by_pool = predict(Demands(0.4, 0.04), 10_000, 10)
    assert (by_pool.rate, by_pool.in_use) == pytest.approx((250, 10))
    by_loop = predict(Demands(0.05, 0.004, cpu=0.0005), 10_000, 64)
    assert by_loop.rate == pytest.approx(2_000)
    assert by_loop.in_use == 64, "statements that wait for the event loop keep their connections"


def test_without_a_bound_nothing_queues() -> None:
    found = predict(Demands(20, 0.04), 10_000, None)
    assert found.rate == pytest.approx(10_000 / 20.04)
    assert found.in_use == pytest.approx(10_000 * 0.04 / 20.04)
    assert found.queued == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("requests", [1, 7, 200])
def test_the_recommended_pool_is_the_least_that_is_enough(requests: int) -> None:
    demands = Demands(0.1, 0.02, cpu=0.0001)
    size, free = connections_needed(demands, requests), predict(demands, requests, None)
    assert predict(demands, requests, size).cycle <= free.cycle * 1.01
    assert size == 1 or predict(demands, requests, size - 1).cycle > free.cycle * 1.01


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({"elsewhere": 0, "held": 1}, "elsewhere must be more than 0 s"),
        ({"elsewhere": 1, "held": -1}, "held must be more than 0 s, not -1"),
        ({"elsewhere": 1, "held": 1, "cpu": -1}, "cpu must not be less than 0 s"),
        ({"elsewhere": 1, "held": 1, "cpu_held": 2}, "cpu_held must be a share"),
    ],
)
def test_bad_demands_are_told(values: dict[str, float], cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        Demands(**values)


def test_the_command_advises(capsys: pytest.CaptureFixture[str]) -> None:
    advise.main(
        [
            *("--statements", "3", "--statement-ms", "4", "--elsewhere-ms", "50"),
            *("--requests", "200", "--processes", "4"),
        ]
    )
    told = capsys.readouterr().out
    size = connections_needed(Demands(0.05 / 3, 0.004), 200)
    assert f'"max_size" of each pool:         {size}\n' in told
    assert f"connections of all processes:    {4 * size} " in told
    assert "not counted" in told


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ("--statement-ms 0 --elsewhere-ms 50 --rate 10", "held must be more than 0 s"),
        ("--statement-ms 4 --elsewhere-ms 50 --requests 0", "at least one request"),
        ("--statement-ms 4 --elsewhere-ms 50 --requests 9 --statements 0", "at least 1, not 0"),
        ("--statement-ms 4 --elsewhere-ms 50 --requests 9 --processes -1", "at least 1, not -1"),
    ],
)
def test_the_command_tells_bad_input(arguments: str, cause: str) -> None:
    with pytest.raises(SystemExit, match=cause):
        advise.main(arguments.split())


def test_the_command_tells_that_the_event_loop_is_the_bound(
    capsys: pytest.CaptureFixture[str],
) -> None:
    advise.main(
        ["--statement-ms", "4", "--elsewhere-ms", "50", "--requests", "99", "--cpu-ms", "5"]
    )
    assert "the event loop is busy for 100% of the time: more processes help" in (
        capsys.readouterr().out
    )


def test_a_rate_is_turned_into_requests_in_flight(capsys: pytest.CaptureFixture[str]) -> None:
    advise.main(["--statement-ms", "10", "--elsewhere-ms", "90", "--rate", "200"])
    assert "requests in flight in a process: 20\n" in capsys.readouterr().out


# --- The measurement ----------------------------------------------------------------------------


def test_times_are_spread_as_an_exponential_distribution_and_have_its_mean() -> None:
    cards = load.deck(64)
    assert sum(cards) / 64 == pytest.approx(1)
    assert sum(card**2 for card in cards) / 64 == pytest.approx(2, rel=0.1)
    assert load.deck(1) == [1.0]
    dealt = load.dealt(cards, random.Random(1))
    for _ in range(3):
        assert sorted(itertools.islice(dealt, 64)) == sorted(cards)


def test_the_gauge_integrates_the_connections_in_use() -> None:
    now = [0.0]
    gauge = load.Gauge("default", lambda: now[0])
    gauge.begin()
    for at, event in (
        (1.0, Leased("default", 1, waited=0.5)),
        (2.0, Leased("default", 2, waited=0.0)),
        (2.5, Leased("another", 3, waited=9.0)),
        (4.0, Released("default", 1, held=3.0, discarded=False)),
        (5.0, Released("default", 2, held=3.0, discarded=False)),
    ):
        now[0] = at
        gauge(event)
    now[0] = 10.0
    gauge.end()
    assert (gauge.area, gauge.held, gauge.waited) == (6.0, 6.0, 0.5)
    assert (gauge.peak, gauge.now, gauge.leases) == (2, 0, 2)
    gauge.begin()
    assert (gauge.area, gauge.peak) == (0, 0)


def asleep(alias: str, number: int) -> None:
    with connections[alias].cursor() as cursor:
        cursor.execute("SELECT pg_sleep(0.01)")


def measured(run: Runner, requests: int, elsewhere: float) -> load.Measured:
    work = load.Work("test", "", 2, elsewhere, 0.01, 4, 0)
    return run(load.Flight(work, requests, "default", asleep).measure(0.1, 0.3))


@pytest.mark.django_db(transaction=True)
def test_one_request_in_flight_uses_one_connection(run_once: Runner) -> None:
    found = measured(run_once, 1, 0.02)
    assert (found.peak, found.statements % 4) == (1, 0)
    assert found.held >= 0.01
    assert found.cycle >= 0.03
    assert found.rate * found.cycle == pytest.approx(1, rel=1e-6), "one at a time"
    assert 0 < found.in_use < 1


@pytest.mark.django_db(transaction=True)
def test_more_requests_than_connections_wait(run_once: Runner) -> None:
    found = measured(run_once, 9, 0)
    assert 0 < found.in_use <= found.peak <= 4, "the pool of the tests has four connections"
    assert found.rate <= 4 / 0.01
    assert found.wait > 0
    assert found.cycle > 0.01


def test_a_failure_ends_the_measurement(run_once: Runner) -> None:
    def failing(alias: str, number: int) -> None:
        if next(turns):
            raise ZeroDivisionError

    turns = itertools.count()  # the first statement opens the pool
    work = load.Work("test", "", 1, 0.0, 0.01, 1, 0)
    with pytest.raises(ZeroDivisionError):
        run_once(load.Flight(work, 3, "default", failing).measure(0, 60))


@pytest.mark.slow
def test_the_quick_form_measures_beside_the_model(conninfo: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.connections", "--quick", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    calibration, *points = map(json.loads, done.stdout.splitlines())
    assert Calibration(**calibration["calibration"]).cpu > 0
    assert [point["requests"] for point in points] == [1, 16]
    for point in points:
        found = point["measured"]
        assert found["peak"] <= min(point["requests"], point["pool"])
        assert found["held"] >= 0.004 * 0.9, "the server sleeps for 4 ms on average"
        assert found["rate"] <= point["requests"] / 0.05
        assert point["predicted"]["rate"] > 0


# --- The page -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_of_the_page() -> results.Run:
    return results.Run.load()


def test_no_figure_of_the_page_was_typed(run_of_the_page: results.Run, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(DOCS / report.PAGE, tmp_path)
    for written in report.write(run_of_the_page, tmp_path):
        assert written.read_text() == (DOCS / written.relative_to(tmp_path)).read_text()


def test_a_page_without_the_place_for_a_table_is_told(
    run_of_the_page: results.Run, tmp_path: Path
) -> None:
    (tmp_path / report.PAGE).write_text("nothing")
    with pytest.raises(ValueError, match="has no place for the table"):
        report.write(run_of_the_page, tmp_path)


def test_the_model_is_close_to_what_was_measured(run_of_the_page: results.Run) -> None:
    points = {
        (curve, point.requests): point
        for curve in CURVES
        for point in run_of_the_page.points(curve)
    }
    assert {requests for _, requests in points} == {1, 16, 64, 256, 2_000, 10_000}
    assert not {at: point.ratios for at, point in points.items() if not point.close}


def test_predictions_come_from_the_calibration_of_their_round(run_of_the_page: results.Run) -> None:
    for first, *points in run_of_the_page.rounds:
        calibration = Calibration(**first["calibration"])
        for point in points:
            if point["requests"] <= 256:
                demands = calibration.demands(WORKS[point["work"]])
                found = predict(demands, point["requests"], point["pool"])
                assert math.isclose(found.rate, point["predicted"]["rate"], rel_tol=1e-9)
