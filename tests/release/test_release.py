"""Tests the checks of a release: each must be able to fail. `make release` runs them on a build."""

from __future__ import annotations

import ast
import re
import zipfile
from collections.abc import Iterable
from email.message import Message
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import pgbackend
from pgbackend.operating import server
from tests.release import agreeing, contents, forge
from tests.release.running import ROOT, Failed

FORGE = "https://forge.example/someone/pgbackend"
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))

# --- Versions -------------------------------------------------------------------------------------


def test_the_version_is_that_of_the_changelog() -> None:
    assert agreeing.version() == pgbackend.__version__
    agreeing.check_changelog((ROOT / "CHANGELOG.md").read_text(), pgbackend.__version__)


@pytest.mark.parametrize(
    ("changelog", "said"),
    [
        ("## [0.2.0] - 2026-12-01\n", "above all versions"),
        ("## [Unreleased]\n\n## [0.1.0] - 2026-12-01\n", r"must have '## \[0.2.0\] - DATE'"),
        ("## [Unreleased]\n\n## [0.2.0]\n", r"must have '## \[0.2.0\] - DATE'"),
        ("## [Unreleased]\n", r"must have '## \[0.2.0\] - DATE'"),
    ],
)
def test_a_changelog_that_was_not_cut_is_refused(changelog: str, said: str) -> None:
    with pytest.raises(Failed, match=said):
        agreeing.check_changelog(changelog, "0.2.0")


def test_a_tag_of_another_version_is_refused() -> None:
    agreeing.check_tag(["v0.2.0", "vendor", "latest"], "0.2.0")
    agreeing.check_tag([], "0.2.0")
    with pytest.raises(Failed, match=r"tag v0\.3\.0, and pgbackend\.__version__ is 0\.2\.0"):
        agreeing.check_tag(["v0.3.0"], "0.2.0")


def test_a_forge_releases_only_the_repository_that_is_named() -> None:
    forge_says = {
        "GITHUB_REF_TYPE": "tag",
        "GITHUB_SERVER_URL": "https://forge.example",
        "GITHUB_REPOSITORY": "someone/pgbackend",
    }
    agreeing.check_forge(FORGE, forge_says)
    agreeing.check_forge("", {**forge_says, "GITHUB_REF_TYPE": "branch"})
    for named in ("", "https://forge.example/fork/pgbackend"):
        with pytest.raises(Failed, match=f'repository = "{FORGE}"'):
            agreeing.check_forge(named, forge_says)


# --- What a package index shows -------------------------------------------------------------------


