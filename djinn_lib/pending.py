"""A request that was submitted and is served in its turn."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from djinn_lib.errors import LeaseError, RequestCancelled
from djinn_lib.generate import Generation
from djinn_lib.sampling import Sampling

T = TypeVar("T")


@dataclass(slots=True)
class Request:
    """What is asked of a model: a prompt that has been checked, and how to continue it.

    Attributes:
        begin_s: when it was made, by `time.perf_counter`.
        cancelled: set to end it after the token that is being computed.
    """

    model: str
    prompt_ids: list[int]
    max_new_tokens: int
    ignore_eos: bool
    sampling: Sampling
    begin_s: float
    cancelled: threading.Event = field(default_factory=threading.Event)

    def proceed(self) -> None:
        """Go on, or raise `RequestCancelled`."""
        if self.cancelled.is_set():
            raise RequestCancelled(
                f"expected a request for {self.model!r} to be served to its end, got one that was "
                "cancelled: submit it again if it was not meant to be"
            )


def for_each(asked: Request | list[Request], serve: Callable[[Request], T]) -> T | list[T]:
    """Serve a request, or each of a list in its order; returns what `serve` does, or a list."""
    return [serve(request) for request in asked] if isinstance(asked, list) else serve(asked)


class PendingGeneration(Future[Generation]):
    """The `Generation` of a request that waits or is being served.

    `cancel()` takes a request that waits out of the queue and returns True. One that is being
    served ends after the token that is being computed, and gives its lease back; `cancel()` returns
    False, and `result()` raises `RequestCancelled`.
    """

    def __init__(
        self, request: Request, withdraw: Callable[[], bool], is_blocked: Callable[[], bool]
    ) -> None:
        super().__init__()
        self.request = request
        self._withdraw = withdraw
        self._is_blocked = is_blocked

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for the `Generation`, at most `timeout` seconds.

        Raises:
            LeaseError: the calling thread holds a lease, and would wait for itself.
            TimeoutError, CancelledError, RequestCancelled, DjinnError: there is none.
        """
        if not self.done() and self._is_blocked():
            raise LeaseError(
                f"expected no lease in the thread that waits for a request for "
                f"{self.request.model!r}, got one: the request would wait for the lease and the "
                "lease for the request; call generate(), or leave the lease first"
            )
        return super().result(timeout)

    def cancel(self) -> bool:
        """Give the request up; returns whether nothing of it was computed."""
        self.request.cancelled.set()
        return self.cancelled() or (self._withdraw() and super().cancel())
