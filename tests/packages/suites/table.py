"""Declares the packages whose own tests are run, and each outcome that differs, with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Difference:
    """Says that tests have another outcome than on stock, in which contexts, and why."""

    tests: str  # a pattern
    contexts: tuple[str, ...]
    outcome: str
    reason: str


@dataclass(frozen=True)
class Package:
    """Describes where a package's tests are in its source distribution, and how to run them."""

    name: str
    version: str
    settings: str | None = None  # None: its conftest.py configures Django
    tests: tuple[str, ...] = ("tests",)
    directory: str = "."  # where the tests start, below the root of the source
    requires: tuple[str, ...] = ()  # what its tests import and this project does not install
    needs: str = ""  # the line that a project has to write
    on_stock: str = ""  # why tests fail on stock
    differences: tuple[Difference, ...] = ()

    def reason(self, test: str, context: str, outcome: str) -> str | None:
        """Return why the outcome of a test differs from stock's, or None if that is not known."""
        for known in self.differences:
            here = context in known.contexts and known.outcome == outcome
            if here and fnmatchcase(test, known.tests):
                return known.reason
        return None


BY_NAME = (
    "its conftest.py knows PostgreSQL only by the name of Django's ENGINE, and skips tests of "
    "full-text search"
)

ITS_MODULE = (
    "the test module looks for postgresql in the name of ENGINE, and leaves out tests of fields of "
    "PostgreSQL's"
)
#: What the tests of django-import-export import, with what that imports.
IMPORT_EXPORT = (
    *("tablib", "diff-match-patch", "chardet", "pytz", "django-extensions"),
    *("openpyxl", "et-xmlfile", "xlrd", "xlwt", "odfpy", "defusedxml", "PyYAML", "pandas", "numpy"),
    *("python-dateutil", "six", "memory-profiler", "psutil", "tabulate"),
)

PACKAGES = (
    Package(
        "django-auditlog",
        "3.4.1",
        "test_settings",
        ("test_app", "."),
        "auditlog_tests",
        ("freezegun", "python-dateutil", "six"),
    ),
    Package(
        "django-filter",
        "26.2",
        "tests.settings",
        requires=("pytz", "django-crispy-forms"),
        on_stock="five tests make articles whose author does not exist",
    ),
    Package(
        "django-import-export",
        "4.4.3",
        "settings",
        ("core",),
        "tests",
        IMPORT_EXPORT,
        on_stock="two tests import themselves from the directory above, and one knows a charset "
        "by another spelling",
        differences=tuple(
            Difference(f"*.test_resource_postgres.{test}", ("sync", "green"), outcome, ITS_MODULE)
            for test, outcome in (
                ("PostgresTests.*", "skipped"),
                ("TestExport*", "not run"),
                ("TestImport*", "not run"),
            )
        ),
    ),
    Package(
        "django-model-utils",
        "5.0.0",
        "tests.settings",
        requires=("time-machine", "python-dateutil", "six"),
        on_stock="five tests pass positional arguments to save(), which Django 6 has no more",
    ),
    Package("django-reversion", "6.4.0", "test_project.settings", ("test_app",), "tests"),
    Package(
        "djangorestframework",
        "3.18.3",
        differences=tuple(
            Difference(f"tests.test_filters.{test}", ("sync", "green"), "skipped", BY_NAME)
            for test in (
                "SearchFilterFullTextTests.*",
                "SearchFilterTests.test_unaccented_search_lookups",
            )
        ),
    ),
)
