"""Let Django's `Atomic` open and end its blocks, each when the running code has the turn.

`atomic_methods` calls `enter()` and `leave()` in the place of `Atomic.__enter__` and `__exit__`.
They wait for the turn, and then call Django's methods, unedited. See Note [Turns] and Note [Blocks
that are left] in transactions.py.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Protocol

from django.db import transaction
from django.db.transaction import TransactionManagementError

from . import frames, state
from .block_context import enter_block, find_place, inside, join_in_tests
from .driver import bridge
from .driver.bridge import Portal
from .driver.finalizers import is_collecting
from .generators import carried
from .protocols import Atomic, Wrapper
from .transactions import Block
from .transactions import end as end_transaction

_get_running_loop = asyncio._get_running_loop
_running = bridge.running

#: Django's method, before `hooks` replaces it.
_djangos_exit: Callable[..., None] = transaction.Atomic.__exit__


# --- The seam: an outermost block in one step -----------------------------------------------------


class OpenAtOnce(Protocol):
    """The type of `open_at_once`: open an outermost block and return it, or return None.

    None: nothing was done, and Django must open the block. `here` is the running code's portal.
    """

    def __call__(self, here: Portal, wrapper: Wrapper, atomic: Atomic) -> Block | None: ...


class CommitAtOnce(Protocol):
    """The type of `commit_at_once`: commit `block` and return True, or return False.

    False: nothing was done, and Django must end the block. Called only when the `with` of `atomic`
    ends without an error. `frame` is the frame of this `with`; `block` is the block that the
    context names, or None.
    """

    def __call__(
        self, wrapper: Wrapper, atomic: Atomic, frame: FrameType, block: Block | None
    ) -> bool: ...


def _never_open(here: Portal, wrapper: Wrapper, atomic: Atomic) -> Block | None:
    """Return None, so that Django opens the block: the default of the seam `open_at_once`."""
    return None


def _never_commit(wrapper: Wrapper, atomic: Atomic, frame: FrameType, block: Block | None) -> bool:
    """Return False, so that Django ends the block: the default of the seam `commit_at_once`."""
    return False


#: The seam: green code calls `open_at_once` before it opens a block, and `commit_at_once` before it
#: ends a block without an error. By default both let Django do the work; `pgbackend.fast.blocks`
#: assigns functions that do it faster where the result is the same.
open_at_once: OpenAtOnce = _never_open
commit_at_once: CommitAtOnce = _never_commit


# --- The ends of a `with` -------------------------------------------------------------------------


class _AsyncWith(threading.local):
    """A thread-local that passes the frame of an `async with` to `enter()` or `leave()`.

    `__aenter__()` and `__aexit__()` set `frame`; no other code of the thread runs until `enter()`
    or `leave()` takes it.
    """

    frame: FrameType | None = None


async_with = _AsyncWith()


def enter(wrapper: Wrapper, atomic: Atomic, enter_djangos: Callable[[Atomic], None]) -> None:
    """Wait for the running code's turn, then open the block with `enter_djangos`.

    `enter_djangos` is Django's `Atomic.__enter__`; the seam `open_at_once` may replace it. The
    `with` statement must be in the frame of the caller's caller, unless `async_with.frame` is set.
    """
    frame, async_with.frame = async_with.frame, None
    here = _running()  # without a call of `bridge.green()`
    if type(here) is not Portal or _get_running_loop() is None or atomic._from_testcase:  # noqa: SLF001
        _open(wrapper, atomic, enter_djangos)
        return
    frame = frames.of_with(frame or sys._getframe(2))
    if carried:
        find_place(wrapper._key)
    block = open_at_once(here, wrapper, atomic)
    if block is None:
        _open(wrapper, atomic, enter_djangos)
        block = state.current_block(wrapper)
    if block is not None and block.atomic is None:
        block.remember(atomic, frame, here.found.sessions)


def _open(wrapper: Wrapper, atomic: Atomic, enter_djangos: Callable[[Atomic], None]) -> None:
    """Wait for the running code's turn, then let Django open the block."""
    wrapper.check_context("transaction.atomic")
    block = _push_in_turn(wrapper)
    try:
        enter_djangos(atomic)
    except BaseException:
        if block is not None:
            block.transaction.pop(block)
            enter_block(wrapper, block.parent)
        raise
    if block is not None:
        block.transaction.settle(block)
    if atomic._from_testcase:  # noqa: SLF001
        join_in_tests(wrapper, state.current_block(wrapper))


