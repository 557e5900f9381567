"""Keep the context variable that names the `atomic` blocks which the running code is in.

The code that opens a block names it in its `contextvars` context. Tasks that are started inside the
block inherit the context, and so do threads that asgiref starts from there. That is not enough when
- a generator stays inside a block from one step to the next, and calls code: `find_place()`;
- a block has ended in another task, or its generator was left by `break`: `where_left()` (for both
  cases see Note [Blocks that are left] in transactions.py);
- code has stepped out of its blocks by `pgbackend.detached()`: `no_blocks()`;
- a test has opened the transaction: Note [Transactions of tests].

Note [Transactions of tests]
A context variable does not reach an async test whose runner copied the context before the fixture
opened the transaction, nor an application that asgiref's communicators run in an empty context.
So a transaction that Django marks as a test's is joined by async code of the whole process that is
in no transaction of its own, and by the threads in which asgiref runs functions for such code
(`in_tests`). Code that has joined a test's transaction does not close the connection of the test:
on Django's own backend, code that closes connections after a request, or at the end of a thread,
would find a connection of its own thread, and not the test's.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from django.db.transaction import TransactionManagementError

from . import generators
from .driver import bridge
from .driver.coroutines import name_of
from .driver.forks import after_fork
from .generators import carried
from .protocols import Wrapper
from .sessions import Key

if TYPE_CHECKING:
    from .transactions import Block

_get_running_loop = asyncio._get_running_loop

#: The innermost block that the running code is in, by database.
named_blocks: contextvars.ContextVar[Mapping[Key, Block]] = contextvars.ContextVar(
    "pgbackend.blocks",
    default={},  # noqa: B039 - a Mapping: it is replaced, never changed
)
#: Returns the value of `named_blocks`. It is bound to a name because it is called for each
#: statement, and `named_blocks.get()` would cost one instruction more each time.
blocks_here = named_blocks.get
#: The blocks that were open when asgiref called the running function in a thread.
_blocks_of_call: contextvars.ContextVar[Mapping[Key, Block]] = contextvars.ContextVar(
    "pgbackend.blocks_of_call",
    default={},  # noqa: B039
)
#: The innermost block that a test has opened, by database, for code whose context names no block.
test_blocks: dict[Key, Block] = {}


class _Here(dict[Key, "Block"]):
    """A temporary value of the context variable `named_blocks`; `before` is the value to restore.

    Used in two cases. A generator that has a block open calls code: the code is in that block
    meanwhile, and `adopted` is the block. Or code is inside a `with detached()`: `detached` is its
    record.
    """

    __slots__ = ("adopted", "before", "detached", "task")

    def __init__(
        self,
        blocks: Mapping[Key, Block],
        *,
        adopted: Block | None = None,
        before: Mapping[Key, Block],
        detached: _Detachment | None = None,
        task: weakref.ref[asyncio.Task[Any]] | None = None,
    ) -> None:
        super().__init__(blocks)
        self.adopted = adopted
        self.before = before
        self.detached = detached
        #: The task that makes the generator's step, and leaves `adopted` after the step. Tasks that
        #: inherit this object stay in `adopted`.
        self.task = task

    def replaced(self, blocks: Mapping[Key, Block], key: Key) -> Mapping[Key, Block]:
        """Return the value for the context after the block of database `key` has changed.

        `blocks` is a copy of this object's entries, with the new block of `key`. If `adopted` is a
        block of `key`, and the new block is neither `adopted` nor inside it, return `before`; else
        return a `_Here` with `blocks`.
        """
        adopted = self.adopted
        if adopted is not None and adopted.key == key and not is_within(blocks.get(key), adopted):
            return self.before
        return _Here(
            blocks, adopted=adopted, before=self.before, detached=self.detached, task=self.task
        )


def name_of_task() -> str:
    """Return the name of the running task, or else of the running thread, for messages."""
    if (task := bridge.current_task()) is not None:
        return f"task {name_of(task)!r}"
    return name_of_thread(threading.get_ident())


def name_of_thread(ident: int) -> str:
    """Return the name of a thread, for messages."""
    names = (thread.name for thread in threading.enumerate() if thread.ident == ident)
    return f"thread {next(names, str(ident))!r}"


def look_again() -> None:
    """Drop the portal's cached result of `state.find()`, after a change that it cannot notice."""
    if (here := bridge.current()) is not None:
        here.found = None


