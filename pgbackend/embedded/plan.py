"""The plan of a server: where its data are, which programs run it, as which account.

The process that asks for a server makes the plan; the keeper carries it out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from .directories import make_base, temporary_base
from .root import ROOT_HOME, Account, owner_of, reachable_bindir, root_may_use, server_account

if TYPE_CHECKING:
    from collections.abc import Mapping

# trust authentication is safe only as long as nobody else can reach the socket.
_RESERVED = frozenset(
    {"listen_addresses", "port", "unix_socket_directories", "unix_socket_permissions"}
)


@dataclass(frozen=True)
class Plan:
    """The facts that a keeper needs, sent to it as JSON."""

    home: Path  # everything of one server: data, socket, locks, log
    bindir: Path
    account: Account | None  # None: the server runs as its caller does
    note: Path | None  # in `base`, says where the data are; None when they are in `base`
    own_parent: bool  # the directory around home was made for it, and goes with it
    keep: bool
    settings: dict[str, str] = field(default_factory=dict)

    def dump(self) -> str:
        """Return the plan as JSON."""
        return json.dumps(asdict(self), default=os.fspath)

    @classmethod
    def load(cls, text: str) -> Self:
        """Read a plan that `dump` wrote."""
        got = json.loads(text)
        got["home"], got["bindir"] = Path(got["home"]), Path(got["bindir"])
        got["account"] = got["account"] and Account(**got["account"])
        got["note"] = got["note"] and Path(got["note"])
        return cls(**got)


def make_plan(
    base: Path | None, bindir: Path, version: str, settings: dict[str, str], *, keep: bool
) -> Plan:
    """Decide where the data of a server are and as which account it runs; make its `base`."""
    account = server_account() if os.geteuid() == 0 else None
    temporary = base is None
    base = temporary_base() if base is None else make_base(base)
    name = "postgresql-" + (re.match(r"\d+", version) or [version])[0]
    home, note, own_parent = base / name, None, temporary
    if account and not root_may_use(base, home, account):
        key = hashlib.sha256(os.fsencode(base)).hexdigest()[:12]
        home, note, own_parent = ROOT_HOME / f"data-{key}" / name, base / f"{name}.txt", True
    if account:
        account = owner_of(home / "data") or account
        bindir = reachable_bindir(bindir, account)
    keep = keep and not temporary
    return Plan(home, bindir, account, note, own_parent, keep, settings)


def check_settings(settings: Mapping[str, str]) -> None:
    """Raise `ValueError` if a setting is one that the launcher decides on itself."""
    if clash := sorted(_RESERVED.intersection(name.lower() for name in settings)):
        raise ValueError(
            f"setting {clash[0]!r} belongs to the launcher: the server trusts everyone who "
            "reaches its socket; leave it out, or run a server of your own and set DATABASE_URL"
        )
