"""Transactions and their blocks: who takes part, whose turn it is, how a block ends.

Tasks may share a `Transaction`; each `atomic` inside of it is a `Block`. `atomic_blocks` opens and
ends them, around Django's own code.

Note [Turns]
A transaction is a chain of blocks; exactly one, the innermost, is open for statements. Code runs
inside the block that its context names. While a sibling has opened a block below it, code waits
(`take_turn`); when its block has ended, its statements are refused. So savepoints of tasks that
share a transaction never overlap, and no statement slips out of the block it was written in.
A block that is being ended counts as one more, in which only the code that ends it is: statements
of others would come after the COMMIT or ROLLBACK that is on its way.
Code that leaves its block with an exception waits for nobody: the blocks that are open inside are
rolled back with it (`claim`).
Threads may take part, too, and another thread may open or end a block between any two instructions.
So blocks change under a lock (`_changing`); only one of two that open a block at the same time does
so (`push`); and a statement looks again when it has the connection's lock (`may_send`). Statements
that came to that lock before the SAVEPOINT, or the end, of a block are sent before it: the block
has not `begun`.

Note [Blocks that are left]
A block belongs to its `with`, which remembers it (atomic_blocks.py), and not to the context in
which the `with` ends. Generators may be stepped, closed and left by other tasks than the one that
has opened a block in them; so may the contents of an `ExitStack`. Then
- code that is called from the generator takes part in its block (`find_place` in block_context.py),
  for as long as it is called from there; it is refused if the block has ended without it;
- the task whose block ended elsewhere, or whose generator was left by `break`, is where it was
  before the block (`where_left` there);
- a block that is still open when the task ends which has opened it is rolled back (`orphan`).
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from time import monotonic
from types import FrameType
from typing import Any

from django.db.transaction import TransactionManagementError

from . import conf, frames, generators
from .block_context import (
    blocks_here,
    enter_block,
    look_again,
    name_of_task,
    name_of_thread,
    named_blocks,
    settle_before_tasks,
    test_blocks,
    where_left,
    with_block,
)
from .driver import bridge
from .driver.errors import PortalClosed
from .driver.lease import Lease
from .driver.parking import ParkingLock, Waiter
from .generators import carried
from .protocols import Atomic, Wrapper
from .sessions import Key, Left, Session, Sessions, State

_get_running_loop = asyncio._get_running_loop

#: Held while the blocks of a transaction change, or whether one is to be rolled back. The garbage
#: collector may end a transaction in the thread that holds it.
_changing = threading.RLock()


class Block:
    """One `atomic` block, or one stretch of manual transaction management."""

    # The values of a new one are on the class, once for all.

    ended = False
    #: The task that has opened it, and its name; None if a thread has.
    opener: weakref.ref[asyncio.Task[Any]] | None = None
    task: str | None = None
    thread = 0
    #: Whether an outer block was left with an exception while this one was open.
    claimed = False
    #: Whether it must be rolled back, as was found while a sibling's block was open in it.
    doomed = False
    #: Whether a statement that opens or ends a block is on its way; and whether one has been sent.
    moving = False
    begun = False
    #: The `Atomic` of the `with` that has opened it, and the frame of that `with`. None for
    #: transactions that are managed by hand, and for blocks that nobody else can meet.
    atomic: Atomic | None = None
    frame: FrameType | None = None
    #: Whether that frame is of a generator that a context manager is made of.
    in_context_manager = False
    #: Whether its end has begun, at least; and whether it is rolled back.
    leaving = False
    undone = False
    #: Whether its `with` has ended, or is about to, since its generator was left.
    left = False
    #: The sessions of the task that has opened it; they list it.
    sessions: Sessions | None = None
    #: Why it has ended before its `with`.
    reason: str | None = None

    def __init__(self, transaction: Transaction, parent: Block | None) -> None:
        self.transaction = transaction
        self.parent = parent
        if _get_running_loop() is not None and (task := asyncio.current_task()) is not None:
            self.task = bridge.name_of(task)
            self.opener = weakref.ref(task)
        else:
            self.thread = threading.get_ident()

    @property
    def key(self) -> Key:
        """Return the key of its database."""
        return id(self.transaction.settings_dict)

    @property
    def owner(self) -> str:
        """Return the name of the task or thread that has opened it, for messages."""
        return name_of_thread(self.thread) if self.task is None else f"task {self.task!r}"

    def remember(self, atomic: Atomic, frame: FrameType | None, sessions: Sessions) -> None:
        """Note the `with` that has opened this block. See Note [Blocks that are left]."""
        self.atomic, self.frame, self.sessions = atomic, frame, sessions
        atomic.__dict__.setdefault("_pgbackend_blocks", []).append(self)
        if not sessions.watched:
            sessions.watch()
        sessions.blocks.append(self)
        if frame is None:
            return
        if frame.f_code.co_flags & generators.GENERATORS:
            self.in_context_manager = frames.is_of_context_manager(frame)
            generators.carry(frame, self)
            settle_before_tasks()

    def leave_later(self) -> None:
        """Let a task of its own roll the block back; `atomic_blocks` defines this method."""
        raise NotImplementedError

    def was_ended_by_others(self) -> bool:
        """Return whether others have rolled it back, and Django has written that down already."""
        return self.claimed or (self.ended and self.reason is not None)

    def begin_to_leave(self) -> None:
        """Note that the `with` ends: code that its end calls is not in the block any more."""
        self.leaving = True
        if carried:
            generators.drop(self.frame, self)

    def leave(self) -> None:
        """Note that the `with` has ended."""
        self.left = True
        if self.atomic is not None:
            self.atomic._pgbackend_blocks.remove(self)  # noqa: SLF001 - ours
            self.atomic = self.frame = None

    def forget_task(self) -> None:
        """Take the ended block from the list of the task that has opened it."""
        if self.sessions is not None:
            self.sessions.blocks.remove(self)
            self.sessions = None

    def check_not_ended(self) -> None:
        """Raise `TransactionManagementError` if the block has ended."""
        self.say_why_it_ended()
        if self.ended:
            raise TransactionManagementError(
                f"{name_of_task()} was started inside an atomic block of {self.owner} that has "
                "ended: its statements would not be part of that transaction any more. Await the "
                "task inside the block, or start it with 'pgbackend.detached()'."
            )

    def say_why_it_ended(self) -> None:
        """Raise `TransactionManagementError` if others have ended it, or a block around it."""
        block: Block | None = self
        while block is not None:
            if block.reason is not None:
                raise TransactionManagementError(block.reason) from None
            block = block.parent

    def why_cursors_are_gone(self) -> Exception | None:
        """Return an error if the server closes, or has closed, cursors that were opened inside."""
        block: Block | None = self
        while block is not None:
            if block.undone or (block.parent is None and block.leaving and not block.ended):
                return TransactionManagementError(
                    block.reason
                    or "the server has closed this cursor at the end of the atomic block that it "
                    "was opened in: read its rows inside of the block"
                )
            block = block.parent
        return None

    def is_lost(self) -> bool:
        """Return whether nobody will ever end it: its loop is closed."""
        home = self.transaction.home
        return home is not None and home.is_closed()

    def abandon(self) -> None:
        """Leave the block at once: its generator is about to be closed, by another task."""
        if self.left:
            return
        self.left = True
        settle_before_tasks()
        lease = self.transaction.state.lease
        if self.parent is None and lease is not None:
            lease.task = None  # others do not wait for the task that has opened it
        if blocks_here().get(self.key) is self:
            named_blocks.set(with_block(blocks_here(), self.key, self.parent))
            look_again()

    def may_be_left_with_step(self) -> bool:
        """Return whether the block, or one around it, is in a generator that code has iterated."""
        block: Block | None = self
        while block is not None:
            if block.frame in carried and not block.in_context_manager:
                return True
            block = block.parent
        return False

    def notice_end_of_opener(self) -> None:
        """Roll the block back if its opener has ended: `orphan()` may not have been called yet."""
        opener = None if self.opener is None else self.opener()
        if opener is not None and opener.done():
            self.orphan(opener)

    def orphan(self, task: asyncio.Task[Any]) -> Left | None:
        """Roll the block back, since `task`, which has opened it, has ended; return a warning."""
        if self.ended or self.left:
            return None
        name = f"task {bridge.name_of(task)!r}"
        place = "an unknown place" if self.frame is None else frames.place_of(self.frame)
        self.reason = (
            f"an atomic block was rolled back: {name}, which had opened it in {place}, ended "
            "before the block did. Open and leave a block in one task: let one task make all the "
            "steps of a generator that holds one, and close it ('contextlib.aclosing()')"
        )
        state = self.transaction.state
        if self.parent is None and state.pooled:
            lease, state.transaction = state.lease, None
            self.transaction.end()
            if lease is not None:
                lease.end(self.reason)
        elif self.atomic is not None:
            self.leave_later()
        return self.reason, lambda: not self.left and not self.is_lost()


class Transaction:
    """A transaction, which tasks may share. See Note [Turns]."""

    # fmt: off
    __slots__ = (
        "changes", "home", "innermost", "leasing", "lender", "owner", "settings_dict", "state",
        "task", "waiters",
    )
    # fmt: on

    def __init__(self, state: State, settings_dict: Mapping[str, Any]) -> None:
        self.state = state
        self.settings_dict = settings_dict
        #: The session that lends its lease to this transaction, if one does.
        self.lender: Session | None = None
        self.innermost: Block | None = Block(self, None)
        #: The loop whose pool gives the connection; None for one that has its own.
        self.home = _get_running_loop() if state.pooled else None
        #: The task that has begun it; None in a thread.
        self.owner = None if self.home is None else asyncio.current_task()
        #: For the first statement, which may be made by two tasks at once.
        self.leasing = ParkingLock() if state.pooled else None
        self.waiters: list[Waiter] = []
        #: How often its blocks have changed in a way that somebody may wait for.
        self.changes = 0
        #: The task with which it ends, if it is managed by hand.
        self.task: asyncio.Task[Any] | None = None

    def end_with_task(self) -> None:
        """Roll the transaction, which is managed by hand, back when the running task ends.

        Nobody could end it after that.
        """
        if self.task is None:
            self.task = asyncio.current_task()
            if self.task is not None:
                self.task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        """End the transaction, rolled back, since `task`, which has begun it, has ended."""
        lease = self.state.lease
        self.state.transaction = None
        self.end()
        if lease is not None:
            lease.end()

    def borrow(self) -> Lease | None:
        """Take over the lease of the session that began the transaction; None if it has none."""
        if self.lender is None:
            return None
        lease, self.lender.state.lease = self.lender.state.lease, None
        self.lender.state.connection = None
        if lease is None:
            self.lender = None
        elif self.lender.pins:
            lease.pins -= 1  # the transaction pins it
        return lease

    def take(self, lease: Lease) -> bool:
        """Use the connection of `lease` until the end; return False if that has come already."""
        with _changing:
            inner = self.innermost
            if inner is None or (inner.moving and inner.begun):
                return False
            self.state.take(lease)
            lease.pin()
            lease.task = self.owner  # the task that has begun the block ends the lease
            lease.connection.turns = self
            # psycopg begins with the first statement.
            lease.connection._autocommit = False  # noqa: SLF001
            return True

    def end_unleased(self) -> None:
        """Let nobody lease a connection any more if there is none: the end, now, sends nothing."""
        with _changing:
            inner = self.innermost
            if self.state.connection is None and inner is not None and inner.moving:
                inner.begun = True

    def give_up_lease(self) -> None:
        """End the lease, even if a cursor was left open on it; give a borrowed one back."""
        lease, lender = self.state.lease, self.lender
        assert lease is not None
        if lender is None:
            lease.end()
            return
        if lender.state.lease is None and (lender.pins or lease.cursors):
            self.state.lease = self.state.connection = None
            lease.connection.turns = None
            lender.state.take(lease)
            lease.pins += bool(lender.pins)
        lease.unpin()

    def take_turn(self, block: Block) -> None:
        """Wait until statements of `block` may run. See Note [Turns].

        Raises `TransactionManagementError` when the block has ended, or after the pool's `timeout`.
        Returns early if the task that waits has opened the block, and is out of it meanwhile.
        """
        if self.innermost is block:
            return
        timeout = conf.pool_timeout(self.settings_dict)
        deadline = monotonic() + timeout
        while True:
            seen = self.changes
            if self.innermost is block:
                return
            if block.left and where_left(block) is not block:
                return  # it ended meanwhile: the caller looks again where the code is
            block.check_not_ended()
            in_time = self._wait(seen, max(0.0, deadline - monotonic()))
            if not in_time and self.innermost is not block:
                self._give_up(block, timeout)

    def _wait(self, seen: int, timeout: float | None) -> bool:
        """Wait until there are more than `seen` changes; return False after `timeout` seconds."""
        waiter = Waiter()
        self.waiters.append(waiter)
        try:
            # `_wake()` counts before it looks who waits: none of the two can miss the other.
            return self.changes != seen or waiter.wait(timeout)
        finally:
            with suppress(ValueError):  # another thread has woken it
                self.waiters.remove(waiter)

    def _give_up(self, block: Block, timeout: float) -> None:
        """Raise `TransactionManagementError`: the turn of `block` has not come in time."""
        block.check_not_ended()
        assert self.innermost is not None
        raise TransactionManagementError(
            f"{name_of_task()} waited {timeout:g} s for its turn in a transaction that it "
            f"shares with {self.innermost.owner}, which has an atomic block open inside it. Let "
            "that block end first, or run the task outside with 'pgbackend.detached()'. (How long "
            "to wait is the pool's 'timeout'.)"
        )

    def push(self, parent: Block) -> Block | None:
        """Open a block inside `parent`; return it, or None if `parent` is not the innermost.

        It is marked as moving until `settle()` or `pop()`.
        """
        block = Block(self, parent)
        block.moving = True
        with _changing:
            if self.innermost is not parent:
                return None
            self.innermost = block
            if parent.ended:  # the collector ended it between the last two lines
                self.innermost = None
                return None
        return block

    def settle(self, block: Block) -> None:
        """Note that the statement which opens `block` is done."""
        block.begun, block.moving = True, False
        self._wake()

    def pop(self, block: Block) -> None:
        """End `block`, and the blocks inside of it."""
        parent = block.parent
        with _changing:
            if block.ended:
                return
            self._end_blocks(parent)
            if parent is not None and parent.doomed:
                parent.doomed = False
                self.state.needs_rollback = True
        self._wake()

    def _end_blocks(self, parent: Block | None) -> None:
        """End the innermost block, and those around it as far as `parent`."""
        block, self.innermost = self.innermost, parent
        while block is not None and block is not parent:
            block.ended = True
            if block.sessions is not None:
                block.forget_task()
            block = block.parent

    def doom(self, block: Block, value: bool) -> None:
        """Set whether `block` must be rolled back: now, or when it is the innermost again."""
        with _changing:
            if self.innermost is block or self.innermost is None:
                self.state.needs_rollback = value
            elif not block.ended:
                block.doomed = value

    def is_doomed(self, block: Block) -> bool:
        """Return whether `block` must be rolled back."""
        with _changing:
            is_innermost = self.innermost is block or self.innermost is None
            return self.state.needs_rollback if is_innermost else block.doomed

    # --- The turn of a statement that has the connection's lock: `driver.turns.Turns` ---

    def may_send(self) -> bool:
        """Return whether the running code, which has the connection's lock, may send a statement.

        If so, it is about to.
        """
        inner = self.innermost
        block = blocks_here().get(id(self.settings_dict))
        if block is not None and block is inner:
            if block.moving:
                block.begun = True
            return True
        if block is None:
            block = test_blocks.get(id(self.settings_dict))
        elif block.left:
            block = where_left(block)
        if block is None or block.transaction is not self:
            return True  # of no block, and so with nobody to take turns with
        while inner is not block:
            if inner is None or not inner.moving or inner.begun:
                return False
            inner = inner.parent
        return True

    def end_is_sent(self) -> None:
        """Note that COMMIT or ROLLBACK is about to be sent."""
        if self.innermost is not None:
            self.innermost.begun = True

    def claim(self, block: Block) -> None:
        """End the blocks that are open inside `block`, which is about to be rolled back.

        It waits only for a statement that opens or ends one: Django must write its outcome down.
        """
        while True:
            seen, inner = self.changes, self.innermost
            if inner is block or inner is None or block.ended:
                return
            if inner.moving and self._wait_held(seen):
                continue
            with _changing:
                if self.innermost is not inner:
                    continue  # its own thread has begun to end it, just now
                # Django wrote these down when it opened the block; if it is being ended, they are
                # gone.
                del self.state.savepoint_ids[-1:], self.state.atomic_blocks[-1:]
                inner.claimed = inner.undone = True
                self.pop(inner)

    def _wait_held(self, seen: int) -> bool:
        """Wait as `_wait()` does, also if cancelled; return False if the code cannot wait."""
        here = bridge.current()
        try:
            self._wait(seen, None)
        except asyncio.CancelledError as exc:
            if here is None:
                raise
            here.pending = here.pending or exc
        except PortalClosed:
            return False
        return True

    def end(self) -> None:
        """End all blocks of the transaction that are still open."""
        if self.task is not None:
            self.task.remove_done_callback(self._task_done)
        with _changing:
            self._end_blocks(None)
        self._wake()
        self.owner = None

    def _wake(self) -> None:
        """Let the waiting code look whether it is its turn."""
        self.changes += 1
        if not self.waiters:
            return
        waiters, self.waiters = self.waiters, []
        for waiter in tuple(waiters):  # of which other threads may still withdraw one
            waiter.wake()


def begin(wrapper: Wrapper, state: State) -> Transaction:
    """Begin a transaction on `state`, with the running code in its outermost block."""
    state.transaction = transaction = Transaction(state, wrapper.settings_dict)
    assert transaction.innermost is not None
    enter_block(wrapper, transaction.innermost)
    return transaction


def end(wrapper: Wrapper, state: State) -> None:
    """End the transaction on `state`, if there is one: statements of its tasks are refused."""
    transaction = state.transaction
    if transaction is None:
        return
    transaction.end()  # first: code that finds no transaction looks whether its block has ended
    state.transaction = None
    if not state.pooled:
        # The wrapper goes on to use its state and connection, and those who outlive the block do
        # not: they might close that connection, or doom the next transaction.
        transaction.state = State(pooled=True)
        if state.connection is not None:
            state.connection.turns = None
    enter_block(wrapper, None)
