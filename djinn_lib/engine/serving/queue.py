"""Order waiting requests for serving, without threads or clocks.

*fifo* serves the oldest request. *affinity* serves the oldest request whose model is resident, so
that requests for one model are served together and fewer switches are needed. A bound on how many
later requests may overtake one prevents starvation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from copy import copy
from itertools import islice
from typing import Generic, Literal, TypeVar, get_args

from djinn_lib.arguments import whole_number
from djinn_lib.errors import ConfigError

Order = Literal["fifo", "affinity"]
T = TypeVar("T", bound=Hashable)
FORECAST_DEPTH = 64


class _Waiting(Generic[T]):
    """A request in the queue, and how many later ones were served before it."""

    __slots__ = ("model", "n_overtaken", "request")

    def __init__(self, request: T, model: str) -> None:
        self.request, self.model, self.n_overtaken = request, model, 0


class RequestQueue(Generic[T]):
    """Waiting requests, oldest first.

    Args:
        order: "fifo" or "affinity".
        max_overtaken: maximum number of later requests served before a waiting one.

    Raises:
        ConfigError: the order is unknown, or the bound is below 0.
    """

    def __init__(self, order: Order = "fifo", max_overtaken: int = 8) -> None:
        if order not in get_args(Order):
            raise ConfigError(f"expected order to be one of {get_args(Order)}, got {order!r}")
        self.order: Order = order
        self.max_overtaken = whole_number(max_overtaken, "max_overtaken", 0, 2**31 - 1)
        self._waiting: dict[T, _Waiting[T]] = {}  # in order of arrival

    def __len__(self) -> int:
        """Number of waiting requests."""
        return len(self._waiting)

    def __contains__(self, request: T) -> bool:
        """Whether a request is waiting."""
        return request in self._waiting

    def push(self, request: T, model: str) -> None:
        """Add a request for `model` as the newest.

        Raises:
            ConfigError: it is already in the queue.
        """
        if request in self._waiting:
            raise ConfigError(f"expected a new request, got {request!r}, which is already queued")
        self._waiting[request] = _Waiting(request, model)

    def withdraw(self, request: T) -> bool:
        """Remove a request; return whether it was waiting."""
        return self._waiting.pop(request, None) is not None

    def pop(self, is_resident: Callable[[str], bool]) -> T:
        """Remove and return the request to serve next.

        Args:
            is_resident: whether a model could be used without loading anything.

        Raises:
            LookupError: the queue is empty.
        """
        chosen = self._choose(self._waiting.values(), is_resident)
        for waiting in self._waiting.values():
            if waiting is chosen:
                break
            waiting.n_overtaken += 1
        del self._waiting[chosen.request]
        return chosen.request

    def upcoming(self, is_resident: Callable[[str], bool], n: int) -> list[str]:
        """Predict the models of the next `n` requests for unchanged residency.

        Only the `FORECAST_DEPTH` oldest requests are considered.
        """
        left = [copy(waiting) for waiting in islice(self._waiting.values(), FORECAST_DEPTH)]
        models: list[str] = []
        while left and len(models) < n:
            chosen = self._choose(left, is_resident)
            models.append(chosen.model)
            at = left.index(chosen)
            for waiting in left[:at]:
                waiting.n_overtaken += 1
            del left[at]
        return models

    def _choose(
        self, waiting: Collection[_Waiting[T]], is_resident: Callable[[str], bool]
    ) -> _Waiting[T]:
        if not waiting:
            raise LookupError("expected a waiting request, got an empty queue")
        if self.order == "affinity":
            for candidate in waiting:
                if is_resident(candidate.model):
                    return candidate
                if candidate.n_overtaken >= self.max_overtaken:
                    break  # its bound is reached: serve the oldest
        return next(iter(waiting))

    def check(self) -> None:
        """Check all invariants; raise `AssertionError` that names the first broken one."""
        counts = [waiting.n_overtaken for waiting in self._waiting.values()]
        if any(not 0 <= n <= self.max_overtaken for n in counts):
            raise AssertionError(f"queue invariant broken: overtaken {counts} times")
        # A request that overtakes one also overtakes all older ones.
        if counts != sorted(counts, reverse=True):
            raise AssertionError(f"queue invariant broken: an older one overtaken less: {counts}")
