"""Starts the database, checks that the stacks do the same work, and measures them."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import answers, machine
from .database import SETTINGS, Database, prepared
from .endpoints import ENDPOINTS
from .environment import HOME, ROOT, NoEnvironmentError, interpreter
from .load import LoadError
from .measure import Bench, Plan
from .results import Run, Sample, newest
from .server import ServerError
from .stacks import STACKS

_FULL = {
    "clients": [1, 16, 64, 256, 2000],
    "rounds": 3,
    "seconds": 0.6,
    "warm": 0.2,
    "patience": 10.0,
    "parked": 10_000,
    "cost_rounds": 31,
}
_QUICK = {
    "clients": [1, 16],
    "rounds": 1,
    "seconds": 0.5,
    "warm": 0.3,
    "patience": 5.0,
    "parked": 200,
    "cost_rounds": 3,
}


#: The format of the time at which a run began.
_BEGUN = "%Y-%m-%d %H:%M UTC"


class ResumeError(RuntimeError):
    """Says that no run can be resumed, and why."""


#: The errors that end a run with a message.
_TOLD = (NoEnvironmentError, ServerError, LoadError, ResumeError, answers.WrongAnswerError)


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(given)
    try:
        python = interpreter(options.python)
        with prepared() as database:
            run, path = _run(options, given, python, database)
    except _TOLD as exc:
        print(exc, file=sys.stderr)
        return 1
    print(f"written: {path}; 'python -m benchmarks.web.report' makes the page of it")
    wrong = sum(sample.wrong for sample in run.samples)
    if wrong:
        print(f"{wrong} answers were wrong", file=sys.stderr)
    return int(wrong > 0)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.web", description="Measure pgbackend beside its peers."
    )
    add = parser.add_argument
    add("--stacks", nargs="+", choices=STACKS, default=list(STACKS), metavar="STACK")
    add("--endpoints", nargs="*", choices=ENDPOINTS, default=list(ENDPOINTS), metavar="ENDPOINT")
    add("--clients", nargs="+", type=int, metavar="N")
    add("--rounds", type=int, help="how often each stack has its turn at each endpoint")
    add("--seconds", type=float, help="of one measurement")
    add("--warm", type=float, help="seconds before it that do not count")
    add("--patience", type=float, help="seconds that it may take at most, if few answers come")
    add("--parked", type=int, metavar="N", help="requests in flight at once; 0: leave it out")
    add("--cost-rounds", type=int, metavar="N", help="of benchmarks/cost.py; 0: leave it out")
    add("--quick", action="store_true", help="a trial: one short round with few clients")
    add("--python", help="the interpreter of the peers' environment (3.12 or later)")
    add("--out", type=Path, help="the file to write (JSON)")
    add("--resume", action="store_true", help="go on with the last run, or that of --out")
    add("--list", action=_List, nargs=0, help="list stacks and endpoints")
    options = parser.parse_args(arguments)
    for name, value in (_QUICK if options.quick else _FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


class _List(argparse.Action):
    """Prints the possible choices."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        for things in (STACKS, ENDPOINTS):
            for name, thing in things.items():
                print(f"{name:20} {thing.title}")
            print()
        parser.exit()


def _run(
    options: argparse.Namespace, given: list[str], python: Path, database: Database
) -> tuple[Run, Path]:
    begun = datetime.now(UTC)
    path = options.out or HOME / f"results-{begun:%Y%m%d-%H%M%S}.json"
    run = Run(
        command=_command(given),
        begun=f"{begun:{_BEGUN}}",
        machine=machine.machine(),
        versions=machine.versions(python, database.version()),
        database={} if "DATABASE_URL" in os.environ else SETTINGS,
        options={name: getattr(options, name) for name in (*_FULL, "stacks", "endpoints")},
    )
    if options.resume:
        path, run = _interrupted(options.out, run)
    bench = Bench(python, database)
    _check(bench, options)
    begun = datetime.strptime(run.begun, _BEGUN).replace(tzinfo=UTC)
    for part in (_measure, _park, _cost):
        part(bench, options, run, path)
        run.seconds = (datetime.now(UTC) - begun).total_seconds()
        run.save(path)
    return run, path