def is_within(block: Block | None, outer: Block) -> bool:
    """Return whether `block` is `outer`, or is inside `outer`."""
    while block is not None and block is not outer:
        block = block.parent
    return block is outer


def where_left(block: Block) -> Block | None:
    """Return the innermost of `block` and the blocks around it that the running code is still in.

    None if the code is in none of them. Once the `with` of a block was left (`Block.left`), the
    task that opened the block is in the block around it, even if the context still names the block
    that was left. Tasks that were started inside a block stay in it.
    """
    found: Block | None = block
    while found is not None and found.left:
        opener = None if found.opener is None else found.opener()
        if opener is None or opener is not bridge.current_task():
            return found
        found = found.parent
    return found


def enter_block(wrapper: Wrapper, block: Block | None) -> None:
    """Record in the context that the running code, and tasks that it starts, are in `block`.

    None: they are in no block of this database. Nothing is sent to the server.
    """
    blocks, key = blocks_here(), id(wrapper.settings_dict)
    if type(blocks) is _Here or len(blocks) > (key in blocks):
        blocks = with_block(blocks, key, block)
    else:  # no other database has a block here
        blocks = {} if block is None else {key: block}
    named_blocks.set(blocks)
    is_own = block is not None and block.transaction.state is wrapper._own
    # Code whose context has this very mapping is in a block on the wrapper's own state.
    wrapper.__dict__["_own_blocks"] = blocks if is_own else None


def with_block(before: Mapping[Key, Block], key: Key, block: Block | None) -> Mapping[Key, Block]:
    """Return a copy of `before` in which `block` is the block of `key`; None removes that entry.

    For a `_Here`, return what `_Here.replaced()` returns.
    """
    if block is not None:
        blocks = {**before, key: block}
    else:
        blocks = {**before}
        blocks.pop(key, None)
    return before.replaced(blocks, key) if type(before) is _Here else blocks


@contextmanager
def inside(wrapper: Wrapper, block: Block) -> Iterator[None]:
    """Put the code of this `with` in `block`; afterwards restore the blocks from before."""
    before = blocks_here()
    settle_before_tasks()
    enter_block(wrapper, block)
    try:
        yield
    finally:
        named_blocks.set(before)
        look_again()


# --- Generators: Note [Blocks that are left] in transactions.py -----------------------------------


def find_place(key: Key, *, may_wait: bool = True) -> None:
    """Put the running code in a generator's block of `key`, if the generator is among its callers.

    Code that was put in such a block earlier, and is no longer called from the generator, is taken
    out of the block. Raises `TransactionManagementError` if the block has ended before the
    generator, or if the code is in another transaction.

    If `may_wait`, this may wait until the task's next step. An exception may just have left a
    generator; Python closes the generator, and so ends its block, only when the step ends.
    """
    blocks = blocks_here()
    here = blocks if type(blocks) is _Here else None
    detached = None if here is None else here.detached
    block = generators.below(key, detached)
    if block is None:
        if here is not None and here.adopted is not None and here.adopted.key == key:
            task = None if here.task is None else here.task()
            if task is not None and task is bridge.current_task():
                named_blocks.set(here.before)  # the step of the generator is over
        elif may_wait and (named := blocks.get(key)) and named.may_be_left_with_step():
            # An exception that was thrown into the task lives until the task's step ends, and keeps
            # the generators alive that it has left.
            bridge.let_step_end()
        return
    current = blocks.get(key) or test_blocks.get(key)
    if current is not None and current.left:
        current = where_left(current)
    if is_within(current, block) and not block.ended:
        return
    block.notice_end_of_opener()
    if block.ended or block.reason is not None:
        block.check_not_ended()
    if current is not None and not current.ended and not is_within(block, current):
        raise TransactionManagementError(
            f"{name_of_task()} is in a transaction of its own, and steps a generator that has "
            f"another transaction open, begun by {block.owner}: the generator's statements cannot "
            "be part of both. Let one task make all the steps, or make them in 'with "
            "pgbackend.detached()'"
        )
    before = here.before if here is not None and here.adopted is not None else blocks
    adopting = bridge.current_task()
    named_blocks.set(
        _Here(
            {**blocks, key: block},
            adopted=block,
            before=before,
            detached=detached,
            task=None if adopting is None else weakref.ref(adopting),
        )
    )


