"""Lists the requests that each stack is asked for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Endpoint:
    """Describes an address with a number in it, which goes through the keys from 1."""

    name: str
    title: str
    keys: int
    method: str = "GET"
    most_clients: int | None = None
    """With more of them nothing is learned: an answer only takes the longer, in every stack."""

    def request(self, key: int) -> str:
        """Return the request for one key, as bytes on the wire will have it."""
        length = "content-length: 0\r\n" if self.method == "POST" else ""
        return (
            f"{self.method} /{self.name}/{key} HTTP/1.1\r\n"
            f"host: 127.0.0.1\r\naccept: */*\r\n{length}\r\n"
        )


_ALL = (
    Endpoint("one", "one row by its key", 9000),
    Endpoint("ten", "ten rows by their keys, one after the other", 9000, most_clients=256),
    Endpoint("list", "a list of 100 rows", 9000, most_clients=256),
    Endpoint("update", "an update", 10000, "POST", most_clients=256),
    Endpoint("insert", "an insert in atomic()", 10000, "POST", most_clients=256),
    Endpoint(
        "page",
        "a page: 20 books, their authors (joined), 100 reviews (prefetched)",
        900,
        most_clients=256,
    ),
    Endpoint("wait50", "a query, 50 ms of waiting, a query", 9000, most_clients=256),
    Endpoint("wait200", "a query, 200 ms of waiting, a query", 9000),
    Endpoint("stream", "10,000 rows through a server-side cursor", 1, most_clients=64),
)
ENDPOINTS = {endpoint.name: endpoint for endpoint in _ALL}
#: Requests for it are answered only when the gate is opened; see `Bench.park()`.
PARK = Endpoint("park", "a query, a wait until all are parked, a query", 9000)
