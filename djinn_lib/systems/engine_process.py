"""A process that holds an engine and answers calls, one at a time.

Several inference engines do not live well in one process: each of these has one to itself. A
process that dies, or that does not answer in time, is an error for the caller, never a hang.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

from djinn_lib.errors import DjinnError

_STOP_S, _DIE_S = 30.0, 5.0


class EngineDied(DjinnError, RuntimeError):
    """The process of an engine ended, or answers no more."""


class EngineProcess:
    """Starts `target(*arguments)` in a new process and calls methods of the object it returns.

    Args:
        target: where to find the callable, as "package.module:name".
        arguments: for it; must be picklable.
        start_timeout_s: how long the object may take to make.
    """

    def __init__(self, target: str, *arguments: Any, start_timeout_s: float = 600.0) -> None:
        context = multiprocessing.get_context("spawn")  # a forked CUDA context does not work
        self._pipe, theirs = context.Pipe()
        # Not a daemon: an engine may have processes of its own.
        self._process = context.Process(target=_work, args=(theirs, target, arguments))
        self._process.start()
        theirs.close()
        # multiprocessing joins this process at exit, which without close() would never return.
        atexit.register(self.close)
        try:
            self._answer(start_timeout_s, f"start {target}")
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int | None:
        """Process id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.is_alive()

    def call(self, method: str, *arguments: Any, timeout_s: float = 600.0) -> Any:
        """Call a method of the engine and return its result.

        Raises:
            EngineDied: the process ended.
            TimeoutError: no answer in time; the process has been ended then.
            DjinnError: the engine raised an error, whose traceback is in the message.
        """
        try:
            self._pipe.send((method, arguments))
        except (BrokenPipeError, OSError) as error:
            raise self._dead(method) from error
        return self._answer(timeout_s, method)

    def _answer(self, timeout_s: float, what: str) -> Any:
        try:
            if not self._pipe.poll(timeout_s):
                self._end()
                raise TimeoutError(f"expected {what} within {timeout_s:.0f} s, got no answer")
            ok, value = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise self._dead(what) from error
        except BaseException:
            self._end()  # interrupted: the answer would be taken for that of the next call
            raise
        if not ok:
            raise DjinnError(f"{what} failed in the engine's process:\n{value}")
        return value

    def _dead(self, what: str) -> EngineDied:
        self._process.join(_DIE_S)  # its pipe is closed, so as a rule it is gone already
        self._end()
        return EngineDied(
            f"expected an answer to {what}, but the engine's process ended "
            f"(exit status {self._process.exitcode})"
        )

    def ask_to_end(self) -> None:
        """Ask the process to end and go on, so that several can end at the same time."""
        with contextlib.suppress(BrokenPipeError, OSError):
            self._pipe.send(None)

    def close(self) -> None:
        """Ask the process to end, and make sure that it does; closing twice is harmless."""
        atexit.unregister(self.close)
        self.ask_to_end()
        self._process.join(_STOP_S)
        self._end()
        self._pipe.close()

    def _end(self) -> None:
        for stop in (self._process.terminate, self._process.kill):
            if self._process.is_alive():
                stop()
                self._process.join(_STOP_S)


def _work(pipe: Connection, target: str, arguments: tuple[Any, ...]) -> None:
    """Serve calls until told to stop, or until the caller is gone."""
    engine = _reply(pipe, lambda: _make(target, arguments), keep=True)
    if engine is None:
        return
    with contextlib.suppress(EOFError, ConnectionError):
        while (message := pipe.recv()) is not None:
            method, values = message
            _reply(pipe, lambda: getattr(engine, method)(*values))  # noqa: B023
    if close := getattr(engine, "close", None):
        close()


def _make(target: str, arguments: tuple[Any, ...]) -> Any:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)(*arguments)


def _reply(pipe: Connection, compute: Callable[[], Any], keep: bool = False) -> Any:
    """Send the outcome of `compute`; with `keep` return the result instead of sending it."""
    value = None
    try:
        value = compute()
        reply = pickle.dumps((True, None if keep else value))
    except BaseException:
        reply = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(reply)
    return value
