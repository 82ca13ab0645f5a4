"""Serialise computations: one turn at a time, in the order of a `RequestQueue`.

Every computation with a model needs a turn. A thread can wait for its turn. Other callers, such as
an event loop, join the queue with a `Ticket` and are called when it is granted. There is no
scheduler thread: the thread that ends a turn grants the next one.

Callbacks may fail, and no waiting request depends on their success. A caller that waits for a turn
while it holds one would deadlock. So a turn is recorded for its thread and in its context
(`contextvars`), which asyncio passes on to the tasks and threads that it starts.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar

from djinn_lib.engine.serving.queue import RequestQueue
from djinn_lib.errors import DjinnError, LeaseError

_log = logging.getLogger(__name__)


class Ticket(Future[None]):
    """A place in the queue: done when its turn is granted, cancelled when withdrawn."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = model
        self.has_ended = False


_TAKEN: ContextVar[tuple[Ticket, ...]] = ContextVar("djinn_turns", default=())


class Turns:
    """Grants turns to tickets; thread-safe.

    Args:
        queue: decides the order.
        is_resident: whether a model could be used without loading anything. It is called under the
            lock of the turns, so it must take no lock under which other code requests turns. If it
            fails, the oldest request is served next.
        on_change: called after the queue has changed, without any lock. Its errors are logged.
    """

    def __init__(
        self,
        queue: RequestQueue[Ticket],
        is_resident: Callable[[str], bool],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._queue = queue
        self._is_resident = is_resident
        self._on_change = on_change
        # `with` a lock, not its condition, whose Python code an interrupt can leave half done.
        self._lock = threading.Lock()
        self._turn_ended = threading.Condition(self._lock)
        self._current: Ticket | None = None
        self._owner: int | None = None  # the thread that holds the turn
        self._n_users = 0  # nested uses of the current turn by that thread
        self._process = os.getpid()
        self._closed = False

    def join(self, model: str) -> Ticket:
        """Take a place in the queue; the ticket may be granted at once.

        A granted ticket must be used with `take`; otherwise no other turn is ever granted.

        Raises:
            DjinnError: closed.
        """
        ticket = Ticket(model)
        with self._lock:
            if self._closed:
                raise DjinnError(
                    f"a request for {model!r} came after its Djinn was closed: open a new one"
                )
            self._queue.push(ticket, model)
        try:
            self._grant()
        except BaseException:  # an interrupt: the caller never receives the ticket
            self._give_up(ticket)
            raise
        return ticket

    def withdraw(self, ticket: Ticket) -> bool:
        """Remove a ticket from the queue; False if it was granted, or in a forked child."""
        if os.getpid() != self._process:
            return False
        with self._lock:
            waited = self._queue.withdraw(ticket)
        if waited:
            ticket.cancel()
            self._notify()
        return waited

    @contextmanager
    def take(self, ticket: Ticket) -> Iterator[None]:
        """Run a block in the calling thread under a granted ticket, then end the turn."""
        self._owner = threading.get_ident()
        _TAKEN.set((*(taken for taken in _TAKEN.get() if not taken.has_ended), ticket))
        with self._used(ticket):
            yield

    @contextmanager
    def _used(self, ticket: Ticket) -> Iterator[None]:
        """Use the current turn; it ends with its last use, not with its first."""
        with self._lock:
            self._n_users += 1
        try:
            yield
        finally:
            if os.getpid() == self._process:  # in a forked child the turn belongs to the parent
                with self._lock:
                    self._n_users -= 1
                    is_last = not self._n_users
                    if is_last:
                        self._owner = None
                if is_last:
                    self._end(ticket)

    @contextmanager
    def turn(self, model: str) -> Iterator[None]:
        """Wait for a turn and hold it; a nested call in the same thread shares the turn.

        Raises:
            LeaseError: the caller would wait for itself.
            DjinnError: closed.
        """
        current = self._current
        if self.is_mine and current:
            with self._used(current):
                yield
            return
        self.ensure_may_wait(model)
        ticket = self.join(model)
        try:
            ticket.result()
        except BaseException:  # an interrupt, for example
            self._give_up(ticket)
            raise
        with self.take(ticket):
            yield

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread holds the turn."""
        return self._owner == threading.get_ident()

    def ensure_may_wait(self, model: str, blocks_thread: bool = True) -> None:
        """Refuse a wait for a turn, or for a request that needs one, that would deadlock.

        Args:
            model: the model of the turn.
            blocks_thread: whether the wait blocks other tasks of the thread.

        Raises:
            LeaseError: the caller holds the turn, which ends only when the caller continues.
            DjinnError: the caller is a forked child, in which no requests are served.
        """
        if os.getpid() != self._process:
            raise DjinnError(
                f"a request for {model!r} belongs to process {self._process}, and this is a forked "
                "child of it: wait for it there"
            )
        holds_turn = any(ticket is self._current for ticket in _TAKEN.get())
        if holds_turn or (blocks_thread and self.is_mine):
            raise LeaseError(
                f"a request for {model!r} cannot be waited for inside a lease: the request would "
                "wait for the lease, and the lease for the request; call generate() in the thread "
                "of the lease, or leave the lease first"
            )

    def upcoming(self, n: int) -> list[str]:
        """Predict the models of the next `n` turns."""
        with self._lock:
            return self._queue.upcoming(self._is_resident, n)

    @property
    def n_waiting(self) -> int:
        """Number of waiting tickets."""
        return len(self._queue)

    def close(self, only_for: Collection[int | None] | None = None) -> None:
        """Refuse waiting and new tickets, and wait for the current turn to end.

        Waiting tickets fail with a `DjinnError`. Closing twice is harmless.

        Args:
            only_for: wait only for turns of these threads; None among them means a granted ticket
                that no thread has taken yet. Default is any thread.
        """
        # Fail the tickets without the lock: their callbacks may call this object again.
        refused: list[Ticket] = []
        with self._lock:
            self._closed = True
            while self._queue:
                refused.append(self._queue.pop(lambda model: False))
        for ticket in refused:
            if ticket.set_running_or_notify_cancel():
                ticket.set_exception(
                    DjinnError(
                        f"a Djinn was closed before its request for {ticket.model!r} was served"
                    )
                )
        with self._lock:
            self._turn_ended.wait_for(
                lambda: (
                    self._current is None
                    or self.is_mine
                    or (only_for is not None and self._owner not in only_for)
                )
            )

    def _grant(self) -> None:
        try:
            self._grant_next(self._is_resident)
        except BaseException as error:  # other requests must still get their turns
            self._grant_next(lambda model: False)
            if not isinstance(error, Exception):
                raise
            _log.warning("residency is unknown; the oldest request was served", exc_info=True)
        self._notify()

    def _grant_next(self, is_resident: Callable[[str], bool]) -> None:
        granted: Ticket | None = None
        with self._lock:
            while self._current is None and self._queue:
                ticket = self._queue.pop(is_resident)
                if ticket.set_running_or_notify_cancel():
                    self._current = granted = ticket
        if granted:
            granted.set_result(None)  # without the lock, because it runs callbacks of the waiter

    def _notify(self) -> None:
        try:
            self._on_change()
        except Exception:
            _log.warning("a callback for changes of the queue failed", exc_info=True)

    def _give_up(self, ticket: Ticket) -> None:
        """Remove a ticket from the queue, or pass its turn on."""
        if not self.withdraw(ticket):
            self._end(ticket)

    def _end(self, ticket: Ticket) -> None:
        ticket.has_ended = True
        with self._lock:
            if self._current is not ticket:
                return
            self._current = None
            self._turn_ended.notify_all()
        self._grant()