def settle() -> None:
    """Correct the blocks that the context names, because a new task is about to inherit them."""
    blocks = blocks_here()
    for key, block in blocks.items():
        if block.left and (now := where_left(block)) is not block:
            named_blocks.set(with_block(blocks, key, now))
            return settle()
    for key in generators.keys() if carried else ():
        with suppress(TransactionManagementError):  # the next statement will raise it
            find_place(key, may_wait=False)  # code that starts a task does not expect a wait
    return None


def settle_before_tasks() -> None:
    """Have `settle()` called before each new task is made, from now on.

    Called by code that may make a context name a wrong block (one that was left, say), which a new
    task would inherit. In a process that never runs such code, a new task costs no such call.
    """
    if settle not in bridge.before_task:
        bridge.before_task.append(settle)


# --- Threads --------------------------------------------------------------------------------------


@contextmanager
def calling_thread() -> Iterator[None]:
    """Record the caller's open blocks, for `is_of_call()`, during a `with` that calls a thread.

    If the task is cancelled during the call, the context is made to name the caller's blocks again:
    asgiref has copied the thread's context into it, which may name blocks that the thread opened.
    """
    before, called_before = blocks_here(), _blocks_of_call.get()
    _blocks_of_call.set({key: block for key, block in before.items() if not block.ended})
    try:
        yield
    except asyncio.CancelledError:
        named_blocks.set(before)
        look_again()
        raise
    finally:
        _blocks_of_call.set(called_before)


def is_of_call(block: Block) -> bool:
    """Return whether asgiref called the running function in a thread while `block` was open."""
    called = _blocks_of_call.get().get(block.key)
    return called is not None and is_within(block, called)


# --- Transactions of tests ------------------------------------------------------------------------


def join_in_tests(wrapper: Wrapper, block: Block | None) -> None:
    """Let async code that is in no transaction join `block`, a test's.

    If `block` is None, such code joins no transaction of a test any more.
    """
    if block is None:
        test_blocks.pop(wrapper._key, None)
    else:
        test_blocks[wrapper._key] = block
    look_again()


@contextmanager
def in_tests() -> Iterator[None]:
    """Name the blocks of tests in the context during a `with` that calls a thread.

    Afterwards the context no longer names them, because a task may live longer than the test.
    """
    before = named = blocks_here()
    for key, block in test_blocks.items():
        if key not in before:
            named = with_block(named, key, block)
    named_blocks.set(named)
    try:
        yield
    finally:
        blocks = blocks_here()  # asgiref has copied the context of the thread back
        for key in named.keys() - before.keys():
            if blocks.get(key) is named[key]:
                blocks = with_block(blocks, key, None)
        named_blocks.set(blocks)


# --- Stepping out of blocks -----------------------------------------------------------------------


@contextmanager
def no_blocks(keys: set[Key] | None, frame: FrameType | None) -> Iterator[None]:
    """Take the code of this `with` out of all blocks of the databases `keys` (None: of all).

    `frame` is the frame of the `with detached()`. Blocks that generators have opened around this
    `with` do not count inside it, either. If `frame` is a generator's, and a `break` leaves the
    generator, the running code is in the blocks from before the `with` again.
    """
    before = blocks_here()
    kept = {key: block for key, block in before.items() if keys is not None and key not in keys}
    detached = _Detachment(frame)
    named_blocks.set(_Here(kept, before=before, detached=detached))
    if frame is not None and generators.carries(frame):
        generators.carry(frame, detached)
    try:
        yield
    finally:
        generators.drop(frame, detached)
        detached.abandon()


class _Detachment:
    """The record of an open `with detached()`; `generators.carried` lists it as it lists blocks."""

    #: None, because this is no block of a database. `generators.below()` stops at it.
    key = None

    def __init__(self, frame: FrameType | None) -> None:
        #: The frame of the `with`. Blocks that its callers have open do not count inside.
        self.frame = frame
        self._home = _get_running_loop()

    def is_lost(self) -> bool:
        """Return whether the `with` will never end, because its event loop is closed."""
        return self._home is not None and self._home.is_closed()

    def abandon(self) -> None:
        """Make the context name the blocks from before the `with`, unless it has changed since."""
        here = blocks_here()
        if type(here) is _Here and here.detached is self:
            named_blocks.set(here.before)
            look_again()


@after_fork
def _forget_blocks() -> None:
    """Remove from the context, in a forked process, the blocks of the parent's pools."""
    blocks = blocks_here()
    named_blocks.set({key: one for key, one in blocks.items() if not one.transaction.state.pooled})
