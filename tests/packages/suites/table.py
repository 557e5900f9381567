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
#: Packages that the tests of django-import-export import, and theirs.
IMPORT_EXPORT = (
    *("tablib", "diff-match-patch", "chardet", "pytz", "django-extensions"),
    *("openpyxl", "et-xmlfile", "xlrd", "xlwt", "odfpy", "defusedxml", "PyYAML", "pandas", "numpy"),
    *("python-dateutil", "six", "memory-profiler", "psutil", "tabulate"),
)

AXES_CHECKS = (
    "the test expects just its own messages of `manage.py check`, and pgbackend adds one "
    "(pgbackend.D001, of the level DEBUG, which is not shown)"
)
AXES_ORDER = "the test expects rows in the order of their keys, and asks for no order"
CONSTANCE_LOOP = (
    "on an event loop `config.NAME` is a proxy, to be awaited; what a test stores or compares is "
    "the proxy"
)

PACKAGES = (
    Package(
        "django-allauth",
        "65.22.1",
        "tests.projects.account_only.settings",
        ("tests/apps/account",),
        requires=("python3-openid", "qrcode", "fido2"),
        on_stock="one test expects the key 1, as on SQLite; one is a coroutine function, which "
        "pytest runs by a plugin that is off here",
    ),
    Package(
        "django-auditlog",
        "3.4.1",
        "test_settings",
        ("test_app", "."),
        "auditlog_tests",
        ("freezegun", "python-dateutil", "six"),
    ),
    Package(
        "django-axes",
        "8.3.1",
        "tests.settings",
        on_stock="two tests give PostgreSQL's field of addresses a name, and one needs ipware",
        differences=(
            Difference("tests.test_checks.*", ("sync", "green"), "failure", AXES_CHECKS),
            Difference("*.test_axes_list_attempts", ("sync", "green"), "failure", AXES_ORDER),
        ),
    ),
    Package(
        "django-constance",
        "4.4.0",
        "tests.settings",
        requires=("django-picklefield", "redis"),
        needs="`await config.NAME` in green code, as in all code on an event loop",
        differences=tuple(
            Difference(f"tests.{module}.*", ("green",), "failure", CONSTANCE_LOOP)
            for module in ("test_pytest_overrides", "test_test_overrides", "test_utils")
        ),
    ),
    Package(
        "django-filter",
        "26.2",
        "tests.settings",
        requires=("pytz", "django-crispy-forms"),
        on_stock="five tests make articles whose author does not exist",
    ),
    Package("django-guardian", "3.5.2", "guardian.testapp.testsettings", ("guardian",)),
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
    Package(
        "django-modeltranslation",
        "0.20.6",
        "modeltranslation.tests.settings",
        ("modeltranslation",),
        requires=("parameterized",),
    ),
    Package(
        "django-ordered-model",
        "3.7.4",
        "tests.settings",
        on_stock="nine tests expect the first row to have the key 1, as on SQLite",
    ),
    Package("django-reversion", "6.4.0", "test_project.settings", ("test_app",), "tests"),
    Package(
        "django-silk",
        "5.6.0",
        "project.settings",
        ("tests",),
        "project",
        (
            "gprof2dot",
            "pyparsing",
            "autopep8",
            "pycodestyle",
            "factory-boy",
            "Faker",
            "networkx",
            "pydot",
            "sqlparse",
            "contextlib2",
            "freezegun",
            "python-dateutil",
            "six",
        ),
    ),
    Package("django-solo", "2.5.1", "solo.tests.settings", ("solo",)),
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
