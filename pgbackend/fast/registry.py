"""The registry of shortcuts: what each stands for, which functions it bypasses, whether it is on.

The driver has some shortcuts of its own; `switch_driver()` sets their switches.

A shortcut is on if `PGBACKEND_SHORTCUTS` does not switch it off, and if it was written against the
installed source text of each function that it bypasses; `fingerprints.json` lists the known texts.
If one is unknown, the shortcut is off, and a line in the log names the function. This is decided
once, when the backend is imported. For functions that are patched later, each shortcut compares, at
each use, the bypassed functions with the ones that it found at first.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module, resources
from typing import Any

from pgbackend import conf
from pgbackend.driver.shortcuts import Switches, switches

from .fingerprints import Installed, find, of_text

logger = logging.getLogger("pgbackend.shortcuts")

_SQL = "django.db.models.sql.compiler"
_FIELDS = "django.db.models.fields"
_LOOKUPS = "django.db.models.lookups"
_BASE = "django.db.backends.base.base:BaseDatabaseWrapper"
_POSTGRES = "django.db.backends.postgresql"
_CONNECTION = "psycopg._connection_base:BaseConnection"
_CURSOR = "psycopg._cursor_base:BaseCursor"
_POOL = "psycopg_pool.pool_async:AsyncConnectionPool"
_WAITING = "psycopg_pool.pool_async:WaitingClient"


def _named(owner: str, names: str) -> tuple[str, ...]:
    return tuple(f"{owner}.{name}" for name in names.split())


@dataclass(frozen=True)
class Shortcut:
    """A row of the registry: a shortcut that does work of Django's or psycopg's in fewer steps."""

    name: str
    stands_for: str
    """A sentence that says what the shortcut does."""
    bypasses: tuple[str, ...]
    """The functions whose work the shortcut does, each as ``module:Class.method``."""
    needs: tuple[str, ...] = ()
    """The names of shortcuts without which this one does nothing."""


_COMPARING = (
    *_named(f"{_LOOKUPS}:Exact", "as_sql"),
    *_named(f"{_LOOKUPS}:BuiltinLookup", "process_lhs as_sql get_rhs_op"),
    *_named(f"{_LOOKUPS}:Lookup", "process_lhs"),
    *_named("django.db.models.expressions:Col", "as_sql"),
    *_named(f"{_SQL}:SQLCompiler", "compile"),
    *_named(f"{_POSTGRES}.operations:DatabaseOperations", "lookup_cast"),
    *_named("django.db.backends.base.operations:BaseDatabaseOperations", "field_cast_sql"),
)

SHORTCUTS = {
    each.name: each
    for each in (
        Shortcut(
            "select",
            "The SQL of a model's columns is cached; a SELECT is written from the parts it has",
            (
                *_COMPARING,
                *_named(
                    f"{_SQL}:SQLCompiler",
                    "setup_query pre_sql_setup get_select get_default_columns get_extra_select "
                    "quote_name_unless_alias quote_name as_sql get_converters "
                    "has_composite_fields",
                ),
                *_named(f"{_FIELDS}:Field", "get_col select_format get_db_converters cached_col"),
                *_named(f"{_FIELDS}:DurationField", "get_db_converters"),
                *_named(f"{_FIELDS}.related:ForeignKey", "get_col get_db_converters"),
                *_named("django.db.models.expressions:Col", "get_db_converters"),
                *_named("django.db.models.sql.query:Query", "get_initial_alias base_table"),
                *_named("django.db.models.sql.datastructures:BaseTable", "as_sql"),
                *_named("django.db.models.sql.where:WhereNode", "as_sql split_having_qualify"),
                *_named(
                    "django.db.backends.base.operations:BaseDatabaseOperations",
                    "limit_offset_sql",
                ),
            ),
        ),
        Shortcut(
            "known",
            "The SQL of a SELECT with one comparison is cached; integers in range are sent as is",
            (
                *_named(f"{_LOOKUPS}:IntegerFieldOverflow", "process_rhs"),
                *_named(f"{_LOOKUPS}:Lookup", "process_rhs get_db_prep_lookup"),
                *_named(f"{_LOOKUPS}:FieldGetDbPrepValueMixin", "get_db_prep_lookup"),
                *_named(f"{_FIELDS}:Field", "get_db_prep_value get_prep_value"),
                *_named(f"{_FIELDS}:IntegerField", "get_db_prep_value get_prep_value"),
                *_named(f"{_FIELDS}:AutoFieldMixin", "get_db_prep_value"),
                *_named(f"{_POSTGRES}.operations:DatabaseOperations", "adapt_integerfield_value"),
                *_named(
                    "django.db.backends.base.operations:BaseDatabaseOperations",
                    "integer_field_range",
                ),
            ),
            needs=("select",),
        ),
        Shortcut(
            "insert",
            "An INSERT of one row is written from cached SQL",
            (
                *_named(
                    f"{_SQL}:SQLInsertCompiler",
                    "field_as_sql prepare_value pre_save_val assemble_as_sql as_sql",
                ),
                *_named(f"{_SQL}:SQLCompiler", "get_converters apply_converters"),
                *_named(f"{_POSTGRES}.compiler:SQLInsertCompiler", "assemble_as_sql"),
                *_named(
                    f"{_POSTGRES}.operations:DatabaseOperations",
                    "bulk_insert_sql on_conflict_suffix_sql return_insert_columns",
                ),
                *_named(
                    "django.db.backends.base.operations:BaseDatabaseOperations",
                    "insert_statement modify_insert_params bulk_insert_sql returning_columns "
                    "fetch_returned_rows fetch_returned_insert_columns",
                ),
            ),
        ),
        Shortcut(
            "update",
            "An UPDATE with one comparison is written from the parts it has",
            (
                *_COMPARING,
                *_named(f"{_SQL}:SQLUpdateCompiler", "as_sql pre_sql_setup"),
                *_named(
                    "django.db.models.expressions:CombinedExpression",
                    "resolve_expression as_sql",
                ),
                *_named("django.db.models.expressions:Value", "resolve_expression"),
                *_named("django.db.models.expressions:BaseExpression", "resolve_expression"),
            ),
        ),
        Shortcut(
            "rows",
            "Objects are made from rows by a function that is written for their model",
            (
                *_named("django.db.models.base:Model", "__init__ from_db"),
                *_named("django.db.models.base:ModelState", "__del__"),
                *_named("django.db.models.query:ModelIterable", "__iter__"),
                *_named("django.db.models.query:RelatedPopulator", "__init__ populate"),
                *_named(
                    "django.db.models.fields.related_descriptors:ForeignKeyDeferredAttribute",
                    "__set__",
                ),
            ),
        ),
        Shortcut(
            "statements",
            "A statement of the ORM's is executed and fetched in one step, without a cursor",
            (
                *_named(f"{_SQL}:SQLCompiler", "execute_sql results_iter has_results"),
                *_named(f"{_SQL}:SQLInsertCompiler", "execute_sql"),
                *_named(f"{_SQL}:SQLUpdateCompiler", "execute_sql execute_returning_sql"),
                f"{_SQL}:cursor_iter",
                *_named(_BASE, "_prepare_cursor _cursor cursor validate_thread_sharing"),
                *_named(_BASE, "validate_no_broken_transaction make_cursor"),
                *_named(f"{_POSTGRES}.base:DatabaseWrapper", "create_cursor"),
                *_named(
                    "django.db.backends.utils:CursorWrapper",
                    "__init__ __getattr__ __enter__ __exit__ execute _execute_with_wrappers "
                    "_execute",
                ),
                *_named("psycopg.cursor:Cursor", "fetchone fetchmany"),
            ),
        ),
        Shortcut(
            "cursors",
            "A cursor on an open connection is made without Django's search for a connection",
            (
                *_named(
                    _BASE,
                    "_cursor cursor _prepare_cursor close_if_health_check_failed "
                    "ensure_connection make_cursor validate_thread_sharing",
                ),
                *_named(f"{_POSTGRES}.base:DatabaseWrapper", "create_cursor"),
                *_named("psycopg.connection:Connection", "cursor"),
            ),
        ),
        Shortcut(
            "blocks",
            "The outermost atomic block begins and ends in one step each",
            (
                *_named("django.db.transaction:Atomic", "__enter__ __exit__"),
                *_named(
                    _BASE,
                    "_commit commit get_autocommit set_autocommit validate_no_atomic_block "
                    "validate_thread_sharing run_and_clear_commit_hooks",
                ),
                *_named(f"{_POSTGRES}.base:DatabaseWrapper", "_set_autocommit"),
                *_named("psycopg.connection:Connection", "_set_autocommit set_autocommit"),
                *_named(_CONNECTION, "_set_autocommit_gen _check_intrans_gen"),
            ),
        ),
        Shortcut(
            "handler",
            "A request is served by a handler with fewer tasks and threads",
            _named(
                "django.core.handlers.asgi:ASGIHandler",
                "__call__ handle listen_for_disconnect run_get_response read_body create_request",
            ),
        ),
        Shortcut(
            "signals",
            "The receivers of a request's signals are remembered while they stay the same",
            _named("django.dispatch.dispatcher:Signal", "send asend _live_receivers"),
        ),
        Shortcut(
            "wrappers",
            "The DatabaseWrapper of an ended request is used by the next request",
            (
                *_named(_BASE, "__init__"),
                *_named("django.utils.connection:BaseConnectionHandler", "__getitem__"),
                *_named("django.db.utils:ConnectionHandler", "create_connection"),
            ),
        ),
        Shortcut(
            "lease",
            "A free connection, the one used last, is taken and given back without coroutines",
            (
                *_named(
                    _POOL,
                    "getconn _check_open_getconn _getconn_with_check_loop _getconn_unchecked "
                    "_get_ready_connection _check_connection putconn _maybe_close_connection "
                    "_putconn _return_connection _reset_connection _add_to_pool",
                ),
                *_named(_WAITING, "set"),
                *_named("psycopg_pool.base:BasePool", "_check_open_getconn _check_pool_putconn"),
            ),
        ),
        Shortcut(
            "queue",
            "Green code waits for a connection in its greenlet, without coroutines",
            (
                *_named(
                    _POOL,
                    "getconn _check_open_getconn _getconn_with_check_loop _getconn_unchecked "
                    "_get_ready_connection _maybe_grow_pool _check_connection",
                ),
                *_named(_WAITING, "__init__ wait"),
                *_named("psycopg_pool.base:BasePool", "_check_open_getconn"),
            ),
        ),
        Shortcut(
            "run",
            "A statement is sent, and its rows are loaded, by one cursor that is reused",
            (
                *_named("psycopg.connection:Connection", "cursor"),
                *_named("psycopg.cursor:Cursor", "__init__ execute fetchall close"),
                *_named("psycopg.cursor:Cursor", "_make_row_maker _fetch_pipeline"),
                *_named(
                    _CURSOR,
                    "__init__ _execute_gen _start_query _reset _convert_query _maybe_prepare_gen "
                    "_set_results _select_current_result _check_result_for_fetch _close rowcount",
                ),
                *_named("psycopg.client_cursor:ClientCursorMixin", "_get_prepared _execute_send"),
                *_named("psycopg._queries:PostgresClientQuery", "convert dump"),
                *_named(
                    "psycopg._queries:PostgresQuery",
                    "__init__ _ensure_bytes validate_and_reorder_params is_params_sequence",
                ),
                *_named("psycopg._preparing:PrepareManager", "maybe_add_to_cache"),
                *_named(_CONNECTION, "_start_query"),
            ),
            needs=("statements",),
        ),
        Shortcut(
            "begin",
            "BEGIN is sent in one message with the first statement of a transaction",
            (
                *_named(_CONNECTION, "_start_query _exec_command"),
                *_named("psycopg.client_cursor:ClientCursorMixin", "_execute_send"),
            ),
        ),
        Shortcut(
            "portals",
            "A greenlet whose function has ended is reused for the next one",
            (),
        ),
    )
}


def is_on(name: str) -> bool:
    """Return whether the shortcut `name` is on."""
    return name not in why_off()


def switch_driver() -> None:
    """Set the switches of the driver's own shortcuts."""
    for each in fields(Switches):
        setattr(switches, each.name, is_on(each.name))