def _push_in_turn(wrapper: Wrapper) -> Block | None:
    """Wait for the running code's turn, then push a block inside its block, without SQL.

    Return the new block, or None if the running code is in no block.
    """
    while True:
        state.take_turn(wrapper)
        if (current := state.current_state(wrapper)).pooled:
            wrapper.begin_if_due(current)
        parent = state.current_block(wrapper)
        if parent is None or parent.transaction.state.transaction is None:
            return None
        if (block := parent.transaction.push(parent)) is not None:
            enter_block(wrapper, block)
            return block


def leave(
    wrapper: Wrapper, atomic: Atomic, leave_djangos: Callable[..., None], exc_info: tuple[Any, ...]
) -> None:
    """Wait for the running code's turn (not after an error), then end the block.

    `leave_djangos` is Django's `Atomic.__exit__`; the seam `commit_at_once` may replace it. The
    `with` statement must be in the frame of the caller's caller, unless `async_with.frame` is set.
    The block may be another than the context names: see Note [Blocks that are left] in
    transactions.py.
    """
    frame, async_with.frame = async_with.frame, None
    if not atomic.__dict__.get("_pgbackend_blocks"):  # opened outside portals: not recorded
        _leave(wrapper, atomic, leave_djangos, exc_info, state.named_block(wrapper))
        return
    frame = frame or sys._getframe(2)
    here = state.named_block(wrapper)
    if exc_info[0] is None and commit_at_once(wrapper, atomic, frame, here):
        return
    if here is not None and here.atomic is atomic and here.frame is frame and _may_end(frame):
        here.begin_to_leave()
        try:
            _leave(wrapper, atomic, leave_djangos, exc_info, here)
        finally:
            here.leave()
        return
    frame = frames.of_with(frame)
    block = _block_of(wrapper, atomic, frame, here)
    if block is None or (block.atomic is None and block is here):
        _leave(wrapper, atomic, leave_djangos, exc_info, block)
    else:
        _leave_elsewhere(wrapper, atomic, leave_djangos, exc_info, block)


def _leave_elsewhere(
    wrapper: Wrapper,
    atomic: Atomic,
    leave_djangos: Callable[..., None],
    exc_info: tuple[Any, ...],
    block: Block,
) -> None:
    """End `block` from code that may be in another block or task, or may be unable to wait."""
    here = state.named_block(wrapper)
    block.notice_end_of_opener()
    block.begin_to_leave()
    try:
        if block.transaction.state.pooled and not _can_wait(block, here):
            _leave_without_waiting(wrapper, atomic, block)
            if exc_info[0] is None:
                wrapper.check_context("transaction.atomic")
                block.say_why_it_ended()
        elif (
            block is here and block.opener is not None and (block.opener() is bridge.current_task())
        ):
            _leave(wrapper, atomic, leave_djangos, exc_info, block)
        else:
            if block.opener is not None and block.opener() is not bridge.current_task():
                block.left = True  # its opener is out of the block, however long the end takes
            with inside(wrapper, block), _in_turn(block):
                _leave(wrapper, atomic, leave_djangos, exc_info, block)
    finally:
        block.leave()


@contextmanager
def _in_turn(block: Block) -> Iterator[None]:
    """Let the code of this `with`, which ends `block`, first wait for statements in flight.

    The statements are those that other tasks have sent in `block`: these tasks do not expect that a
    task ends a block which it did not open. (When the task that opened a block ends it with an
    error, the statements of child tasks are cancelled instead.) Does nothing if no pooled
    connection is in use.
    """
    connection = block.transaction.state.connection
    if connection is None or not block.transaction.state.pooled:
        yield
        return
    connection.ends_in_turn = True
    try:
        yield
    finally:
        connection.ends_in_turn = False


