"""Tests that orders are taken while the cluster fails in parts: none lost, wrong, or twice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from proj.cluster import rest
from tests.scaleout.conftest import FIGURES, Site
from tests.scaleout.guests import Guests, in_order
from tests.scaleout.watch import Watch, watching

pytestmark = pytest.mark.scaleout

#: Guests at each desk, and the seconds within which an order is taken after a promotion.
GUESTS, SECONDS = 3, 2.0

Incident = Callable[[], Awaitable[None]]


class Scene:
    """Guests who order while something happens, and what they and the members' watches saw."""

    def __init__(self, site: Site, config: pytest.Config, orders: int) -> None:
        self.site = site
        self.config = config
        self.orders = orders
        self.guests = Guests(site.addresses, site.dishes, GUESTS)
        self.watches: dict[str, Watch] = {}
        self.began = 0.0

    def play(self, name: str, incident: Incident, *, promotes: bool = False) -> None:
        """Let the guests order, before, during and after the incident; check all orders."""
        self.site.wait_until_whole()
        with watching(self.site.layout) as self.watches:
            asyncio.run(self._play(incident))
        promoted = self._promoted() if promotes else None
        self._note(name, promoted)
        self._check_orders()
        if promotes:
            assert promoted is not None, "no member was promoted"
            self._check_first(promoted)

    async def _play(self, incident: Incident) -> None:
        async with self.guests.ordering():
            await self.guests.have_placed(self.orders)
            self.began = time.monotonic()
            await incident()
            await self.guests.have_placed(self.orders)

    def _promoted(self) -> float | None:
        times = [watch.promoted_after(self.began) for watch in self.watches.values()]
        return min((when for when in times if when is not None), default=None)

    def _check_first(self, promoted: float) -> None:
        log = self.guests.log
        first = {way: log.first_after(way, promoted) for way in self.site.addresses}
        late = {way: after for way, after in first.items() if after is None or after > SECONDS}
        assert not late, f"first orders this long after the promotion: {late}"

    def _check_orders(self) -> None:
        """Compare what the guests know with what the primary has."""
        query = """
            SELECT k.key, (k.answer->>'id')::bigint, o.note,
                   array_agg(l.dish_id ORDER BY l.id), array_agg(l.quantity ORDER BY l.id)
            FROM keys_key k LEFT JOIN kitchen_order o ON o.id = (k.answer->>'id')::bigint
            LEFT JOIN kitchen_orderline l ON l.order_id = o.id GROUP BY 1, 2, 3
        """
        with self.site.primary() as primary:
            rows = {row[0]: row[1:] for row in primary.execute(query)}
            twice = primary.execute(
                "SELECT note, count(*) FROM kitchen_order WHERE note <> '' GROUP BY 1"
                " HAVING count(*) > 1 OR note NOT IN (SELECT key FROM keys_key)"
            ).fetchall()
        placed = self.guests.log.placed
        lost = [each.key for each in placed if each.key not in rows]
        assert not lost, f"{len(lost)} acknowledged orders are lost"
        wrong = [each.key for each in placed if not _is_right(each, rows[each.key])]
        assert not wrong, f"{len(wrong)} orders are not what was ordered"
        stale = self.guests.log.stale
        assert not stale, (
            f"{len(stale)} orders were not seen by those who had placed them: {stale[:5]}"
        )
        assert not twice, f"orders that were placed twice: {twice}"

    def _note(self, scene: str, promoted: float | None) -> None:
        log = self.guests.log
        for way in self.site.addresses:
            first = None if promoted is None else log.first_after(way, promoted)
            self.config.stash[FIGURES].append(
                (
                    scene,
                    way,
                    str(len(log.of(way))),
                    str(log.failed(way)),
                    f"{log.longest(way):.2f} s",
                    "" if promoted is None else f"{promoted - self.began:.2f} s",
                    "" if first is None else f"{first:.2f} s",
                    log.places(way),
                )
            )


def _is_right(placed: Any, row: Any) -> bool:
    order, note, dishes, quantities = row
    found = sorted(zip(dishes, quantities, strict=True))
    return order == placed.answer["id"] and note == placed.key and in_order(placed.lines) == found


@pytest.fixture
def scene(site: Site, pytestconfig: pytest.Config, is_long: bool) -> Scene:
    return Scene(site, pytestconfig, orders=60 if is_long else 12)


def test_a_planned_switchover(scene: Scene) -> None:
    async def switch_over() -> None:
        await asyncio.to_thread(rest.switch_over, scene.site.layout)

    scene.play("switchover", switch_over, promotes=True)


def test_the_primary_is_killed(scene: Scene) -> None:
    killed = rest.leader(scene.site.layout).name

    async def kill() -> None:
        await asyncio.to_thread(scene.site.order, "kill", name=killed)
        await scene.guests.have_placed(1)

    scene.play("primary killed", kill, promotes=True)
    scene.site.order("start", name=killed)
    scene.site.wait_until_whole()


@pytest.mark.parametrize("role", ["sync_standby", "replica"])
def test_a_standby_is_lost_and_comes_back(scene: Scene, role: str) -> None:
    lost = scene.site.wait_until_whole()[role]

    async def lose() -> None:
        await asyncio.to_thread(scene.site.order, "kill", name=lost)
        await scene.guests.have_placed(scene.orders)
        await asyncio.to_thread(scene.site.order, "start", name=lost)
        await asyncio.to_thread(scene.site.wait_until_whole)

    scene.play(f"{role} lost", lose)


def test_a_standby_is_late(scene: Scene) -> None:
    """Guests see what they have ordered, and are read from the members all the same."""
    late = scene.site.wait_until_whole()["replica"]

    async def order_on() -> None:
        await scene.guests.have_placed(scene.orders)

    with scene.site.late(late):
        scene.play("replica late", order_on)
    reads = scene.guests.log.read
    assert sum(number for (_, place), number in reads.items() if place == "member") > 0


def test_pgbouncer_is_restarted(scene: Scene) -> None:
    async def restart() -> None:
        await asyncio.to_thread(scene.site.order, "restart_pgbouncer")

    scene.play("pgbouncer restarted", restart)


def test_haproxy_is_moved(scene: Scene) -> None:
    async def move() -> None:
        await asyncio.to_thread(scene.site.order, "move_haproxy")

    scene.play("haproxy moved", move)
