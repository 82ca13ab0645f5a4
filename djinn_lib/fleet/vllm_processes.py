"""How the processes of a vLLM engine end: with its ring, and with the server that started it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import wait

from djinn_lib.errors import DjinnError
from djinn_lib.fleet.vllm_server import SERVER

_LAST_STEP_S = 5.0  # for a step that fails to tell its requests, before the process ends


def end_process(error: DjinnError) -> None:
    """End an engine whose ring is gone: its weights may be overwritten at any moment.

    A step at hand has failed by then; vLLM gets a moment to tell its requests.
    """
    print(f"djinn: {error}", file=sys.stderr, flush=True)
    threading.Event().wait(_LAST_STEP_S)
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(_LAST_STEP_S)
    _end_engine()


def end_with_server() -> None:
    """End vLLM's processes with the one that was started, however that ends.

    vLLM may have up to two between that and the worker, and ends none of them if it is killed.
    """
    if (parent := multiprocessing.parent_process()) is None:
        return
    ends: list[int] = [parent.sentinel]
    with suppress(OSError, ValueError):
        ends.append(os.pidfd_open(int(os.environ.get(SERVER, ""))))

    def watch() -> None:
        wait(ends)
        _end_engine()

    threading.Thread(target=watch, name="djinn-parent", daemon=True).start()


def _end_engine() -> None:
    """End this process at once, and vLLM's engine core, if that is another one."""
    parent = multiprocessing.parent_process()
    if parent and parent.pid and str(parent.pid) != os.environ.get(SERVER):
        with suppress(ProcessLookupError):
            os.kill(parent.pid, signal.SIGKILL)
    os._exit(1)
