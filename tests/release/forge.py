"""Checks the files that a forge reads: workflows, issue forms, Dependabot's settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .running import ROOT, fail, run, tool

FOLDER = ROOT / ".github"


def check() -> str:
    """Fail if a file has not the form that the forge asks for, or if zizmor finds fault."""
    if not FOLDER.is_dir():
        fail("the files for the forge are missing: .github")
    by_schema = list(schemas())
    for schema, paths in by_schema:
        run([tool("check-jsonschema"), "--builtin-schema", f"vendor.{schema}", *paths])
    run([tool("zizmor"), "--offline", "--no-progress", "--persona=pedantic", FOLDER])
    return f"{sum(len(paths) for _, paths in by_schema)} files, zizmor finds nothing"


def schemas() -> Iterator[tuple[str, list[Path]]]:
    """Yield the name of each schema of check-jsonschema, and the files that it is for."""
    forms = FOLDER / "ISSUE_TEMPLATE"
    yield "github-workflows", sorted((FOLDER / "workflows").glob("*.yml"))
    yield "github-issue-forms", [path for path in sorted(forms.glob("*")) if path.stem != "config"]
    yield "github-issue-config", [forms / "config.yml"]
    yield "dependabot", [FOLDER / "dependabot.yml"]
