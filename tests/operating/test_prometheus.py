"""Tests what Prometheus scrapes: of one process, and of several that share a directory."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from django.db import connection, transaction
from django.http import HttpRequest
from django.test import AsyncClient, Client, override_settings
from django.urls import path
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse

from pgbackend.contrib import prometheus, snapshots
from pgbackend.contrib.snapshots import Snapshots
from pgbackend.driver import events, loops
from pgbackend.driver.tallies import async_tallies, sync_tallies
from pgbackend.totals import Totals
from tests.conftest import Runner, wait_for
from tests.library.models import Tag
from tests.operating.projects import Project
from tests.support.fixtures import pool_of_default, settings_of_default
from tests.support.ports import free_port

DOCS = Path(__file__).parents[2] / "docs"
urlpatterns = [path("metrics", prometheus.metrics)]
here = override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=[])

Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(autouse=True)
def one_process(fresh_tables: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Begin with nothing counted, and register nothing for the tests that follow."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    for each in (async_tallies, sync_tallies):
        each.forget()
    yield
    prometheus.unregister()
    assert events.listeners == []


def values(text: str, parsed: Callable[[str], Any] = parse) -> Values:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parsed(text)
        for sample in family.samples
    }


def value(found: Values, name: str, kind: str = "async", **labels: str) -> float | None:
    every = {"alias": "default", "kind": kind, **labels}
    return found.get((name, frozenset(every.items())))


def scrape() -> Values:
    response = prometheus.metrics(HttpRequest())
    assert response.status_code == 200
    return values(response.content.decode())


# --- One process ----------------------------------------------------------------------------------


def test_a_scrape_shows_the_pools(run_once: Runner) -> None:
    prometheus.register()

    async def main() -> Values:
        await asyncio.gather(*(Tag.objects.acount() for _ in range(3)))
        async with transaction.atomic():
            await Tag.objects.acount()
            return scrape()

    found = run_once(main())
    assert value(found, "pgbackend_pool_connections", state="used") == 1
    assert value(found, "pgbackend_pool_max_connections") == 4
    assert value(found, "pgbackend_pool_requests_total") == 4
    assert value(found, "pgbackend_pool_timeouts_total") == 0
    assert value(found, "pgbackend_pool_wait_seconds_count") == 4
    assert value(found, "pgbackend_pool_use_seconds_bucket", le="+Inf") == 3
    assert found["pgbackend_processes", frozenset()] == 1
    gone = scrape()
    assert value(gone, "pgbackend_pool_connections", state="used") == 0
    assert value(gone, "pgbackend_pool_requests_total") == 4


@here
def test_the_view_negotiates_the_format() -> None:
    plain = Client().get("/metrics")
    assert plain["Content-Type"].startswith("text/plain; version=")
    accept = "application/openmetrics-text; version=1.0.0; charset=utf-8"
    opened = Client().get("/metrics", headers={"Accept": accept})
    assert opened["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    names = [{name for name, _ in values(plain.content.decode())}]
    names.append({name for name, _ in values(opened.content.decode(), parse_openmetrics)})
    mine = [{name for name in each if name.startswith("pgbackend")} for each in names]
    assert mine[0] == mine[1] != set()


@here
def test_the_view_takes_no_connection_in_either_chain(run_once: Runner) -> None:
    """A scrape is answered while all connections are lent, also with `ATOMIC_REQUESTS`."""

    async def main() -> None:
        async with transaction.atomic():
            await Tag.objects.acount()
            before = async_tallies.sums()["default"].stats["requests_num"]
            response = await AsyncClient().get("/metrics")
            assert value(values(response.content.decode()), "pgbackend_pool_requests_total") == 1
            assert async_tallies.sums()["default"].stats["requests_num"] == before == 1

    with pool_of_default(min_size=1, max_size=1), settings_of_default(ATOMIC_REQUESTS=True):
        run_once(main())
        connection.close()
        assert Client().get("/metrics").status_code == 200
        assert connection.connection is None


def test_a_registry_gets_one_collector_and_keeps_what_it_has() -> None:
    registry = CollectorRegistry()
    counter = Counter("orders", "Orders", registry=registry)
    assert prometheus.register(registry) is prometheus.register(registry)
    counter.inc()
    assert registry.get_sample_value("orders_total") == 1
    assert len(events.listeners) == 1
    prometheus.unregister(registry)
    prometheus.unregister(registry)
    assert {each.name for each in registry.collect()} == {"orders"}


def test_without_the_package_the_error_says_the_cure() -> None:
    for module, package in (
        ("prometheus", "prometheus_client"),
        ("opentelemetry", "opentelemetry"),
    ):
        code = (
            f"import sys; sys.modules[{package!r}] = None\n"
            f"try: import pgbackend.contrib.{module}\n"
            "except ImportError as exc: print(exc)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert f"pip install 'pgbackend[{module}]'" in done.stdout, done.stderr


# --- Several processes ----------------------------------------------------------------------------


def record(requests: int, used: int) -> Totals:
    made = Totals("default", "async", used=used, max_size=4, counters={"requests": requests})
    made.waited.add(0.2)
    return made


def test_snapshots_are_summed_and_the_ended_leave_their_counts(tmp_path: Path) -> None:
    one, other = (Snapshots(tmp_path, lambda n=n: [record(n, n)]) for n in (3, 4))  # type: ignore[misc]
    one.start()
    other.start()
    ((found,), processes) = one.read()
    assert (found.counters["requests"], found.used, found.max_size, processes) == (7, 7, 8, 2)
    assert sum(found.waited.counts) == 2
    other.stop()
    for _ in range(2):
        ((found,), processes) = one.read()
        assert (found.counters["requests"], found.used, found.max_size, processes) == (7, 3, 4, 1)
        assert sum(found.waited.counts) == 2
    one.stop()
    third = Snapshots(tmp_path, lambda: [record(1, 1)])
    third.start()
    ((found,), processes) = third.read()
    assert (found.counters["requests"], found.used, processes) == (8, 1, 1)
    third.stop()


def test_a_reader_that_ends_in_the_midst_counts_nobody_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (Snapshots(tmp_path, lambda: [record(1, 1)]) for _ in range(2))
    one.start()
    other.start()
    other.stop()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", _broken)
        with pytest.raises(KeyboardInterrupt):
            one.read()
    for _ in range(2):
        ((found,), _) = one.read()
        assert found.counters["requests"] == 2
    one.stop()


def _broken(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_amid_a_scrape_locks_nobody_out(tmp_path: Path) -> None:
    """The child inherits the descriptor of the scrape, and with it the lock."""
    scraping, forked = threading.Event(), threading.Event()

    def held() -> None:
        with snapshots._locked(tmp_path / snapshots._READERS):
            scraping.set()
            forked.wait(10)

    one = Snapshots(tmp_path, lambda: [record(1, 1)])
    one.start()
    scrape = threading.Thread(target=held)
    scrape.start()
    scraping.wait(10)
    if (child := os.fork()) == 0:
        os._exit(0)
    forked.set()
    scrape.join()
    try:
        wait_for(lambda: os.waitpid(child, os.WNOHANG) == (child, 0), "the child goes on")
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    finally:
        one.stop()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_that_cannot_leave_its_numbers_forgets_the_parents_pools(
    run_once: Runner, tmp_path: Path
) -> None:
    async def main() -> None:
        await Tag.objects.acount()
        one = Snapshots(tmp_path / "gone", lambda: [record(1, 1)])
        one.folder.mkdir()
        one.start()
        with one._writing:
            shutil.rmtree(one.folder)
            if (child := os.fork()) == 0:
                os._exit(len(loops.open_pools()))
        one.folder.mkdir()
        one.stop()
        assert await asyncio.to_thread(os.waitpid, child, 0) == (child, 0)

    run_once(main())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root changes its user")
def test_a_process_that_has_changed_its_user_shows_and_folds_the_others() -> None:
    """A server may load the project as root, and let its workers run as another user."""
    nobody = 65534
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, nobody, nobody)
        one, other = (Snapshots(Path(folder), lambda: [record(1, 1)]) for _ in range(2))
        one.start()
        other.start()
        other.stop()
        os.seteuid(nobody)
        try:
            ((found,), processes) = one.read()
        finally:
            os.seteuid(0)
            one.stop()
        assert (found.counters["requests"], processes) == (2, 1)


def test_a_directory_that_is_missing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="make it before the server starts"):
        prometheus.register()


VIEWS = """
import os
from django.contrib.contenttypes.models import ContentType
from django.http import HttpResponse
from django.urls import path
from pgbackend.contrib import prometheus

