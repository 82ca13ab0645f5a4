"""Prefetch the models of waiting requests while the current request computes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from djinn_lib.engine.memory.pager import Pager
from djinn_lib.errors import DjinnError

DEPTH = 4  # requests; later ones are considered when these have been served


class LoadAhead:
    """A thread that prefetches missing pages of the models whose turns come next.

    It evicts no page of a leased model, nor of a model whose turn comes sooner. The thread starts
    with the first request that has to wait. No request depends on it: an error ends one prefetch
    pass, and the next `nudge` starts another.

    Args:
        pager: loads the pages.
        upcoming: returns the models of the next n requests.
    """

    def __init__(self, pager: Pager, upcoming: Callable[[int], list[str]]) -> None:
        self._pager, self._upcoming = pager, upcoming
        # `with` a lock, not its condition, whose Python code an interrupt can leave half done.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._nudged = self._closed = self._expecting = False
        self._logged: set[type[Exception]] = set()  # kinds of errors logged so far

    def nudge(self, n_waiting: int) -> None:
        """Start a prefetch pass; `n_waiting` requests are queued."""
        if not n_waiting and not self._expecting:
            return
        with self._lock:
            if self._closed:
                return
            self._nudged = True
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="djinn-lookahead", daemon=True)
                thread.start()
                self._thread = thread
            self._changed.notify()

    def close(self) -> None:
        """End the thread; closing twice is harmless."""
        with self._lock:
            self._closed = True
            self._changed.notify()
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._changed.wait_for(lambda: self._nudged or self._closed)
                if self._closed:
                    return
                self._nudged = False
            try:
                self.look()
            except Exception as error:
                self._report(error)

    def _report(self, error: Exception) -> None:
        """Log an error once per kind; at debug level if the request will raise it too."""
        is_news = not isinstance(error, DjinnError) and type(error) not in self._logged
        self._logged.add(type(error))
        logging.getLogger(__name__).log(
            logging.WARNING if is_news else logging.DEBUG,
            "prefetch failed (%s: %s); requests load what they need in their turns",
            type(error).__name__,
            error,
            exc_info=error if is_news else None,
        )

    def look(self) -> None:
        """Prefetch what the next requests miss, as far as there is room."""
        models = list(dict.fromkeys(self._upcoming(DEPTH)))
        self._expecting = bool(models)
        self._pager.expect(models)
        for i, model in enumerate(models):
            if not self._pager.is_resident(model):
                self._pager.prefetch(model, spare=models[:i])