@cache
def why_off() -> Mapping[str, str]:
    """Return the shortcuts that are off, by name, each with the reason.

    Also logs each shortcut that a patched or unknown function switches off. Raises
    `ImproperlyConfigured` if `PGBACKEND_SHORTCUTS` names an unknown shortcut.
    """
    switched_off, where = conf.shortcuts_switched_off(SHORTCUTS)
    reasons = {name: f"switched off by {where}" for name in SHORTCUTS if name in switched_off}
    look = _Look()
    for name, shortcut in SHORTCUTS.items():
        if name not in reasons and (function := look.first_unknown(shortcut)) is not None:
            distribution = distribution_of(function)
            version = f"{distribution} {installed_version(distribution)}"
            is_patched = function in look.patched
            reasons[name] = (
                f"{function} is patched"
                if is_patched
                else f"{function} of {version} has a source that is unknown to pgbackend"
            )
            level = logging.INFO if is_patched else logging.WARNING
            logger.log(level, "the shortcut %r is off: %s", name, reasons[name])
    for name, shortcut in SHORTCUTS.items():
        for other in shortcut.needs:
            if other in reasons:
                reasons.setdefault(name, f"it needs {other!r}")
    return reasons


#: The name of the distribution that has each package.
DISTRIBUTIONS = {"django": "Django", "psycopg": "psycopg", "psycopg_pool": "psycopg-pool"}


