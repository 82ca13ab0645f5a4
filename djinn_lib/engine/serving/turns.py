"""Turns: one computation at a time, in the order of a `RequestQueue`.

Whoever computes with a model takes a turn first. A thread waits for its turn; others (an event
loop, say) join the queue with a `Ticket` and are called when it is granted. Nothing here starts a
thread: the one that ends its turn grants the next.

What is asked or told on the way may fail, whoever's code that is. Nobody's wait depends on it.
Whoever waits for a turn while holding one waits for itself. So a turn is known to its thread and to
its context (`contextvars`), which asyncio hands on to tasks and threads that are started meanwhile.
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
    """A place in the queue; done when its turn has come, cancelled when it was withdrawn."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = model
        self.has_ended = False


_TAKEN: ContextVar[tuple[Ticket, ...]] = ContextVar("djinn_turns", default=())


class Turns:
    """Grants turns to whoever joins; safe to use from many threads.

    Args:
        queue: decides the order.
        is_resident: whether a model could be used without loading anything; called under the lock
            of the turns, so it must take no lock under which turns are asked for. Where it fails,
            the oldest request is served next.
        on_change: called after the queue has changed, without any lock. Where it fails, nothing
            else does.
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
        self._lock = threading.Condition(threading.Lock())  # notified when a turn ends
        self._current: Ticket | None = None
        self._owner: int | None = None  # the thread that computes
        self._n_users = 0  # of the current turn: that thread may enter it several times
        self._process = os.getpid()
        self._closed = False

    def join(self, model: str) -> Ticket:
        """Take a place in the queue; the ticket may be granted at once.

        A granted ticket must be taken with `take`, or nobody else will ever have a turn.

        Raises:
            DjinnError: closed.
        """
        ticket = Ticket(model)
        with self._lock:
            if self._closed:
                raise DjinnError(f"expected an open Djinn for {model!r}, got one that was closed")
            self._queue.push(ticket, model)
        try:
            self._grant()
        except BaseException:  # an interrupt: the caller will never know of the ticket
            self._give_up(ticket)
            raise
        return ticket

    def withdraw(self, ticket: Ticket) -> bool:
        """Take a ticket out of the queue; False when it was granted, or in a forked child."""
        if os.getpid() != self._process:
            return False
        with self._lock:
            waited = self._queue.withdraw(ticket)
        if waited:
            ticket.cancel()
            self._tell()
        return waited

    @contextmanager
    def take(self, ticket: Ticket) -> Iterator[None]:
        """Compute in the calling thread under a granted ticket; its turn ends with the block."""
        self._owner = threading.get_ident()
        _TAKEN.set((*(taken for taken in _TAKEN.get() if not taken.has_ended), ticket))
        with self._used(ticket):
            yield

    @contextmanager
    def _used(self, ticket: Ticket) -> Iterator[None]:
        """Use the current turn; it ends with its last use, which need not be its first."""
        with self._lock:
            self._n_users += 1
        try:
            yield
        finally:
            if os.getpid() == self._process:  # in a forked child the turn is its parent's
                with self._lock:
                    self._n_users -= 1
                    is_last = not self._n_users
                    if is_last:
                        self._owner = None
                if is_last:
                    self._end(ticket)

    @contextmanager
    def turn(self, model: str) -> Iterator[None]:
        """Wait for a turn and hold it; within a turn of the same thread this is no new one.

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
        """Whether the calling thread has the turn."""
        return self._owner == threading.get_ident()

    def ensure_may_wait(self, model: str, blocks_thread: bool = True) -> None:
        """Refuse to let the caller wait for a turn, or for a request that waits for one.

        Args:
            model: that the turn is for.
            blocks_thread: other tasks of the thread cannot go on meanwhile.

        Raises:
            LeaseError: the caller has the turn, which ends only when the caller goes on.
            DjinnError: the caller is a forked child, in which nobody serves requests.
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
        """Return the models whose turns come next, as far as can be told."""
        with self._lock:
            return self._queue.upcoming(self._is_resident, n)

    @property
    def n_waiting(self) -> int:
        """How many tickets wait."""
        return len(self._queue)

    def close(self, only_for: Collection[int | None] | None = None) -> None:
        """Refuse what waits and what comes, and wait for the turn that is being taken.

        Whoever waits for a ticket gets a `DjinnError`. Closing twice is harmless.

        Args:
            only_for: the threads to wait for; None among them stands for whoever has been granted
                a ticket and has not taken it yet. Default is any.
        """
        refused: list[Ticket] = []
        with self._lock:
            self._closed = True
            while self._queue:
                refused.append(self._queue.pop(lambda model: False))
        for ticket in refused:
            if ticket.set_running_or_notify_cancel():
                ticket.set_exception(
                    DjinnError(f"expected an open Djinn for {ticket.model!r}, got one that closed")
                )
        with self._lock:
            self._lock.wait_for(
                lambda: (
                    self._current is None
                    or self.is_mine
                    or (only_for is not None and self._owner not in only_for)
                )
            )

    def _grant(self) -> None:
        try:
            self._grant_next(self._is_resident)
        except BaseException as error:  # whoever else waits has a turn all the same
            self._grant_next(lambda model: False)
            if not isinstance(error, Exception):
                raise
            _log.warning("the oldest request was served, whatever is resident", exc_info=True)
        self._tell()

    def _grant_next(self, is_resident: Callable[[str], bool]) -> None:
        granted: Ticket | None = None
        with self._lock:
            while self._current is None and self._queue:
                ticket = self._queue.pop(is_resident)
                if ticket.set_running_or_notify_cancel():
                    self._current = granted = ticket
        if granted:
            granted.set_result(None)  # without the lock: it calls whoever waits

    def _tell(self) -> None:
        try:
            self._on_change()
        except Exception:
            _log.warning("what follows the queue could not be told of a change", exc_info=True)

    def _give_up(self, ticket: Ticket) -> None:
        """Take a ticket out of the queue, or pass its turn on."""
        if not self.withdraw(ticket):
            self._end(ticket)

    def _end(self, ticket: Ticket) -> None:
        ticket.has_ended = True
        with self._lock:
            if self._current is not ticket:
                return
            self._current = None
            self._lock.notify_all()
        self._grant()
