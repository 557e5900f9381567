"""The command `manage.py pgbackend`: docs/operating.md tells what it prints."""

from __future__ import annotations

import json
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from pgbackend.operating import checking, directory, processes, shortcuts, summing, texts
from pgbackend.operating.connecting import is_on_a_loop
from pgbackend.operating.sums import Load, own_aliases


class Command(BaseCommand):
    help = "Tells how pgbackend's connections are set up, and what running processes do with them."
    #: `check` reports what the system checks find, instead of being kept from running by it.
    requires_system_checks = ()
    stealth_options = ("what",)

    def add_arguments(self, parser: ArgumentParser) -> None:
        commands = parser.add_subparsers(dest="what", metavar="SUBCOMMAND", required=True)
        check = commands.add_parser("check", help="connect as configured, and say what is found")
        count = commands.add_parser("sum", help="add up the connections that may be opened")
        status = commands.add_parser("status", help="show the pools of a running process")
        dump = commands.add_parser("dump", help="show the tasks and stacks of a running process")
        listing = commands.add_parser("shortcuts", help="list the shortcuts, and which are off")
        for each in (check, count):
            each.add_argument(
                "--database", action="append", metavar="ALIAS", help="default: all of pgbackend's"
            )
        count.add_argument("--processes", type=_whole(1), default=1, metavar="N")
        count.add_argument("--loops", type=_whole(0), default=1, metavar="N", help="in a process")
        count.add_argument("--threads", type=_whole(0), default=1, metavar="N", help="in a process")
        count.add_argument("--listen", action="store_true", help="the code uses pgbackend.listen()")
        status.add_argument("pid", type=_whole(1), nargs="?")
        status.add_argument("--all", action="store_true", help="all processes of this user")
        dump.add_argument("pid", type=_whole(1))
        for each in commands.choices.values():
            _also_take_djangos_options(each)
        for each in (check, count, status, listing):
            each.add_argument("--format", dest="how", choices=["text", "json"], default="text")

    def handle(self, *, what: str, **given: Any) -> None:
        if is_on_a_loop():
            raise CommandError("Call the command in sync code: it blocks, and runs a loop itself.")
        try:
            getattr(self, f"_{what}")(**given)
        except (processes.NoAnswer, directory.Unusable) as exc:
            raise CommandError(f"{exc}.".replace("..", ".")) from None

    def _check(self, *, database: list[str] | None, how: str, **given: Any) -> None:
        report = checking.check(_aliases(database))
        self._print(how, {**asdict(report), "ok": report.is_well()}, texts.of_report(report))
        if not report.is_well():
            raise SystemExit(1)

    def _sum(self, *, database: list[str] | None, how: str, **given: Any) -> None:
        load = Load(given["processes"], given["loops"], given["threads"], given["listen"])
        result = summing.added_up(_aliases(database), load)
        self._print(how, result.for_json(), result.lines())
        if not result.is_well():
            raise SystemExit(1)

    def _status(self, *, pid: int | None, how: str, **given: Any) -> None:
        if (pid is None) is not given["all"]:
            raise CommandError("Give the pid of a process, or --all.")
        found = processes.all_running() if pid is None else [processes.status(pid)]
        self._print(how, found, _of_processes(found))

    def _dump(self, *, pid: int, **given: Any) -> None:
        self.stdout.write(processes.dump(pid))

    def _shortcuts(self, *, how: str, **given: Any) -> None:
        found = list(shortcuts.listed())
        self._print(how, found, shortcuts.lines(found))

    def _print(self, how: str, data: Any, lines: Iterable[str]) -> None:
        if how == "json":
            self.stdout.write(json.dumps(data, indent=2, default=str))
        else:
            self.stdout.write("\n".join(lines))


def _of_processes(found: list[dict[str, Any]]) -> Iterable[str]:
    for each in found:
        if "error" in each:
            yield f"Process {each['pid']}: {each['error']}"
        else:
            yield from texts.of_process(each)
    if not found:
        yield "No process of this user has a socket of pgbackend's."


def _aliases(given: list[str] | None) -> list[str]:
    """Return the aliases to look at; raise `CommandError` for one that is not pgbackend's."""
    own = own_aliases()
    if not own:
        raise CommandError(
            "No alias of DATABASES has pgbackend as its ENGINE. Set DATABASES['default']['ENGINE'] "
            "to 'pgbackend'."
        )
    for alias in given or ():
        if alias not in own:
            names = ", ".join(map(repr, own))
            raise CommandError(f"{alias!r} is no alias of pgbackend's: choose one of {names}.")
    return given or own


def _also_take_djangos_options(parser: ArgumentParser) -> None:
    """Let Django's options stand behind the subcommand, where users write them, too."""
    for name in ("--settings", "--pythonpath"):
        parser.add_argument(name, default=SUPPRESS, help=SUPPRESS)
    for name in ("--traceback", "--no-color", "--force-color"):
        parser.add_argument(name, action="store_true", default=SUPPRESS, help=SUPPRESS)
    parser.add_argument("-v", "--verbosity", type=int, default=SUPPRESS, help=SUPPRESS)


def _whole(least: int) -> Callable[[str], int]:
    """Return a type for argparse: a whole number of at least `least`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ValueError
        return int(text)

    number.__name__ = f"whole number from {least}"
    return number