def _block_of(
    wrapper: Wrapper, atomic: Atomic, frame: FrameType | None, here: Block | None
) -> Block | None:
    """Return the block that the `with` of `atomic` in `frame` opened, as far as is known.

    `here` is the block that the context names, or None. It is returned if the block was not
    recorded, as outside of portals. If no recorded block has this `frame`, the last block of
    `atomic` is returned.
    """
    key = wrapper._key
    opened: list[Block]
    opened = [each for each in atomic.__dict__.get("_pgbackend_blocks", ()) if each.key == key]
    found = [each for each in opened if each.frame is frame]
    if not found and here is not None and here.atomic is None and not here.left:
        return here  # opened outside portals: not recorded
    found = found or opened
    return here if here in found or not found else found[-1]


def _may_end(frame: FrameType) -> bool:
    """Return whether `_leave()` may end the running code's own block, whose `with` is in `frame`.

    Return False if `_leave_elsewhere()` must end the block: if the code cannot wait, or if `frame`
    is a generator's, whose block any task may end.
    """
    if frame in carried or is_collecting():
        return False
    here = _running()  # without a call of `bridge.current()`
    if type(here) is Portal:
        return not here.closing
    return _get_running_loop() is None


def _can_wait(block: Block, here: Block | None) -> bool:
    """Return whether the running code can wait for a statement that ends `block`."""
    if is_collecting():
        return False
    portal = bridge.current()
    if portal is not None:
        return not portal.closing
    # A thread can if it takes part in the transaction; not if it just happens to close a generator.
    return _get_running_loop() is None and block is here


# --- Blocks that end where code cannot wait -------------------------------------------------------


def _leave_without_waiting(wrapper: Wrapper, atomic: Atomic, block: Block) -> None:
    """Have another task or the pool roll `block` back, because the running code cannot wait."""
    if block.ended:
        return
    block.reason = block.reason or (
        "an atomic block was rolled back: it ended where nothing can be waited for (its task was "
        "dropped, or the garbage collector or a thread has closed its generator). Let a task end "
        "its own blocks, and close generators that hold one ('contextlib.aclosing()')"
    )
    if block.parent is not None:
        if state.named_block(wrapper) is block:
            enter_block(wrapper, block.parent)
        _leave_later(block)
        return
    block.undone = True
    ended = block.transaction.state
    lease = ended.lease
    with inside(wrapper, block):
        end_transaction(wrapper, ended)
    if state.named_block(wrapper) is block:
        enter_block(wrapper, None)
    if lease is not None:
        lease.end_at_home(block.reason)  # the pool rolls back what is open


#: The tasks of `_start_to_leave()`: a task that nothing refers to may be collected.
_leaving: set[asyncio.Task[None]] = set()


def _leave_later(block: Block) -> None:
    """Have a new task roll `block` back on its event loop, because the running code cannot."""
    atomic = block.atomic
    home = block.transaction.home
    if home is None or home.is_closed():
        _doom(block)
    else:
        with suppress(RuntimeError):  # the loop was closed just now
            home.call_soon_threadsafe(_start_to_leave, home, atomic, block)


Block.leave_later = _leave_later  # type: ignore[assignment,method-assign]


def _doom(block: Block) -> None:
    """Mark `block` as ended and its parent as to be rolled back: no loop can roll back `block`."""
    parent = block.parent
    assert parent is not None
    block.transaction.pop(block)
    parent.transaction.doom(parent, True)


def _start_to_leave(home: asyncio.AbstractEventLoop, atomic: Atomic | None, block: Block) -> None:
    """Start the task that rolls `block` back; the block's loop, `home`, calls this function."""
    if block.ended:
        return
    task = asyncio.Task(_leave_in_task(atomic, block), loop=home, context=state.no_context())
    _leaving.add(task)
    task.add_done_callback(_leaving.discard)


async def _leave_in_task(atomic: Atomic | None, block: Block) -> None:
    """Roll `block` back, in a task of its own."""
    assert atomic is not None
    wrapper = transaction.get_connection(atomic.using)
    error = TransactionManagementError(block.reason or "its generator was collected")
    exc_info = (type(error), error, None)

    def roll_back() -> None:
        if not block.ended:
            with inside(wrapper, block), _in_turn(block):
                _leave(wrapper, atomic, _djangos_exit, exc_info, block)

    await bridge.run(roll_back)


