"""Share transactions among tasks: their open blocks, whose turn it is, and how a block ends.

Tasks may share a `Transaction`; each `atomic` inside it is a `Block`. `atomic_blocks` opens and
ends the blocks, around Django's own code.

Note [Turns]
A transaction is a chain of blocks, each inside its `parent`; only the innermost is open for
statements. Code runs inside the block that its context names. While another task has a block open
inside that block, the code waits (`take_turn`); when the code's block has ended, its statements are
refused. So savepoints of tasks that share a transaction never overlap, and no statement runs
outside the block that it was written in.
While a block is being ended, one more block is open inside it, for the code that ends it: other
tasks' statements would otherwise be sent after the COMMIT or ROLLBACK.
Code that leaves its block with an exception waits for no other task: the blocks that are open
inside are rolled back with it (`claim`).
Threads may take part, too, and another thread may open or end a block between any two instructions.
So blocks change under a lock (`_changing`); if two threads open a block at the same time, only one
of them succeeds (`push`); and a statement checks its turn again when it has the connection's lock
(`may_send`). A statement that gets the lock before the SAVEPOINT, or the end, of another block is
still sent: that block has not `begun`.

Note [Blocks that are left]
A block belongs to its `with` statement, whose frame leads to the block again (atomic_blocks.py),
and not to the context in which that statement ends. A task may step, close or drop a generator in
which another task has opened a block, or close an `ExitStack` that another task has filled. Then
- code that is called from the generator is in its block (`find_place` in block_context.py) during
  that call; its statements are refused if the block has ended before the generator;
- a task whose block another task has ended, or that has left its generator by `break`, is back in
  the block around it (`where_left` in block_context.py);
- a block is rolled back if it is still open at the end of the task that opened it (`orphan`).
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
from .driver.coroutines import name_of
from .driver.errors import PortalClosed
from .driver.lease import Lease
from .driver.parking import ParkingLock, Waiter
from .generators import carried
from .protocols import Atomic, Wrapper
from .sessions import Key, Left, Session, Sessions, State

_get_running_loop = asyncio._get_running_loop

#: Held while blocks are opened, ended, or marked to be rolled back. It is reentrant because the
#: garbage collector may end a transaction in the thread that holds the lock.
_changing = threading.RLock()


class Block:
    """The record of one `atomic` block, or of a transaction that `set_autocommit(False)` began.

    Its methods send no SQL: Django's `Atomic` does, or the pool when it gets the connection back.
    """

    # The initial values are class attributes, so that a new block sets few.

    ended = False
    #: The task that opened the block, and its name; None if sync code in a thread opened it.
    opener: weakref.ref[asyncio.Task[Any]] | None = None
    task: str | None = None
    #: The identifier of the thread that opened the block, if no task did.
    thread = 0
    #: Whether `Transaction.claim()` has ended the block, in order to roll back a block around it.
    claimed = False
    #: The block's `needs_rollback` while another block is open inside it; else the state has it.
    doomed = False
    #: Whether the statement that `push()` made the block for (a SAVEPOINT, or the end of its
    #: parent) is not done yet; and whether it was sent, or is about to be.
    moving = False
    begun = False
    #: The `Atomic` whose `with` statement opened the block, and the frame of that statement. None
    #: after its end, for `set_autocommit(False)`, for code outside portals, and for `TestCase`.
    atomic: Atomic | None = None
    frame: FrameType | None = None
    #: Whether `frame` is a generator's that `contextlib` runs as a context manager.
    in_context_manager = False
    #: Whether the `with` statement is ending or has ended; and whether the block is rolled back.
    leaving = False
    undone = False
    #: Whether the `with` statement has ended, or its generator is about to be closed, or another
    #: task is ending the block: its opener is no longer in it.
    left = False
    #: The sessions of the task that opened the block; their `blocks` list it until it ends.
    sessions: Sessions | None = None
    #: Why the block ended before its `with` statement: the message of the error to raise.
    reason: str | None = None

    def __init__(self, transaction: Transaction, parent: Block | None) -> None:
        self.transaction = transaction
        self.parent = parent
        if _get_running_loop() is not None and (task := asyncio.current_task()) is not None:
            self.task = name_of(task)
            self.opener = weakref.ref(task)
        else:
            self.thread = threading.get_ident()

    @property
    def key(self) -> Key:
        """Return the key of the block's database."""
        return id(self.transaction.settings_dict)

    @property
    def owner(self) -> str:
        """Return the name of the task or thread that opened the block, for messages."""
        return name_of_thread(self.thread) if self.task is None else f"task {self.task!r}"

    def remember(self, atomic: Atomic, frame: FrameType | None, sessions: Sessions) -> None:
        """Record the `with` statement that opened this block. See Note [Blocks that are left].

        `sessions` are those of the task that opened the block.
        """
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
        """Start a task that rolls the block back; `atomic_blocks` assigns this method."""
        raise NotImplementedError

    def was_ended_by_others(self) -> bool:
        """Return whether other code has rolled the block back, so that `Atomic` must not."""
        return self.claimed or (self.ended and self.reason is not None)

    def begin_to_leave(self) -> None:
        """Record that the `with` statement is ending; remove the block from `carried`."""
        self.leaving = True
        if carried:
            generators.drop(self.frame, self)

    def leave(self) -> None:
        """Record that the `with` statement has ended."""
        self.left = True
        if self.atomic is not None:
            self.atomic._pgbackend_blocks.remove(self)  # noqa: SLF001 - ours
            self.atomic = self.frame = None

    def forget_task(self) -> None:
        """Remove the ended block from the list of the task that opened it."""
        if self.sessions is not None:
            self.sessions.blocks.remove(self)
            self.sessions = None

    def check_not_ended(self) -> None:
        """Raise `TransactionManagementError` if the block has ended, or has a `reason` to end."""
        self.say_why_it_ended()
        if self.ended:
            raise TransactionManagementError(
                f"{name_of_task()} was started inside an atomic block of {self.owner} that has "
                "ended: its statements would not be part of that transaction any more. Await the "
                "task inside the block, or start it with 'pgbackend.detached()'."
            )

    def say_why_it_ended(self) -> None:
        """Raise `TransactionManagementError` if this block, or one around it, has a `reason`."""
        block: Block | None = self
        while block is not None:
            if block.reason is not None:
                raise TransactionManagementError(block.reason) from None
            block = block.parent

    def why_cursors_are_gone(self) -> Exception | None:
        """Return the error for a read from a server-side cursor of the block; None: it may be read.

        The server closes the cursor if this block, or one around it, is rolled back, and at the end
        of the transaction.
        """
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
        """Return whether no code will end the block, because its event loop is closed."""
        home = self.transaction.home
        return home is not None and home.is_closed()

    def abandon(self) -> None:
        """Take the running code out of the block, because another task will close its generator."""
        if self.left:
            return
        self.left = True
        settle_before_tasks()
        lease = self.transaction.state.lease
        if self.parent is None and lease is not None:
            lease.task = None  # the task that opened the block will not give the connection back
        if blocks_here().get(self.key) is self:
            named_blocks.set(with_block(blocks_here(), self.key, self.parent))
            look_again()

    def may_be_left_with_step(self) -> bool:
        """Return whether the end of the running task's step may take the task out of the block.

        True if the block, or one around it, is open in a generator that code iterates (generators
        of `@contextmanager` do not count). Python closes the generator when nothing refers to it
        any more, which may be at the end of the step.
        """
        block: Block | None = self
        while block is not None:
            if block.frame in carried and not block.in_context_manager:
                return True
            block = block.parent
        return False

    def notice_end_of_opener(self) -> None:
        """Call `orphan()` if the task that opened the block is done: its callback may be late."""
        opener = None if self.opener is None else self.opener()
        if opener is not None and opener.done():
            self.orphan(opener)

    def orphan(self, task: asyncio.Task[Any]) -> Left | None:
        """Have the block rolled back, because `task`, which opened it, has ended; return a warning.

        The pool rolls back a whole transaction, and a new task an inner block. Return None if the
        block has ended, or was left, already.
        """
        if self.ended or self.left:
            return None
        name = f"task {name_of(task)!r}"
        place = "an unknown place" if self.frame is None else frames.place_of(self.frame)
        self.reason = (
            f"an atomic block was rolled back: {name}, which had opened it in {place}, ended "
            "before the block did. Open and leave a block in one task: let one task make all the "
            "steps of a generator that holds one, and close it ('contextlib.aclosing()')"
        )
        state = self.transaction.state
        if self.parent is None and state.pooled:
            lease = state.lease
            self.transaction.end()  # first, as in `end()` below
            state.transaction = None
            if lease is not None:
                lease.end(self.reason)
        elif self.atomic is not None:
            self.leave_later()
        return self.reason, lambda: not self.left and not self.is_lost()


