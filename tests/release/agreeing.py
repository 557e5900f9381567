"""Checks that version, tag, CHANGELOG.md and the repository's address agree."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .running import ROOT, fail, git

_VERSION = re.compile(r'^__version__ = "([^"]+)"$', re.MULTILINE)
#: The headings of the versions in CHANGELOG.md.
_HEADING = re.compile(r"^## \[([^\]]+)\](?: - (\d{4}-\d\d-\d\d))?$", re.MULTILINE)


def version(root: Path = ROOT) -> str:
    """Return the version that `pgbackend/__init__.py` states."""
    found = _VERSION.findall((root / "pgbackend/__init__.py").read_text(encoding="utf-8"))
    if len(found) != 1:
        fail("pgbackend/__init__.py must state __version__ once, as a plain text in double quotes")
    return str(found[0])


def project(root: Path = ROOT) -> dict[str, Any]:
    """Return pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def repository(root: Path = ROOT) -> str:
    """Return the address of the repository that pyproject.toml names; "" if there is none yet."""
    hook = project(root)["tool"]["hatch"]["metadata"]["hooks"]["custom"]
    return str(hook["repository"])


def check_changelog(changelog: str, stated: str) -> None:
    """Fail unless `changelog` has [Unreleased] first, and then the version `stated` with a date."""
    headings = [(each[1], each[2]) for each in _HEADING.finditer(changelog)]
    if not headings or headings[0] != ("Unreleased", None):
        fail("CHANGELOG.md must have '## [Unreleased]' above all versions")
    if len(headings) < 2 or headings[1][0] != stated or headings[1][1] is None:
        fail(
            f"pgbackend.__version__ is {stated}: CHANGELOG.md must have '## [{stated}] - DATE' as "
            "its first version"
        )


def check_tag(tags: list[str], stated: str) -> None:
    """Fail if one of `tags`, which the commit has, is a version's and not that of `stated`."""
    wrong = [tag for tag in tags if re.match(r"v\d", tag) and tag != f"v{stated}"]
    if wrong:
        fail(
            f"the commit has the tag {wrong[0]}, and pgbackend.__version__ is {stated}: set the "
            f"version to {wrong[0][1:]} and tag that commit, or name the tag v{stated}"
        )


def check_forge(stated: str, environment: Mapping[str, str]) -> None:
    """Fail if a forge's workflow releases from another repository than pyproject.toml names."""
    if environment.get("GITHUB_REF_TYPE") != "tag":
        return
    here = f"{environment['GITHUB_SERVER_URL']}/{environment['GITHUB_REPOSITORY']}"
    if stated != here:
        fail(
            f"this repository is {here}, and pyproject.toml names {stated or 'none'}: set "
            f'repository = "{here}" in [tool.hatch.metadata.hooks.custom]'
        )


def check() -> str:
    """Fail if anything disagrees; return what was found."""
    stated = version()
    check_changelog((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), stated)
    tags = git("tag", "--points-at", "HEAD").split()
    if os.environ.get("GITHUB_REF_TYPE") == "tag":  # a shallow clone may lack the tag
        tags.append(os.environ["GITHUB_REF_NAME"])
    check_tag(tags, stated)
    check_forge(repository(), os.environ)
    tag = f"tag v{stated}" if f"v{stated}" in tags else "no tag yet"
    return f"version {stated}, {tag}, {repository() or 'no repository named yet'}"