@pytest.fixture
def hatch_build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Provide the module that hatchling loads when it builds."""
    monkeypatch.syspath_prepend(ROOT)
    import hatch_build

    return hatch_build


@pytest.mark.parametrize("repository", ["", FORGE])
def test_the_readme_has_no_link_that_an_index_cannot_follow(
    repository: str, hatch_build: ModuleType
) -> None:
    text = (ROOT / "README.md").read_text()
    assert contents.relative_links(text), "else this proves nothing"
    shown = hatch_build.for_an_index(text, repository, "0.2.0")
    assert not contents.relative_links(shown)
    assert (f"]({FORGE}/blob/v0.2.0/docs/start.md)" in shown) is bool(repository)


@pytest.mark.parametrize(
    ("text", "shown", "without"),
    [
        ("[a](docs/a.md#b)", "[a](URL/blob/v1/docs/a.md#b)", "a"),
        ("[`a` and *b*](a.md)", "[`a` and *b*](URL/blob/v1/a.md)", "`a` and *b*"),
        ("[a](https://x.example/)", "[a](https://x.example/)", "[a](https://x.example/)"),
        ("[a](#b)", "[a](#b)", "[a](#b)"),
        ("![a](b.svg)", "![a](URL/raw/v1/b.svg)", ""),
        ("[![a](b.svg)](c.md)", "[![a](URL/raw/v1/b.svg)](URL/blob/v1/c.md)", ""),
        ('<img src="b.png" width="3">', '<img src="URL/raw/v1/b.png" width="3">', ""),
        ('<img src="https://x.example/b">', '<img src="https://x.example/b">', None),
        ("a[0](b) and x", "a[0](URL/blob/v1/b) and x", "a0 and x"),
    ],
)
def test_links_and_images_of_the_readme(
    text: str, shown: str, without: str | None, hatch_build: ModuleType
) -> None:
    assert hatch_build.for_an_index(text, FORGE, "1") == shown.replace("URL", FORGE)
    assert hatch_build.for_an_index(text, "", "1") == (shown if without is None else without)


def test_code_in_the_readme_is_left_as_it_is(hatch_build: ModuleType) -> None:
    text = "```python\nviews[0](request)\n```\nand `a[0](b)`, [c](d.md)\n"
    shown = hatch_build.for_an_index(text, FORGE, "1")
    assert shown == text.replace("(d.md)", f"({FORGE}/blob/v1/d.md)")


def test_the_urls_are_those_of_the_repository(hatch_build: ModuleType) -> None:
    assert hatch_build.urls("", "1") == {}
    assert all(url.startswith(FORGE) for url in hatch_build.urls(FORGE, "1").values())


def test_metadata_that_lack_a_field_or_have_dead_links_are_refused() -> None:
    metadata = Message()
    with pytest.raises(Failed, match="no Summary"):
        contents.check_metadata(metadata)
    for name in ("Summary", "Author", "License-Expression", "License-File", "Requires-Python"):
        metadata[name] = "x"
    metadata.set_payload("[all](https://x.example/) `[a](b.md)`")
    contents.check_metadata(metadata)
    metadata.set_payload("[a](b.md)")
    with pytest.raises(Failed, match=r"dead links: \['b\.md'\]"):
        contents.check_metadata(metadata)


# --- Contents -------------------------------------------------------------------------------------


def test_a_file_too_many_or_too_few_is_told(tmp_path: Path) -> None:
    wheel = tmp_path / "pgbackend-9.9-py3-none-any.whl"
    info = "pgbackend-9.9.dist-info"
    own = ["pgbackend/a.py", "pgbackend/__pycache__/a.cpython-313.pyc"]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*own, *(f"{info}/{each}" for each in ("METADATA", "WHEEL", "RECORD"))):
            archive.writestr(name, "")
    wanted = contents.wanted_in_wheel(["pgbackend/a.py", "tests/b.py"], wheel)
    with pytest.raises(Failed, match=rf"lacks \['{info}/licenses/LICENSE'\], and has .*\.pyc"):
        contents.compare("wheel", contents.files_of_wheel(wheel), wanted)
    with pytest.raises(Failed, match=r"has nothing too many"):
        contents.compare("wheel", set(), wanted)


def test_the_sdist_is_the_repository() -> None:
    assert contents.wanted_in_sdist([".ci/run"]) == {".ci/run", "PKG-INFO"}


# --- Files for a forge ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_have_the_least_rights_and_pinned_actions(path: Path) -> None:
    text = path.read_text()
    workflow: dict[str, Any] = yaml.safe_load(text)
    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        assert "permissions" in job and "timeout-minutes" in job, name
        writes = {key for key, value in job["permissions"].items() if value == "write"}
        assert writes <= {"id-token", "attestations", "pages", "security-events"}
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
            assert "${{" not in step.get("run", "")
    for line in re.findall(r"uses: (.*)", text):
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_each_action_has_one_pin() -> None:
    pins: dict[str, set[str]] = {}
    for path in WORKFLOWS:
        for action, pin in re.findall(r"uses: ([\w-]+/[\w-]+)\S*@(.*)", path.read_text()):
            pins.setdefault(action, set()).add(pin)
    assert all(len(found) == 1 for found in pins.values()), pins


def test_the_matrix_has_each_pair_and_each_server() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]
    rows = jobs["tests"]["strategy"]["matrix"]["include"]
    pairs = {(row["python"], row["django"]) for row in rows}
    assert pairs == {(python, django) for django, pythons in _versions() for python in pythons}
    servers = {str(each) for each in range(server.FIRST, server.LAST + 1)}
    assert {row["postgresql"] for row in rows} == servers
    # Django 6.1 needs PostgreSQL 15.
    assert not [row for row in rows if row["django"] == "6.1" and row["postgresql"] == "14"]


def _versions() -> Iterable[tuple[str, tuple[str, ...]]]:
    """Return the versions of noxfile.py, which only an environment with nox can import."""
    source = (ROOT / "noxfile.py").read_text()
    found = re.search(r"^VERSIONS = (\{.*?^\})", source, re.MULTILINE | re.DOTALL)
    assert found is not None
    return ast.literal_eval(found[1]).items()


def test_only_the_jobs_that_publish_may_take_an_identity() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    with_identity = {name for name, job in jobs.items() if "id-token" in job["permissions"]}
    assert with_identity == {"attest", "publish"}
    for name in with_identity:  # no code of the repository runs beside it
        assert not [step for step in jobs[name]["steps"] if "run" in step]


def test_each_file_for_a_forge_has_a_schema() -> None:
    checked = {path for _, paths in forge.schemas() for path in paths}
    assert checked == set(forge.FOLDER.rglob("*.y*ml"))


def test_the_bug_form_asks_for_the_report() -> None:
    form = yaml.safe_load((forge.FOLDER / "ISSUE_TEMPLATE/bug.yml").read_text())
    fields = {each.get("id"): each for each in form["body"]}
    assert "`python -m pgbackend.report`" in fields["report"]["attributes"]["label"]
    assert fields["report"]["validations"]["required"]