class Transaction:
    """The record of a transaction, which tasks may share. See Note [Turns]."""

    # fmt: off
    __slots__ = (
        "changes", "home", "innermost", "leasing", "lender", "owner", "settings_dict", "state",
        "task", "waiters",
    )
    # fmt: on

    def __init__(self, state: State, settings_dict: Mapping[str, Any]) -> None:
        self.state = state
        self.settings_dict = settings_dict
        #: The session whose lease the transaction borrows, if any.
        self.lender: Session | None = None
        self.innermost: Block | None = Block(self, None)
        #: The event loop whose pool has the connection; None for the connection of a thread.
        self.home = _get_running_loop() if state.pooled else None
        #: The task that has begun the transaction; None in a thread.
        self.owner = None if self.home is None else asyncio.current_task()
        #: Held while a connection is leased, since two tasks may make the first statement at once.
        self.leasing = ParkingLock() if state.pooled else None
        self.waiters: list[Waiter] = []
        #: Counts the changes of the blocks that other tasks may wait for.
        self.changes = 0
        #: The task whose end rolls the transaction back, if `set_autocommit(False)` has begun it.
        self.task: asyncio.Task[Any] | None = None

    def end_with_task(self) -> None:
        """Have the transaction rolled back if it is still open when the running task ends.

        `set_autocommit(False)` has begun it; after the task's end, no code could end it.
        """
        if self.task is None:
            self.task = asyncio.current_task()
            if self.task is not None:
                self.task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        """Have the pool roll the transaction back, because `task`, which began it, has ended."""
        lease = self.state.lease
        self.end()  # first, as in `end()` below
        self.state.transaction = None
        if lease is not None:
            lease.end()

    def borrow(self) -> Lease | None:
        """Take the lease away from `lender`, and return it; return None if there is none.

        `lender` is the session in which the transaction began. The caller passes the lease to
        `take()`. Later, `give_up_lease()` gives it back to the session, if that still needs it.
        """
        if self.lender is None:
            return None
        lease = self.lender.state.lease
        if lease is None:
            self.lender.check_not_taken_back()
            self.lender = None
            return None
        self.lender.state.lease = self.lender.state.connection = None
        if self.lender.pins:
            lease.pins -= 1  # the session's pin: the transaction adds its own
        return lease

    def take(self, lease: Lease) -> bool:
        """Use the connection of `lease` from now on; return False if the transaction is ending."""
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
        """Make `take()` return False from now on, unless the transaction has a connection already.

        Called when the transaction ends. Without a connection there is nothing to commit or to roll
        back, and no statement may lease one any more.
        """
        with _changing:
            inner = self.innermost
            if self.state.connection is None and inner is not None and inner.moving:
                inner.begun = True

    def give_up_lease(self) -> None:
        """End the transaction's lease, even if a cursor is open on it, unless it is borrowed.

        A borrowed lease goes back to `lender` if that session needs it for a pin or an open cursor;
        else it ends, too.
        """
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
        If the running task has opened the block, and has left it, this returns at once, without the
        turn: the caller looks up the current block again.
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
                return  # the block ended meanwhile: the caller looks up the current block again
            block.check_not_ended()
            in_time = self._wait(seen, max(0.0, deadline - monotonic()))
            if not in_time and self.innermost is not block:
                self._give_up(block, timeout)

    def _wait(self, seen: int, timeout: float | None) -> bool:
        """Wait until `changes` differs from `seen`; return False after `timeout` seconds."""
        waiter = Waiter()
        self.waiters.append(waiter)
        try:
            # `_wake()` counts the change before it reads `waiters`, so no change is missed here.
            return self.changes != seen or waiter.wait(timeout)
        finally:
            with suppress(ValueError):  # another thread has woken it
                self.waiters.remove(waiter)

    def _give_up(self, block: Block, timeout: float) -> None:
        """Raise `TransactionManagementError`: the turn of `block` has not come within `timeout`."""
        block.check_not_ended()
        assert self.innermost is not None
        raise TransactionManagementError(
            f"{name_of_task()} waited {timeout:g} s for its turn in a transaction that it "
            f"shares with {self.innermost.owner}, which has an atomic block open inside it. Let "
            "that block end first, or run the task outside with 'pgbackend.detached()'. (How long "
            "to wait is the pool's 'timeout'.)"
        )

    def push(self, parent: Block) -> Block | None:
        """Add a block inside `parent`, without SQL; return it, or None if others have the turn.

        Others have the turn if `parent` is not the innermost block. The new block is `moving` until
        `settle()` or `pop()`.
        """
        block = Block(self, parent)
        block.moving = True
        with _changing:
            if self.innermost is not parent:
                return None
            self.innermost = block
            if parent.ended:  # the garbage collector ended it between the last two lines
                self.innermost = None
                return None
        return block

    def settle(self, block: Block) -> None:
        """Record that the statement which opens `block` is done; wake the waiting tasks."""
        block.begun, block.moving = True, False
        self._wake()

    def pop(self, block: Block) -> None:
        """Mark `block`, and the blocks inside it, as ended, without SQL; wake the waiting tasks."""
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
        """Mark all blocks inside `parent` (None: all) as ended; `parent` becomes the innermost."""
        block, self.innermost = self.innermost, parent
        while block is not None and block is not parent:
            block.ended = True
            if block.sessions is not None:
                block.forget_task()
            block = block.parent

    def doom(self, block: Block, value: bool) -> None:
        """Set `needs_rollback` of `block`: now, or when the blocks inside it have ended."""
        with _changing:
            if self.innermost is block or self.innermost is None:
                self.state.needs_rollback = value
            elif not block.ended:
                block.doomed = value

    def is_doomed(self, block: Block) -> bool:
        """Return `needs_rollback` of `block`, even while a block is open inside it."""
        with _changing:
            is_innermost = self.innermost is block or self.innermost is None
            return self.state.needs_rollback if is_innermost else block.doomed

    # --- The turn of a statement that has the connection's lock: `driver.turns.Turns` ---

    def may_send(self) -> bool:
        """Return whether the running code, which has the connection's lock, may send a statement.

        If so, the caller sends it at once.
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
            return True  # code in no block of this transaction takes no turns
        while inner is not block:
            if inner is None or not inner.moving or inner.begun:
                return False
            inner = inner.parent
        return True

    def end_is_sent(self) -> None:
        """Record that COMMIT or ROLLBACK is about to be sent."""
        if self.innermost is not None:
            self.innermost.begun = True

    def claim(self, block: Block) -> None:
        """Mark the blocks inside `block` as ended, without SQL: the coming rollback undoes them.

        If a SAVEPOINT or RELEASE of such a block is in flight, wait for it first, so that its
        `Atomic` records whether it worked.
        """
        while True:
            seen, inner = self.changes, self.innermost
            if inner is block or inner is None or block.ended:
                return
            if inner.moving and self._wait_held(seen):
                continue
            with _changing:
                if self.innermost is not inner:
                    continue  # the thread that opened `inner` has just begun to end it
                # Django appended these entries when it opened `inner`; if `Atomic` is ending the
                # block, it has removed them already.
                del self.state.savepoint_ids[-1:], self.state.atomic_blocks[-1:]
                inner.claimed = inner.undone = True
                self.pop(inner)

    def _wait_held(self, seen: int) -> bool:
        """Wait until `changes` differs from `seen`; return False if the running code cannot wait.

        It cannot wait in a portal that is being closed. If green code is cancelled meanwhile, this
        returns True early, and the cancellation is raised later (Note [Held cancellation] in
        driver/cancellation.py): so the caller checks again if it must wait.
        """
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
        """Mark all blocks of the transaction as ended, without SQL; wake the waiting tasks."""
        if self.task is not None:
            self.task.remove_done_callback(self._task_done)
        with _changing:
            self._end_blocks(None)
        self._wake()
        self.owner = None

    def _wake(self) -> None:
        """Wake all waiters, so that each checks whether its turn has come."""
        self.changes += 1
        if not self.waiters:
            return
        waiters, self.waiters = self.waiters, []
        for waiter in tuple(waiters):  # of which other threads may still withdraw one
            waiter.wake()


def begin(wrapper: Wrapper, state: State) -> Transaction:
    """Record a new transaction on `state`, without SQL, and put the running code in its block."""
    state.transaction = transaction = Transaction(state, wrapper.settings_dict)
    assert transaction.innermost is not None
    enter_block(wrapper, transaction.innermost)
    return transaction


def end(wrapper: Wrapper, state: State) -> None:
    """Record, without SQL, that the transaction on `state` has ended, if there is one.

    Later statements of the tasks that are in the transaction are refused.
    """
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