def _interrupted(path: Path | None, new: Run) -> tuple[Path, Run]:
    """Return the run to resume: it must have measured the same things, except for the rounds."""
    path = path or newest()
    if path is None:
        raise ResumeError("there is no run to go on with")
    run = Run.load(path)
    if not machine.has_code_of(run.versions["pgbackend"]):
        raise ResumeError(f"the run in {path.name} was of another pgbackend, or of changes to one")
    same = {machine.LOAD: run.machine[machine.LOAD]}, {"pgbackend": run.versions["pgbackend"]}, {}
    for what, kept in zip(("machine", "versions", "database"), same, strict=True):
        if getattr(run, what) != {**getattr(new, what), **kept}:
            raise ResumeError(f"the run in {path.name} had another {what}")
    for name, value in run.options.items():
        if name != "rounds" and new.options[name] != value:
            raise ResumeError(f"the run in {path.name} had --{name.replace('_', '-')} {value}")
    run.command += f"; {new.command}"
    return path, run


def _command(given: list[str]) -> str:
    """Return the command as it was called, without the paths of this machine."""
    kept: list[str] = []
    skip = False
    for word in given:
        is_path = word.partition("=")[0] in ("--out", "--python")
        if not (is_path or skip):
            kept.append(word)
        skip = is_path and "=" not in word
    return " ".join(["python -m benchmarks.web", *kept])


def _check(bench: Bench, options: argparse.Namespace) -> None:
    for name in options.stacks:
        with bench.server(STACKS[name]) as server:
            answers.check(server, bench.database, options.endpoints)
        bench.database.tidy()
        print(f"{name:20} answers as it should", flush=True)


def _measure(bench: Bench, options: argparse.Namespace, run: Run, path: Path) -> None:
    plan = Plan(
        [STACKS[name] for name in options.stacks],
        [ENDPOINTS[name] for name in options.endpoints],
        options.clients,
        options.rounds,
        options.seconds,
        options.warm,
        options.patience,
    )
    print(f"measuring for {plan.least_seconds / 60:.0f} minutes at least", flush=True)
    done = {(sample.round, sample.endpoint, sample.stack) for sample in run.samples}
    for samples in bench.measure(plan, done):
        run.samples += samples
        run.save(path)
        for sample in samples:
            print(_line(sample), flush=True)


def _line(sample: Sample) -> str:
    each = sample.cpu_each
    return (
        f"{sample.round + 1} {sample.endpoint:8} {sample.stack:20} {sample.clients:5} clients "
        f"{sample.rate:9.1f}/s {'-' if each is None else f'{each * 1e6:.0f}':>8} us of CPU "
        f"p50 {sample.p50 * 1e3:8.1f} p99 {sample.p99 * 1e3:8.1f} ms "
        f"{sample.connections:3} connections {sample.memory / 1024:5.0f} MiB "
        f"{sample.failed} failed {sample.wrong} wrong {sample.stuck} stuck "
        f"(clients' CPU {sample.own_cpu / sample.seconds:.0%})"
    )


def _park(bench: Bench, options: argparse.Namespace, run: Run, path: Path) -> None:
    for name in options.stacks if options.parked else ():
        if STACKS[name].can("park") and name not in {parked.stack for parked in run.parked}:
            parked = bench.park(STACKS[name], options.parked)
            run.parked.append(parked)
            run.save(path)
            each = (parked.memory_parked - parked.memory_idle) / parked.requests
            print(
                f"{name:20} {parked.parked:,} parked over {parked.connections} connections, "
                f"{parked.answered:,} answered in {parked.seconds:.1f} s, {each:.1f} kB each",
                flush=True,
            )


def _cost(bench: Bench, options: argparse.Namespace, run: Run, path: Path) -> None:
    if options.cost_rounds and not run.cost:
        command = [str(bench.python), str(ROOT / "benchmarks" / "cost.py"), "--json"]
        done = subprocess.run(
            [*command, "--loop", "uvloop", "--rounds", str(options.cost_rounds)],
            env={**os.environ, "DATABASE_URL": bench.database.url},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ServerError(f"benchmarks/cost.py failed:\n{done.stderr[-3000:]}")
        run.cost = json.loads(done.stdout)


if __name__ == "__main__":
    sys.exit(main())