async def work(request):
    await ContentType.objects.acount()
    return HttpResponse(str(os.getpid()))

urlpatterns = [path("work", work), path("metrics", prometheus.metrics)]
"""

APPLICATION = """
import os
os.environ["DJANGO_SETTINGS_MODULE"] = "project_settings"
from django.core.asgi import get_asgi_application
from pgbackend.contrib import prometheus
application = get_asgi_application()
prometheus.register()
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Serve a project by uvicorn with two workers; yield its address and its process."""
    (home, shared) = (tmp_path / "home", tmp_path / "shared")
    home.mkdir()
    shared.mkdir()
    installed = ["pgbackend", "django.contrib.contenttypes"]
    project = Project(home, INSTALLED_APPS=installed)
    project.write("views", VIEWS)
    project.write("application", APPLICATION)
    port = free_port()
    program = project.program("-m", "uvicorn", "application:application")
    process = subprocess.Popen(
        [sys.executable, *program.arguments, "--workers=2", f"--port={port}"],
        cwd=home,
        env={**os.environ, **(program.environment or {}), "PROMETHEUS_MULTIPROC_DIR": str(shared)},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield f"http://127.0.0.1:{port}", process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_scrape_of_one_worker_shows_both(server: tuple[str, Any]) -> None:
    address, _ = server
    pids: set[str] = set()
    asked = 0

    def get(page: str) -> str | None:
        try:  # a connection for each request, so that each worker gets some
            answer = httpx.get(f"{address}/{page}", trust_env=False, timeout=20)
        except httpx.TransportError:  # the worker that was killed, or none yet
            return None
        assert answer.status_code == 200
        return answer.text

    def work() -> bool:
        nonlocal asked
        if (pid := get("work")) is not None:
            asked += 1
            pids.add(pid)
        return len(pids) >= 2

    def shown(name: str, **labels: str) -> float | None:
        return value(values(get("metrics") or ""), name, **labels)

    wait_for(work, "both workers have answered", seconds=60)
    wait_for(lambda: shown("pgbackend_pool_requests_total") == asked, "all requests are shown")
    assert shown("pgbackend_pool_connections", state="idle") == 2
    most = shown("pgbackend_pool_max_connections")
    assert most is not None
    os.kill(int(min(pids)), signal.SIGKILL)
    wait_for(lambda: shown("pgbackend_pool_connections", state="idle") == 1, "its gauges vanish")
    assert shown("pgbackend_pool_requests_total") == asked, "its counters stay"
    before = set(pids)
    wait_for(lambda: work() and len(pids - before) == 1, "uvicorn has replaced it", seconds=60)
    wait_for(lambda: shown("pgbackend_pool_requests_total") == asked, "all requests are shown")
    assert shown("pgbackend_pool_max_connections") == most


# --- The dashboard and the alerts -----------------------------------------------------------------


def names_of_a_scrape() -> set[str]:
    families = prometheus.families([Totals("default", "async", max_size=4, min_size=0)], 1)
    found = set()
    for family in families:
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
        found |= {f"{family.name}{each}" for each in suffixes.get(family.type, [""])}
    return found


def expressions(dashboard: Any) -> Iterator[str]:
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))


def test_the_dashboard_asks_for_metrics_that_exist(run_once: Runner) -> None:
    dashboard = json.loads((DOCS / "dashboards" / "pgbackend.json").read_text())
    prometheus.register()
    run_once(Tag.objects.acount())
    scraped = {name for name, _ in scrape() if name.startswith("pgbackend")}
    assert names_of_a_scrape() >= scraped
    rules = yaml.safe_load((DOCS / "dashboards" / "pgbackend-alerts.yml").read_text())
    alerts = [rule for group in rules["groups"] for rule in group["rules"]]
    asked = [*expressions(dashboard), *(rule["expr"] for rule in alerts)]
    named = {name for each in asked for name in re.findall(r"\bpgbackend_\w+", each)}
    assert named <= scraped
    assert len(named) >= 10
    for rule in alerts:
        assert {"alert", "expr", "for", "labels", "annotations"} == set(rule)
        assert {"summary", "description"} == set(rule["annotations"])


def test_each_panel_says_what_it_shows_and_in_which_unit() -> None:
    dashboard = json.loads((DOCS / "dashboards" / "pgbackend.json").read_text())
    places = [json.dumps(panel["gridPos"], sort_keys=True) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
    for panel in dashboard["panels"]:
        assert panel["title"] and panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]


def test_the_page_names_every_metric() -> None:
    page = (DOCS / "monitoring.md").read_text()
    families = prometheus.families([], 1)
    assert not {each.name for each in families if each.name not in page}
