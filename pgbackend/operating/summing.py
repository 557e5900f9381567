"""Adds up the connections of all processes, and compares them with the servers' limits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from django.db import connections

from . import connecting, failures, poolers, server, sums, texts
from .findings import ERROR, Finding, has_error


@dataclass(frozen=True)
class Result:
    """The connections that may be opened, by alias, and the findings about them."""

    load: sums.Load
    sums: list[sums.Sum]
    findings: list[Finding]

    def is_well(self) -> bool:
        """Return whether nothing is an error."""
        return not has_error(self.findings)

    def for_json(self) -> dict[str, Any]:
        """Return all of it as dictionaries and lists."""
        by_alias = [{**asdict(each), "total": each.total} for each in self.sums]
        return {**asdict(self), "sums": by_alias, "ok": self.is_well()}

    def lines(self) -> Iterator[str]:
        """Yield all of it as text."""
        load = self.load
        yield (
            f"{load.processes} processes, each with {load.loops} event loops and {load.threads} "
            "threads of sync code"
        )
        yield ""
        yield from texts.of_sums(self.sums, load.processes)
        yield ""
        for finding in self.findings:
            yield from texts.of_finding(finding)


def added_up(names: Iterable[str], load: sums.Load) -> Result:
    """Return the sums of the aliases `names`, compared with the limits of their servers."""
    wrong = {name: _problems(name) for name in names}
    findings = [finding for problems in wrong.values() for finding in problems]
    sound = [name for name, problems in wrong.items() if not problems]
    by_alias = [sums.of_process(name, load) for name in sound]
    servers: dict[str, server.Server] = {}
    pooled = []
    for name in sound:
        try:
            with connecting.connected(name) as wrapper:
                servers[name] = server.ask(wrapper)
                if poolers.kind_of(name, wrapper) != poolers.NONE:
                    pooled.append(name)
        except Exception as exc:
            findings.append(failures.explained(name, connections.settings[name], exc))
    findings += sums.compared(by_alias, load, servers, pooled)
    return Result(load, by_alias, findings)


def _problems(name: str) -> list[Finding]:
    wrapper: Any = connections[name]
    return [Finding(ERROR, each.text, each.hint) for each in wrapper.option_problems()]
