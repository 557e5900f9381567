"""Checks that sdist and wheel contain what belongs in them, and nothing else."""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Iterable
from email import message_from_string
from email.message import Message
from pathlib import Path

from .agreeing import repository
from .building import Built
from .running import fail, git, outcome, run, tool

#: Files that hatchling adds to each sdist.
ADDED = {"PKG-INFO"}
#: The largest sdist: a picture that is much too large would come with it.
MOST_BYTES = 12_000_000


def check(built: Built) -> str:
    """Fail if a file is missing or too many, or if a tool finds fault; return what was found."""
    in_sdist, in_wheel = files_of_sdist(built.sdist), files_of_wheel(built.wheel)
    tracked = git("-c", "core.quotePath=false", "ls-files", cwd=built.clone).splitlines()
    compare("sdist", in_sdist, wanted_in_sdist(tracked))
    compare("wheel", in_wheel, wanted_in_wheel(tracked, built.wheel))
    if built.sdist.stat().st_size > MOST_BYTES:
        size = built.sdist.stat().st_size
        fail(f"{built.sdist.name} has {size:,} bytes: more than {MOST_BYTES:,}")
    check_times(built)
    _judge(built)
    return f"{len(in_sdist)} files in the sdist, {len(in_wheel)} in the wheel"


def wanted_in_sdist(tracked: Iterable[str]) -> set[str]:
    """Return the names of the files that belong into the sdist: all that are `tracked`."""
    return ADDED | set(tracked)


def wanted_in_wheel(tracked: Iterable[str], wheel: Path) -> set[str]:
    """Return the names of `tracked` files that belong into `wheel`, and those of its metadata."""
    info = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
    names = ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")
    own = {path for path in tracked if path.startswith("pgbackend/")}
    return own | {f"{info}/{name}" for name in names}


def files_of_sdist(path: Path) -> set[str]:
    """Return the names of the files in the sdist at `path`, below its folder."""
    with tarfile.open(path) as archive:
        names = archive.getnames()
    return {name.split("/", 1)[1] for name in names}


def files_of_wheel(path: Path) -> set[str]:
    """Return the names of the files in the wheel at `path`."""
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def compare(kind: str, found: set[str], wanted: set[str]) -> None:
    if found != wanted:
        fail(
            f"the {kind} lacks {sorted(wanted - found) or 'nothing'}, and has "
            f"{sorted(found - wanted) or 'nothing'} too many"
        )


def check_times(built: Built) -> None:
    """Fail if a file of the sdist has another time than the commit's."""
    with tarfile.open(built.sdist) as archive:
        times = {int(member.mtime) for member in archive}
    if times != {int(built.epoch)}:
        fail(f"files of the sdist have the times {sorted(times)}, not {built.epoch}")


def _judge(built: Built) -> None:
    """Ask the tools that know what package indexes and installers want."""
    files = (built.sdist, built.wheel)
    run([tool("twine"), "check", "--strict", *files])
    run([tool("check-wheel-contents"), built.wheel], cwd=built.clone)
    # There is no address of e-mail to give: SECURITY.md and the forge's issues stand for it. The
    # URLs are missing as long as no repository is named.
    skipped = ["AuthorEmail", *([] if repository() else ["Url"])]
    rated = outcome([tool("pyroma"), "--min", "10", "--skip-tests", ",".join(skipped), built.sdist])
    if rated.status:
        fail(f"pyroma does not give all marks:\n{rated.output}")
    check_metadata(metadata_of(built.wheel))


def metadata_of(wheel: Path) -> Message:
    """Return the metadata of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        return message_from_string(archive.read(name).decode())


def check_metadata(metadata: Message) -> None:
    """Fail if a field is missing, or if the description has links that an index cannot follow."""
    for name in ("Summary", "Author", "License-Expression", "License-File", "Requires-Python"):
        if not metadata[name]:
            fail(f"the metadata have no {name}")
    relative = relative_links(str(metadata.get_payload()))
    if relative:
        fail(f"the description on a package index would have dead links: {relative}")


def relative_links(markdown: str) -> list[str]:
    """Return the targets of links and images in `markdown` that lead to files beside it."""
    code = re.compile(r"^```.*?^```|`[^`]*`", re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)|(?:src|href|srcset)=\"([^\"]+)\"", code.sub("", markdown))
    found = ["".join(each) for each in targets]
    return [each for each in found if not each.startswith(("https://", "http://", "mailto:", "#"))]
