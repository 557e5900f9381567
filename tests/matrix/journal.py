"""Keeps what each step of each cell came to, in a file that is committed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .cells import Cell
from .interpreters import ROOT

JOURNAL = Path(__file__).with_name("journal.json")


@dataclass(frozen=True)
class Entry:
    """Says what one step of a cell came to; the last run of it counts."""

    cell: str
    step: str
    passed: bool
    outcome: str
    day: str
    minutes: float = 0
    loop: str = ""
    code: str = ""
    """A hash of the package's code."""
    quick: bool = False
    """Whether the slow tests were left out."""
    versions: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    """How many tests were skipped, by the reason."""


class Journal:
    """The entries, by cell and step."""

    def __init__(self, path: Path = JOURNAL) -> None:
        self._path = path
        self.entries: dict[tuple[str, str], Entry] = {}
        self._read()

    def _read(self) -> None:
        found = json.loads(self._path.read_text()) if self._path.exists() else []
        self.entries = {(one["cell"], one["step"]): Entry(**one) for one in found}

    def add(self, entry: Entry) -> None:
        """Keep an entry, in place of the one before, and write the file: whole, or not at all.

        What another run has added meanwhile is kept, too.
        """
        self._read()
        self.entries[entry.cell, entry.step] = entry
        records = [asdict(self.entries[key]) for key in sorted(self.entries)]
        written = self._path.with_suffix(".written")
        written.write_text(json.dumps(records, indent=1) + "\n")
        written.replace(self._path)

    def of(self, cell: Cell) -> Mapping[str, Entry]:
        """Return the entries of a cell by their steps."""
        return {step: entry for (name, step), entry in self.entries.items() if name == cell.name}

    def has_passed(self, cell: Cell, step: str, *, quick: bool) -> bool:
        """Return whether this step passed with the code as it is, and with as many tests."""
        entry = self.entries.get((cell.name, step))
        enough = entry is not None and entry.passed and (quick or not entry.quick)
        return enough and entry is not None and entry.code == code()


def code() -> str:
    """Return a hash of the package's code, which tells its versions apart."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "pgbackend").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
