"""Runs the tests of the contract through PgBouncer in transaction mode: ``pytest --pooler newer``.

All connections of the alias 'default' then go through PgBouncer, with OPTIONS["pooler"], and every
message is recorded. `DOES_NOT_APPLY` is the one place that tells which tests are left out, and why.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

LEFT_OUT = pytest.StashKey[list[str]]()

_STREAMS = (
    "a stream outside of a transaction has a connection of its own, beside that of the statements "
    "in the loop's body"
)
_PINNED = "uses pinned() outside of a transaction, which is refused"
_SESSION = "is about what acts on a session become; they are refused, and nothing resets a session"
_SAME_SESSION = "tells connections apart by their sessions, which a pooler may share"
_SESSIONS_STAY = "looks at the server's sessions, which the pooler keeps"
_TWO_ERRORS = "kills sessions; PgBouncer adds an error of its own, which psycopg does not expect"
_ROLE = "connects to another server, which does not know the role that PgBouncer takes"
_MESSAGES = "SET is sent when the values change; here SET LOCAL is sent in each transaction"
_TERMINATES = "ends its sessions on the server; PgBouncer passes the error on to the next client"
_OTHER_PROJECT = "runs a project of its own, which goes through the pooler without the option"
_DJANGOS = "compares with Django's own engine, which does not know the option"
_OTHER_SERVERS = "is about servers and sessions of its own, beside those of this run's pooler"
_PLANS = "PgBouncer keeps stale plans until it is told RECONNECT (docs/poolers.md)"
_PASSWORD = "expects that the server asks for a password; this PgBouncer asks nobody"
_LISTENS = "leads what listens to a place of its own; in this run OPTIONS['listen'] leads past it"

#: Patterns of the ids of tests that do not apply, with the reason.
DOES_NOT_APPLY: dict[str, str] = {
    "test_c01_one_setting.py::test_both_engines_serve_one_request_*": _OTHER_PROJECT,
    "test_c01_servers.py::*": _OTHER_PROJECT,
    "test_c03_leases.py::*each_operation_has_as_many_leases*[[]iterator with*": _STREAMS,
    "test_c03_leases.py::test_a_statement_shares_the_lease_that_its_task_holds": _STREAMS,
    "test_c03_leases.py::test_a_task_never_waits_for_a_second_connection_while_*": _STREAMS,
    "test_c03_leases.py::test_pinned_*": _PINNED,
    "test_c04_streaming.py::test_statements_in_the_body_share_the_lease": _STREAMS,
    "test_c04_streaming.py::test_a_transaction_in_the_body_that_fails_loses_only_*": _STREAMS,
    "test_c06_tasks.py::test_an_eager_task_uses_the_database_beside_the_one_*": _SAME_SESSION,
    "test_c06_tasks.py::test_direct_orm_code_of_an_eager_task_is_refused_*": _STREAMS,
    "test_c07_cancellation.py::*[[]raw_cursor-*": _SESSION,
    "test_c07_cancellation.py::*": _SESSIONS_STAY,
    "test_c08_no_pool.py::*": _ROLE,
    "test_c08_pools.py::test_three_loops_in_three_threads_*": _PINNED,
    "test_c08_pools.py::test_how_many_connections_a_process_has_*": _PINNED,
    "test_c08_pools.py::test_an_exhausted_pool_says_who_holds_it_*": _PINNED,
    "test_c08_pools.py::test_a_holder_that_waits_for_a_second_*[[]pinned-*": _PINNED,
    "test_c08_pools.py::test_a_loop_in_a_thread_of_a_loop_has_a_pool_of_its_own": _SAME_SESSION,
    "test_c08_pools.py::test_a_pool_closes_with_its_loop_and_leaves_no_session": _SESSIONS_STAY,
    "test_c08_pools.py::test_a_loop_may_end_with_leases_waiters_and_blocks": _SESSIONS_STAY,
    "test_c08_pools.py::test_200_loops_that_come_and_go_leave_nothing": _SESSIONS_STAY,
    "test_c08_pools.py::test_a_hundred_idle_connections_killed_fail_no_request": _SESSIONS_STAY,
    "test_c08_pools.py::test_a_storm_that_kills_backends_*": _TWO_ERRORS,
    "test_c08_pools.py::test_sessions_that_end_while_others_are_opened_*": _TERMINATES,
    "test_c08_pools.py::test_no_circle_of_queues_is_missed_*": _PINNED,
    "test_c08_pools.py::test_a_silent_link_is_bounded_*": _ROLE,
    "test_c09_session_state.py::*": _SESSION,
    "test_c10_errors.py::test_a_driver_error_becomes_*[[]SET statement_timeout*": _SESSION,
    "test_c10_errors.py::test_what_lives_while_connections_work_shows_no_password": _PINNED,
    "test_c10_errors.py::test_no_error_of_connecting_shows_the_password": _PASSWORD,
    "test_c11_sync_and_async.py::test_a_task_keeps_its_session_when_a_thread_*": _PINNED,
    "test_c11_sync_and_async.py::test_each_request_begins_with_an_empty_query_log_*": _PINNED,
    "test_c11_sync_and_async.py::test_outside_a_block_the_thread_has_its_own_*": _PINNED,
    "test_c11_threads.py::test_a_thread_may_make_the_first_statement_of_its_loop": _SESSION,
    "test_c13_tools.py::test_statistics_tell_of_every_pool": _PINNED,
    "test_c14_pooler.py::test_statements_are_prepared_in_every_context": _SAME_SESSION,
    "test_c14_pooler.py::test_a_transaction_that_meets_an_altered_table_fails_once": _PLANS,
    "test_c15_programs.py::*": _SESSION,
    "test_c15_session.py::test_settings_travel_in_the_message_of_the_statement_*": _MESSAGES,
    "test_c15_session.py::test_statements_that_cannot_share_a_message_run_with_*": _MESSAGES,
    "test_c15_session.py::test_a_derived_wrapper_may_set_what_a_block_declares": _SESSION,
    "test_c15_session.py::test_raw_sql_that_changes_a_declared_setting_lasts_*": _SESSION,
    "test_c15_session.py::test_a_value_that_raw_sql_has_set_before_the_block_is_*": _SESSION,
    "test_c15_session_more.py::test_a_text_that_begins_with_begin_or_rollback_*": _SESSION,
    "test_c15_session_more.py::test_a_receiver_that_sets_connections_up_runs_*": _SESSION,
    "test_c15_session_more.py::test_a_callback_of_the_pool_that_resets_*": _SESSION,
    "test_c16_left_behind.py::*": _TERMINATES,
    "test_c17_holders.py::test_a_timeout_names_a_stream_that_nobody_reads": _STREAMS,
    "test_c17_holders.py::test_by_choice_a_hold_*[[]pinned_before_a_block]": _PINNED,
    "test_c17_listen.py::test_sync_and_green_code_notify_*": _SESSIONS_STAY,
    "test_c17_listen.py::test_a_silent_link_is_noticed_*": _LISTENS,
    "test_c17_listen.py::test_an_outage_is_asked_*": _LISTENS,
    "test_c17_listen.py::test_a_server_that_cannot_be_reached_*": _LISTENS,
    "test_c17_listen.py::test_a_wrong_role_is_told_*": _LISTENS,
    "test_c17_listen.py::test_listening_needs_a_way_round_*": _LISTENS,
    "test_c17_listen.py::TestItsOwnWay::*": _LISTENS,
    "test_c17_listen.py::test_a_name_that_the_database_cannot_store_*": _ROLE,
    "test_c17_listen.py::test_a_restart_and_a_failover_*": _OTHER_SERVERS,
    "test_c17_listen_losses.py::*any_byte*": _LISTENS,
    "test_c17_listen_losses.py::test_an_overdue_gap_*": _LISTENS,
    "test_c17_listen_losses.py::test_a_link_through_the_alias_*": _LISTENS,
    "test_c17_options.py::test_a_coroutine_function_of_the_pool_is_*[[]reset]": _SESSION,
    "test_c17_replicas.py::test_each_way_to_write_counts[[]in_a_pipeline]": _PINNED,
    "test_c17_shutdown.py::*": _OTHER_SERVERS,
    "test_c17_switchover.py::*": _OTHER_SERVERS,
    "test_c17_topology.py::*": _OTHER_SERVERS,
    "test_c17_vanished_host.py::*": _OTHER_SERVERS,
    "test_c18_shortcuts.py::test_a_patch_of_what_is_bypassed_is_called_as_on_*": _DJANGOS,
}

#: Patterns of tests that apply, although a pattern above fits: its reason is that of their file.
APPLIES = ("test_c07_cancellation.py::test_an_operation_that_is_interrupted_anywhere_*",)


def add_option(parser: pytest.Parser) -> None:
    """Add the option ``--pooler``."""
    parser.addoption(
        "--pooler",
        choices=["older", "newer"],
        help="run the contract's tests through this PgBouncer, in transaction mode",
    )


def leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that do not apply to a run through a pooler."""
    if not config.option.pooler:
        return
    left = [item for item in items if reason(item.nodeid) is not None]
    items[:] = [item for item in items if reason(item.nodeid) is None]
    config.hook.pytest_deselected(items=left)
    config.stash[LEFT_OUT] = [item.nodeid for item in left]


def reason(nodeid: str) -> str | None:
    """Return why a test does not apply; None if it does."""
    name = nodeid.removeprefix("tests/contract/")
    applies = any(fnmatchcase(name, pattern) for pattern in APPLIES)
    for pattern, why in DOES_NOT_APPLY.items():
        if applies and pattern.endswith("::*"):
            continue
        if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}[[]*"):
            return why
    return None
