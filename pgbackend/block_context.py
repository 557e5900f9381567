"""Tell which `atomic` blocks the running code is in: the context variable that names them.

A block is named in the context of the code that has opened it; tasks that are started inside it
inherit that, and so do threads that asgiref starts from it. The context alone is not enough where
- code is called from a generator, which carries a block from one step to the next: `find_place()`;
- the block was left elsewhere: `where_left()`; both by Note [Blocks that are left] in
  transactions.py;
- code has stepped out of its blocks by `pgbackend.detached()`: `no_blocks()`;
- a test has opened the transaction, Note [Transactions of tests].

Note [Transactions of tests]
A context variable alone does not reach an async test whose runner copied its context before the
fixture opened the transaction, nor an application that asgiref's communicators run in an empty one.
So a transaction that Django marks as a test's is joined by every async context of the process that
is in none of its own, and by the threads in which asgiref runs functions for it (`in_tests`).
Code that has joined has not opened the connection, and does not close it: on Django's own backend
the code that closes connections after a request, or at the end of a thread, would find one of its
own.
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
from .driver.forks import after_fork
from .generators import carried
from .protocols import Wrapper
from .sessions import Key

if TYPE_CHECKING:
    from .transactions import Block

_get_running_loop = asyncio._get_running_loop

#: The blocks that the running code is in, by database.
named_blocks: contextvars.ContextVar[Mapping[Key, Block]] = contextvars.ContextVar(
    "pgbackend.blocks",
    default={},  # noqa: B039 - a Mapping: it is replaced, never changed
)
#: Returns them. It is called for each statement: the method of an imported object would cost one
#: instruction more than this function does, each time.
blocks_here = named_blocks.get
#: The blocks that were open when asgiref called the running function in a thread.
_blocks_of_call: contextvars.ContextVar[Mapping[Key, Block]] = contextvars.ContextVar(
    "pgbackend.blocks_of_call",
    default={},  # noqa: B039
)
#: The innermost blocks that a test has opened, for contexts that name none.
test_blocks: dict[Key, Block] = {}


class _Here(dict[Key, "Block"]):
    """The blocks of code that is in another place than its context would tell.

    Either the code is called from a generator, and so is in the generator's block (`adopted`); its
    context holds `before`. Or it has stepped out of the blocks in `before` (`detached`).
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
        #: The task that makes the step of the generator; tasks that inherit this stay in the block.
        self.task = task

    def replaced(self, blocks: Mapping[Key, Block], key: Key) -> Mapping[Key, Block]:
        """Return `blocks`, in the same place; or those of the place before, if this one is left."""
        adopted = self.adopted
        if adopted is not None and adopted.key == key and not is_within(blocks.get(key), adopted):
            return self.before
        return _Here(
            blocks, adopted=adopted, before=self.before, detached=self.detached, task=self.task
        )


def name_of_task() -> str:
    """Return the name of the running task, or of the thread, for messages."""
    if (task := bridge.current_task()) is not None:
        return f"task {bridge.name_of(task)!r}"
    return name_of_thread(threading.get_ident())


def name_of_thread(ident: int) -> str:
    """Return the name of a thread, for messages."""
    names = (thread.name for thread in threading.enumerate() if thread.ident == ident)
    return f"thread {next(names, str(ident))!r}"


def look_again() -> None:
    """Make the running code look up again, after a change that `state.find()` does not see."""
    if (here := bridge.current()) is not None:
        here.found = None


def is_within(block: Block | None, outer: Block) -> bool:
    """Return whether `block` is `outer`, or is inside of it."""
    while block is not None and block is not outer:
        block = block.parent
    return block is outer


def where_left(block: Block) -> Block | None:
    """Return the block that code is in now, if its context names `block`, which was left elsewhere.

    The task that has opened `block` is where it was before. Tasks that were started inside of it
    stay inside.
    """
    found: Block | None = block
    while found is not None and found.left:
        opener = None if found.opener is None else found.opener()
        if opener is None or opener is not bridge.current_task():
            return found
        found = found.parent
    return found


def enter_block(wrapper: Wrapper, block: Block | None) -> None:
    """Let the running code, and tasks that it starts, be in `block`; in none if that is None."""
    blocks, key = blocks_here(), id(wrapper.settings_dict)
    if type(blocks) is _Here or len(blocks) > (key in blocks):
        blocks = with_block(blocks, key, block)
    else:  # no other database has a block here
        blocks = {} if block is None else {key: block}
    named_blocks.set(blocks)
    is_own = block is not None and block.transaction.state is wrapper._own
    # Code that finds this very mapping in its context is in a block of the wrapper's own.
    wrapper.__dict__["_own_blocks"] = blocks if is_own else None


