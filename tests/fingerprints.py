"""Reads the releases that shortcuts are written against: ``python -m tests.fingerprints``.

The program downloads each supported release of Django, psycopg and psycopg_pool (or takes it from
the folder ``--wheels``), and prints the functions that shortcuts bypass whose text is not known
yet, with the difference from the release before. After reading these, call it with ``--write``: it
adds the texts to `pgbackend/fast/fingerprints.json`, and the shortcuts are on with these releases.
"""

from __future__ import annotations

import argparse
import difflib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from pgbackend.driver import versions
from pgbackend.fast import fingerprints
from pgbackend.fast.registry import DISTRIBUTIONS, SHORTCUTS, known

#: By distribution: the first version that is supported, and the first that is not.
SUPPORTED = {"Django": ((5, 2), (6, 2)), **versions.SUPPORTED}
FILE = Path(__file__).parents[1] / "pgbackend" / "fast" / "fingerprints.json"
#: Finds also the releases that ask for a newer Python than this one.
_ANY_PYTHON = ["--python-version", "3.14", "--only-binary", ":all:"]


def main() -> int:
    options = _parse()
    with tempfile.TemporaryDirectory() as made:
        folder = options.wheels or Path(made)
        found = {
            distribution: [*_read_all(package, distribution, folder)]
            for package, distribution in DISTRIBUTIONS.items()
        }
    new = [*chain.from_iterable(map(_differences, found.values()))]
    print("\n".join(new) if new else "all functions are as they were known")
    if options.write:
        FILE.write_text(json.dumps(_table(found), indent=1, sort_keys=True) + "\n")
    return 1 if new and not options.write else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fingerprints", description=__doc__)
    parser.add_argument("--wheels", type=Path, help="where wheels are, and are downloaded to")
    parser.add_argument("--write", action="store_true", help="take what was found as known")
    return parser.parse_args()


class Release:
    """Holds one release of a distribution, and the texts of the functions that shortcuts bypass."""

    def __init__(self, version: str, wheel: Path, functions: list[str]) -> None:
        self.version = version
        self.texts: dict[str, bytes] = {}
        with zipfile.ZipFile(wheel) as files:
            names = {*files.namelist()}
            for module in sorted({each.partition(":")[0] for each in functions}):
                path = module.replace(".", "/")
                path = f"{path}/__init__.py" if f"{path}/__init__.py" in names else f"{path}.py"
                if path in names:
                    for name, text in fingerprints.of_source(files.read(path)).items():
                        self.texts[f"{module}:{name}"] = text
        self.texts = {each: self.texts[each] for each in functions if each in self.texts}


def functions_of(package: str) -> list[str]:
    """Return the functions of a package that shortcuts bypass."""
    every = {name for shortcut in SHORTCUTS.values() for name in shortcut.bypasses}
    return sorted(name for name in every if name.partition(".")[0] == package)


def _read_all(package: str, distribution: str, folder: Path) -> Iterator[Release]:
    for version in _versions(distribution):
        yield Release(version, _wheel(distribution, version, folder), functions_of(package))


def _versions(distribution: str) -> list[str]:
    """Return all supported releases, the oldest first."""
    command = ["index", "versions", *_ANY_PYTHON, distribution]
    answer = _pip(command)
    line = next(each for each in answer.splitlines() if each.startswith("Available versions:"))
    released = line.partition(":")[2].replace(",", " ").split()
    least, too_new = SUPPORTED[distribution]
    return sorted((each for each in released if least <= _numbers(each) < too_new), key=_numbers)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _wheel(distribution: str, version: str, folder: Path) -> Path:
    name = distribution.replace("-", "_")
    pattern = f"[{name[0]}{name[0].lower()}]{name[1:]}-{version}-*.whl"
    if not [*folder.glob(pattern)]:
        _pip(
            ["download", *_ANY_PYTHON, "--no-deps", "-d", str(folder), f"{distribution}=={version}"]
        )
    (wheel,) = folder.glob(pattern)
    return wheel


def _pip(arguments: list[str]) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _differences(releases: list[Release]) -> Iterator[str]:
    """Yield a description of each function whose text is not known."""
    table = known()
    before: dict[str, bytes] = {}
    for release in releases:
        for name, text in release.texts.items():
            known_texts = table["functions"].get(name, {})
            if release.version not in known_texts.get(fingerprints.of_text(text), []):
                yield f"{release.version}: {name}"
                old = before.get(name, b"").decode().splitlines()
                if text != before.get(name):
                    yield from difflib.unified_diff(old, text.decode().splitlines(), lineterm="")
        before = {**before, **release.texts}


def _table(found: dict[str, list[Release]]) -> dict[str, object]:
    functions: dict[str, dict[str, list[str]]] = {}
    for releases in found.values():
        for release in releases:
            for name, text in release.texts.items():
                by_text = functions.setdefault(name, {})
                by_text.setdefault(fingerprints.of_text(text), []).append(release.version)
    read = {name: [each.version for each in releases] for name, releases in found.items()}
    return {"versions": read, "functions": functions}


if __name__ == "__main__":
    sys.exit(main())
