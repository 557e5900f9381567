"""Builds sdist and wheel in clean clones, in unlike surroundings, and compares the bytes."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .running import ROOT, fail, git, run


@dataclass(frozen=True)
class Surroundings:
    """The things about a build that must not change its bytes."""

    folder: str
    clone: tuple[str, ...]
    umask: int
    variables: Mapping[str, str]
    what: tuple[str, ...] = ()
    """Arguments of `python -m build`; without any, the wheel is built from the sdist."""
    seconds: int | None = None
    """The time of change that all files get, since 1970."""


#: A shallow clone without tags, whose wheel is built from the sdist; and a whole one, whose wheel
#: is built from its files.
UNLIKE = (
    Surroundings(
        folder="a",
        clone=("--depth=1", "--no-tags"),
        umask=0o022,
        variables={"LC_ALL": "C", "TZ": "UTC", "PYTHONHASHSEED": "1"},
    ),
    Surroundings(
        folder="another place, further down/b",
        clone=(),
        umask=0o077,
        variables={"LC_ALL": "C.UTF-8", "TZ": "Asia/Kolkata", "PYTHONHASHSEED": "2"},
        what=("--sdist", "--wheel"),
        seconds=1_000_000_000,
    ),
)


@dataclass
class Built:
    """The files of a release, and the clone that they were built in."""

    sdist: Path
    wheel: Path
    clone: Path
    epoch: str
    hashes: dict[str, str] = field(default_factory=dict)


def build(folder: Path) -> Built:
    """Return the release that is built twice below `folder`; fail if the bytes differ."""
    first, second = (_build(folder / each.folder, each) for each in UNLIKE)
    if first.hashes != second.hashes:
        fail(f"two builds differ:\n{first.hashes}\n{second.hashes}\n(kept in {folder})")
    return first


def _build(place: Path, around: Surroundings) -> Built:
    place.parent.mkdir(parents=True, exist_ok=True)
    run(
        ["git", "clone", "--quiet", *around.clone, ROOT.as_uri(), place],
        umask=around.umask,
        cwd=place.parent,
    )
    epoch = git("log", "-1", "--format=%ct", cwd=place)
    if around.seconds is not None:
        _touch(place, around.seconds)
    environment = {**os.environ, **around.variables, "SOURCE_DATE_EPOCH": epoch}
    environment.pop("PYTHONPATH", None)
    run(
        [sys.executable, "-m", "build", "--no-isolation", *around.what],
        cwd=place,
        environment=environment,
        umask=around.umask,
    )
    return _found(place, epoch)


def _touch(place: Path, seconds: int) -> None:
    for path in place.rglob("*"):
        if ".git" not in path.relative_to(place).parts:
            os.utime(path, (seconds, seconds))


def _found(place: Path, epoch: str) -> Built:
    files = sorted((place / "dist").iterdir())
    by_kind = {path.suffix: path for path in files}
    if len(files) != 2 or by_kind.keys() != {".gz", ".whl"}:
        fail(f"a build made other files than an sdist and a wheel: {files}")
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return Built(by_kind[".gz"], by_kind[".whl"], place, epoch, hashes)