def with_block(before: Mapping[Key, Block], key: Key, block: Block | None) -> Mapping[Key, Block]:
    """Return the blocks of `before` with `block` (None: with none) as the one of `key`."""
    if block is not None:
        blocks = {**before, key: block}
    else:
        blocks = {**before}
        blocks.pop(key, None)
    return before.replaced(blocks, key) if type(before) is _Here else blocks


@contextmanager
def inside(wrapper: Wrapper, block: Block) -> Iterator[None]:
    """Let the running code be in `block` for the length of a `with`, wherever it is."""
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
    """Let code that is called from a generator be in the block of `key` that the generator carries.

    It may wait for the next step of the task, unless `may_wait` is False. Raises
    `TransactionManagementError` if the block has ended without the generator, or if another
    transaction is open.
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
            # An exception that was thrown into the task lives as long as the task's step; and so do
            # the generators that the exception has left.
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
            f"{name_of_task()} is in a transaction of its own, and makes a step of a generator "
            f"that has one open too, begun by {block.owner}: its statements cannot be part of "
            "both. Let one task make all the steps, or step out by 'pgbackend.detached()'"
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
    """Let the context of the running code name the blocks that it is in: a task will inherit it."""
    blocks = blocks_here()
    for key, block in blocks.items():
        if block.left and (now := where_left(block)) is not block:
            named_blocks.set(with_block(blocks, key, now))
            return settle()
    for key in generators.keys() if carried else ():
        with suppress(TransactionManagementError):  # its statements will meet that
            find_place(key, may_wait=False)  # nobody expects to wait where a task is started
    return None


def settle_before_tasks() -> None:
    """Call `settle()` before tasks are made: from here on, contexts may not tell all blocks."""
    if settle not in bridge.before_task:
        bridge.before_task.append(settle)


# --- Threads --------------------------------------------------------------------------------------


@contextmanager
def calling_thread() -> Iterator[None]:
    """Note the blocks that the running code is in, for a thread that inherits its context.

    A task that is cancelled goes on without the thread, but asgiref has handed the context of the
    thread back by then: the task stays where it was, out of the blocks that the thread has open.
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
    """Return whether the running function was called in a thread while `block` was open."""
    called = _blocks_of_call.get().get(block.key)
    return called is not None and is_within(block, called)


# --- Transactions of tests ------------------------------------------------------------------------


def join_in_tests(wrapper: Wrapper, block: Block | None) -> None:
    """Let async contexts that are in no transaction take part in `block` (None: no longer)."""
    if block is None:
        test_blocks.pop(wrapper._key, None)
    else:
        test_blocks[wrapper._key] = block
    look_again()


@contextmanager
def in_tests() -> Iterator[None]:
    """Name the transactions of tests in the context, for a thread that inherits it.

    Afterwards the context names none of them: a task may live longer than the test.
    """
    before = named = blocks_here()
    for key, block in test_blocks.items():
        if key not in before:
            named = with_block(named, key, block)
    named_blocks.set(named)
    try:
        yield
    finally:
        blocks = blocks_here()  # asgiref hands the context of the thread back
        for key in named.keys() - before.keys():
            if blocks.get(key) is named[key]:
                blocks = with_block(blocks, key, None)
        named_blocks.set(blocks)


# --- Stepping out of blocks -----------------------------------------------------------------------


@contextmanager
def no_blocks(keys: set[Key] | None, frame: FrameType | None) -> Iterator[None]:
    """Step out of the transactions of `keys` (None: of all), for a `with` in `frame`."""
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
    """A block of `detached()`, as a generator carries it."""

    #: It hides blocks from the code that is called from there, and is none itself.
    key = None

    def __init__(self, frame: FrameType | None) -> None:
        #: The frame of the `with`. Code called from it is in no block that frames below it carry.
        self.frame = frame
        self._home = _get_running_loop()

    def is_lost(self) -> bool:
        """Return whether nobody will ever end it: its loop is closed."""
        return self._home is not None and self._home.is_closed()

    def abandon(self) -> None:
        """Step back into the blocks that were there before, if the context is in this place."""
        here = blocks_here()
        if type(here) is _Here and here.detached is self:
            named_blocks.set(here.before)
            look_again()


@after_fork
def _forget_blocks() -> None:
    """Leave the transactions of the parent's loops."""
    blocks = blocks_here()
    named_blocks.set({key: one for key, one in blocks.items() if not one.transaction.state.pooled})
