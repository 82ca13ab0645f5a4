"""A request whose pieces are read while it is being served."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Generic, TypeVar

from djinn_lib.engine.serving.generation import Generation

Part = TypeVar("Part")


class Stream(Iterator[Part], Generic[Part]):
    """Pieces of a continuation, as they are decoded.

    Leaving the loop early gives the request up: when this object is closed or collected, or at the
    end of a `with` block. Nothing waits for whoever reads slowly.

    Args:
        pending: the request.
        pieces: gets the pieces from another thread, and None after the last.
        ensure_may_wait: raises where the caller would wait for itself.
        drop: gives the request up without taking a lock: the garbage collector may call it in any
            thread and between any two steps.
        name: of the model.
    """

    def __init__(
        self,
        pending: Future[Generation],
        pieces: SimpleQueue[Part | None],
        ensure_may_wait: Callable[[], None] = lambda: None,
        drop: Callable[[], object] = lambda: None,
        name: str = "",
    ) -> None:
        self._pending, self._pieces = pending, pieces
        self._ensure_may_wait, self._drop = ensure_may_wait, drop
        self._name, self._is_read = name, False
        pending.add_done_callback(lambda done: pieces.put(None))

    def __next__(self) -> Part:
        if self._is_read:
            raise StopIteration
        if self._pieces.empty():
            self._ensure_may_wait()
        try:
            piece = self._pieces.get()
        except BaseException:  # an interrupt
            self.close()
            raise
        if piece is not None:
            return piece
        self._is_read = True
        self._pending.result()  # which raises what the request failed with
        raise StopIteration

    def result(self) -> Generation:
        """Wait for the end, and return all of it, with its counts and costs.

        Raises:
            CancelledError, RequestCancelled: it was closed before.
            DjinnError: it failed.
        """
        return self._pending.result()

    def close(self) -> None:
        """Give the request up, if it is not done; twice is harmless."""
        self._is_read = True
        self._pending.cancel()

    def __repr__(self) -> str:
        return f"Stream({self._name!r}: iterate over it, or call result())"

    def __enter__(self) -> Stream[Part]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):  # the interpreter may be ending
            self._drop()
