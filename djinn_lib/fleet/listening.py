"""The broker's socket and its locks, and waiting for client processes to end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from djinn_lib.errors import ConfigError
from djinn_lib.fleet import protocol
from djinn_lib.fleet.protocol import Message, ProtocolError

ENDING_S = 10.0  # for a client's process to end after its connection


async def read_message(reader: asyncio.StreamReader) -> Message | None:
    """Return the next message, or None at the end of the connection."""
    try:
        n_bytes = protocol.body_bytes(await reader.readexactly(protocol.HEADER.size))
        return protocol.decode(await reader.readexactly(n_bytes))
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        if isinstance(error, ProtocolError):
            raise
        return None


async def process_ended(pid: int) -> None:
    """Wait until a process has ended, because until then it may write to its frames.

    The wait for a process that outlives its connection ends after `ENDING_S`. The clients of this
    library do not outlive it.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:  # it has ended, or is in another namespace
        return
    try:
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(descriptor, ended.set)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ENDING_S):
                await ended.wait()
        loop.remove_reader(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """Listen on a socket that only this user can connect to; remove it at the end.

    Raises:
        ConfigError: another broker listens there, or the path cannot be a socket.
    """
    lock = FileLock(f"{path}.lock", timeout=0)
    with contextlib.ExitStack() as undo:
        try:
            undo.enter_context(lock)
        except (Timeout, OSError) as error:
            raise ConfigError(
                f"the socket {path} cannot be used ({_why(error)}): choose another one"
            ) from error
        undo.callback(lambda: Path(lock.lock_file).unlink(missing_ok=True))
        if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
            raise ConfigError(f"{path} exists and is not a socket: choose another path")
        path.unlink(missing_ok=True)  # left by a killed broker, because the lock was free
        listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        except OSError as error:
            raise ConfigError(
                f"the socket {path} cannot be created ({error.strerror or error}): choose a "
                "shorter path, in a folder that you can write to"
            ) from error
        finally:
            os.umask(mask)
        undo.callback(lambda: path.unlink(missing_ok=True))
        listener.listen()
        listener.setblocking(False)
        yield listener


@contextlib.contextmanager
def only_one_on(device: torch.device) -> Iterator[None]:
    """Lock a GPU against other brokers; on the CPU any number may run.

    Raises:
        ConfigError: another broker uses the GPU.
    """
    if device.type == "cpu":
        yield
        return
    identity = torch.cuda.get_device_properties(device).uuid
    lock = FileLock(f"/tmp/djinn-ring-{identity}.lock", timeout=0, mode=0o666)
    try:
        lock.acquire()
    except (Timeout, OSError) as error:
        raise ConfigError(
            f"{device} already has a ring ({_why(error)}): connect engines to that one, or end it"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _why(error: BaseException) -> str:
    return "another broker holds its lock" if isinstance(error, Timeout) else str(error)