class _Look:
    """Compares installed functions with those that the shortcuts were written against."""

    def __init__(self) -> None:
        self._installed = Installed()
        self._known = known()
        self._is_known: dict[str, bool] = {}
        #: Functions that were patched before the backend was loaded.
        self.patched: set[str] = set()

    def first_unknown(self, shortcut: Shortcut) -> str | None:
        """Return the first bypassed function of `shortcut` whose text is unknown; else None."""
        for each in shortcut.bypasses:
            if each not in self._is_known:
                self._is_known[each] = self._compare(each)
            if not self._is_known[each]:
                return each
        return None

    def _compare(self, function: str) -> bool:
        series = self._series(distribution_of(function))
        texts: dict[str, list[str]] = self._known["functions"].get(function, {})
        try:
            text = self._installed.text(function)
        except OSError:  # installed without its source
            return False
        if text is not None:
            return has_series(texts.get(of_text(text), ()), series)
        if find(function) is not None:
            self.patched.add(function)
            return False
        # There is no such function: right if no known version of this series has it.
        return not any(has_series(versions, series) for versions in texts.values())

    @cache  # noqa: B019 - the object lives for one call of why_off()
    def _series(self, distribution: str) -> str:
        """Return the series to compare texts with: the installed one if known, else the newest."""
        installed = series_of(installed_version(distribution))
        every = [*map(series_of, self._known["versions"][distribution])]
        return installed if installed in every or not every else every[-1]


def distribution_of(function: str) -> str:
    """Return the name of the distribution that has this function."""
    return DISTRIBUTIONS[function.partition(".")[0]]


def installed_version(distribution: str) -> str:
    """Return `__version__` of the package, because reading its metadata would take longer."""
    package = next(each for each, its in DISTRIBUTIONS.items() if its == distribution)
    version: str = import_module(package).__version__
    return version


def known() -> Any:
    """Return `fingerprints.json`: the versions that were read, and each function's fingerprints."""
    file = resources.files(__package__).joinpath("fingerprints.json")
    return json.loads(file.read_text())


def has_series(versions: Iterable[str], series: str) -> bool:
    """Return whether one of `versions` belongs to `series`."""
    begins = f"{series}."
    return any(version == series or version.startswith(begins) for version in versions)


def series_of(version: str) -> str:
    """Return the series of a version: ``5.2`` of ``5.2.19``."""
    return ".".join(version.split(".")[:2])
