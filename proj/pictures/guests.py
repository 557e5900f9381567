"""Plays the guests, who order by HTTP, and the staff, who move the orders on."""

import asyncio
import random
import re
from math import pi, sin

import httpx

from proj.pictures.desk import PASSWORD

NAMES = ["Ada", "Linus", "Grace", "Barbara", "Ken", "Margaret", "Edsger", "Radia"]


def client(desk):
    """Return an HTTP client of the desk: one for each guest, as each has a browser of their own.

    One client for all would look through all its connections at each order.
    """
    return httpx.AsyncClient(base_url=desk.address, timeout=60, trust_env=False, verify=False)  # noqa: S501


class Guests:
    """Sends orders, each by one HTTP request, and counts the answers."""

    def __init__(self, desk, seed=7):
        self._desk = desk
        self._random = random.Random(seed)  # noqa: S311 - no secret
        self._dishes = []
        self.sent = self.promised = self.failed = 0

    async def read_menu(self):
        async with client(self._desk) as http:
            menu = (await http.get("/api/menu/")).json()
        self._dishes = [dish["id"] for dish in menu["dishes"]]

    async def order(self, guest=None):
        """Order one to three dishes; the answer comes when the kitchen has promised a time."""
        self.sent += 1
        chosen = self._random.sample(self._dishes, self._random.randint(1, 3))
        lines = [{"dish": dish, "quantity": self._random.randint(1, 2)} for dish in chosen]
        body = {"table": guest or self._guest(), "lines": lines}
        try:
            async with client(self._desk) as http:
                answer = await http.post("/api/orders/", json=body)
            promised = answer.raise_for_status().json()["promised_minutes"] is not None
        except httpx.HTTPError:
            promised = False
        self.promised += promised
        self.failed += not promised

    async def rush(self, seconds, rate):
        """Send guests for some seconds: few at first, ``rate`` a second at the height."""
        loop = asyncio.get_running_loop()
        begin, due = loop.time(), 0.0
        async with asyncio.TaskGroup() as group:
            while (now := loop.time() - begin) < seconds:
                # As many as are due by now; the last turn may have taken longer than it should.
                due += rate * sin(pi * now / seconds) ** 2 * 0.02
                for _ in range(int(due)):
                    group.create_task(self.order())
                due -= int(due)
                await asyncio.sleep(0.02)

    def _guest(self):
        if self._random.random() < 0.3:
            return self._random.choice(NAMES)
        return str(self._random.randint(1, 60))


class Staff:
    """Signs in as the chef, and moves the oldest orders of the board on, as a click would."""

    def __init__(self, http):
        self._http = http

    async def sign_in(self):
        await self._http.get("/sign-in/")
        data = {"username": "chef", "password": PASSWORD, **self._token()}
        answer = await self._http.post("/sign-in/", data=data)
        answer.raise_for_status() if answer.status_code != 302 else None

    async def waiting(self):
        """Return the (id, status) pairs of the open orders on the board, oldest first."""
        page = (await self._http.get("/board/columns/")).text
        found = re.findall(r'id="order-(\d+)" data-version="(\w+) ', page)
        return [(int(pk), status) for pk, status in found if status != "served"]

    async def move(self, pk, status):
        await self._http.post(
            f"/board/orders/{pk}/move/",
            data={"seen": status, **self._token()},
            headers={"Accept": "application/json"},
        )

    async def clear(self):
        """Serve everything that is on the board."""
        await self._http.post("/board/clear/", data=self._token())

    async def work(self, pause, moves=2):
        """Move some orders of each status on, and again after each pause, until cancelled."""
        while True:
            for wanted in ("ready", "cooking", "accepted"):
                for pk, _ in [o for o in await self.waiting() if o[1] == wanted][:moves]:
                    await self.move(pk, wanted)
            await asyncio.sleep(pause)

    def _token(self):
        return {"csrfmiddlewaretoken": self._http.cookies["csrftoken"]}