# --- The end of a block, in its turn --------------------------------------------------------------


def _leave(
    wrapper: Wrapper,
    atomic: Atomic,
    leave_djangos: Callable[..., None],
    exc_info: tuple[Any, ...],
    block: Block | None,
) -> None:
    """Wait until no block is open inside `block`, which the running code is in; then end `block`.

    If the `with` ends with an error (`exc_info`), the blocks inside are rolled back, too, instead
    of waited for. `leave_djangos` sends the SQL. It is not called if other code has rolled `block`
    back already; then, without an error, `TransactionManagementError` is raised. If `block` is
    None, `leave_djangos` is called at once.
    """
    refusal = None
    try:
        if block is not None and not block.ended:
            refusal = _begin_to_end(wrapper, block, failed=exc_info[0] is not None)
            if refusal is not None:
                exc_info = (type(refusal), refusal, refusal.__traceback__)
        if block is None or not block.ended or not block.was_ended_by_others():
            leave_djangos(atomic, *exc_info)
        elif exc_info[0] is None:
            block.check_not_ended()
    finally:
        if block is not None:
            end_block(wrapper, block)
        if atomic._from_testcase:  # noqa: SLF001
            join_in_tests(wrapper, block.parent if block is not None else None)
    if refusal is not None:
        try:
            raise refusal
        finally:
            del refusal, exc_info  # their traceback refers to this frame: a reference cycle


def _leave_what_is_inside(wrapper: Wrapper, block: Block) -> None:
    """Roll back the blocks inside `block` that the running task still has open in generators."""
    while (inner := block.transaction.innermost) is not block:
        if inner is None or inner.atomic is None or inner.frame not in carried:
            return  # another task's: `_why_to_roll_back()` waits for its end
        opener = None if inner.opener is None else inner.opener()
        if opener is None or opener is not bridge.current_task():
            return
        inner.reason = (
            "an atomic block was rolled back: the block around it has ended before the generator "
            "which it is in. Close the generator first ('contextlib.aclosing()')"
        )
        error = TransactionManagementError(inner.reason)
        with inside(wrapper, inner):
            _leave(wrapper, inner.atomic, _djangos_exit, (type(error), error, None), inner)


def _why_to_roll_back(wrapper: Wrapper, block: Block) -> BaseException | None:
    """Wait until no block is open inside `block`; if that fails, return the error, else None."""
    try:
        _leave_what_is_inside(wrapper, block)
        block.transaction.take_turn(block)
    except BaseException as exc:
        return exc
    return None


def _begin_to_end(wrapper: Wrapper, block: Block, *, failed: bool) -> BaseException | None:
    """Push a last block inside `block`, so that only the running code may send statements.

    If `failed` (the `with` ends with an error), the blocks open inside `block` are marked as ended;
    otherwise their end is waited for. If that wait fails, return its error: `block` must be rolled
    back. Else return None. See Note [Turns] in transactions.py.
    """
    refusal = None
    while not block.ended:
        if not failed and block.transaction.innermost is not block:
            refusal = _why_to_roll_back(wrapper, block)
            failed = refusal is not None
        block.undone = failed or block.transaction.state.needs_rollback
        if failed:
            block.transaction.claim(block)
        if (ending := block.transaction.push(block)) is not None:
            enter_block(wrapper, ending)
            break
    return refusal


def end_block(wrapper: Wrapper, block: Block) -> None:
    """Record that `block` has ended, and put the running code in the block around it."""
    if block.parent is not None:
        block.doomed = False
        block.transaction.pop(block)
        enter_block(wrapper, block.parent)
        return
    ending = block.transaction.innermost
    if ending is not None and ending.parent is block:
        block.doomed = False
        block.transaction.pop(ending)
        enter_block(wrapper, block)
    if not block.transaction.state.in_atomic_block and not block.ended:
        # Autocommit was not set again: the connection was closed inside the block, or the end of
        # the block was interrupted. The pool rolls back what is open.
        ended = block.transaction.state
        if ended.commit_on_exit or ended.connection is None:
            end_transaction(wrapper, ended)
            if ended.lease is not None:
                ended.lease.end()
