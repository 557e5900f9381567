"""Finds each Python, or makes one: a later release of Debian, in a directory of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: The repository. A Python of a later release sees it under the same path.
ROOT = Path(__file__).resolve().parents[2]
#: The releases of Debian that have a Python which this machine may lack. Their debootstrap script
#: is that of sid, which an older debootstrap has, too.
RELEASES = {"3.14": "forky", "3.15": "forky"}
PACKAGES = "ca-certificates,python3,python3-venv,{venvs},git,procps,adduser,locales,pgbouncer"
#: Runs a command (its arguments from the fourth on) with a directory as its root. The mounts are
#: those of a namespace of its own, so they end with it.
ENTER = """
root=$1 repository=$2 home=$3
shift 3
for directory in "$repository" "$home" /proc; do
    mkdir -p "$root$directory"
    mount --bind "$directory" "$root$directory"
done
mount --rbind /dev "$root/dev"
for file in /etc/ssl/certs/ca-certificates.crt /etc/pip.conf /etc/resolv.conf /etc/hosts; do
    [ ! -f "$file" ] || cp "$file" "$root$file"
done
exec chroot "$root" /bin/sh -c 'cd "$0" && exec "$@"' "$repository" "$@"
"""


class CannotMake(RuntimeError):
    """Says what cannot be made here, why, and what to do."""


@dataclass(frozen=True)
class Interpreter:
    """A Python, and the directory that is its root: `/`, or that of a later Debian."""

    program: str
    root: Path | None = None
    home: Path | None = None

    def command(self, *command: str | Path) -> list[str]:
        """Return what runs `command` where this Python is."""
        if self.root is None:
            return list(map(str, command))
        enter = ["unshare", "--mount", "/bin/sh", "-euc", ENTER, "enter"]
        return list(map(str, [*enter, self.root, ROOT, self.home, *command]))


def interpreter(version: str, home: Path) -> Interpreter:
    """Return the Python of `version`; makes it below `home` if this machine has none.

    Raises:
        CannotMake: it cannot be made here.
    """
    installed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for program in (f"python{version}", *map(str, reversed(installed))):
        if _is(version, program):
            return Interpreter(program)
    release = RELEASES.get(version)
    if release is None:
        raise CannotMake(f"there is no Python {version}: install it, so that python{version} runs")
    root = home / release
    if not (root / "usr/bin" / f"python{version}").exists():
        _make(release, root)
    return Interpreter(f"/usr/bin/python{version}", root, home)


def _is(version: str, program: str) -> bool:
    # Asked, not looked for: a shim may lead nowhere.
    command = [program, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return False
    return done.stdout.strip() == version


def _make(release: str, root: Path) -> None:
    """Unpack a release of Debian in `root`, which appears whole or not at all."""
    if not sys.platform.startswith("linux") or os.geteuid() or not shutil.which("debootstrap"):
        raise CannotMake(
            f"Debian's release {release}, which has this Python, can be unpacked only by root on "
            "Linux with debootstrap (apt-get install debootstrap): or install the Python yourself"
        )
    venvs = ",".join(f"python{python}-venv" for python, by in RELEASES.items() if by == release)
    begun = root.with_suffix(".begun")
    shutil.rmtree(begun, ignore_errors=True)
    scripts = Path("/usr/share/debootstrap/scripts")
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES.format(venvs=venvs)}"]
    run([*command, release, str(begun), _mirror(), str(scripts / "sid")])
    begun.rename(root)


def _mirror() -> str:
    """Return the mirror of Debian that this machine's apt uses."""
    command = ["apt-get", "indextargets", "--format", "$(SITE) $(ORIGIN)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        site, _, origin = line.partition(" ")
        if origin == "Debian" and "security" not in site:
            return site
    raise CannotMake("none of the sources of apt is a mirror of Debian")


def run(command: Sequence[str]) -> None:
    """Run what makes a thing.

    Raises:
        CannotMake: the command failed; the message has its last lines.
    """
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-20:])
        raise CannotMake(f"{command[0]} failed ({done.returncode}):\n{last}")
