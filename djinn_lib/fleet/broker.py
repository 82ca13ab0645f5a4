"""The broker: it owns the frames of one device and lends them to engines in other processes.

It is one thread with one event loop. `Leases` makes the decisions; the broker has the socket, the
clock and the frames. It never reads or writes weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch

from djinn_lib.engine.device import DEFAULT_PAGE_BYTES, parse_device
from djinn_lib.engine.memory.devices import open_address_space
from djinn_lib.engine.memory.frames import n_frames_in
from djinn_lib.engine.memory.policies import Policy, make_policy, sparing_what_waits
from djinn_lib.engine.memory.ring import Eviction, Ring
from djinn_lib.errors import ConfigError, DjinnError
from djinn_lib.fleet import protocol
from djinn_lib.fleet.lease_states import Frames, Revoke
from djinn_lib.fleet.leases import Leases
from djinn_lib.fleet.listening import listening, only_one_on, process_ended, read_message
from djinn_lib.fleet.protocol import Message, ProtocolError
from djinn_lib.fleet.status import RingStatus
from djinn_lib.units import parse_bytes

_GREETING_S = 5.0  # time for a client to send its first message
_RETRY_S = 0.1  # until another try to accept a client


class Broker:
    """Lends the frames of one device to engines.

    Args:
        capacity_bytes: device memory for weights; rounded down to whole frames.
        page_bytes: size of a page and a frame.
        device: "cpu", or one GPU.
        policy: the eviction policy, by name or as an object.
        eviction: "pages" evicts only what is needed; "models" evicts all pages of a victim.
        quantum_s, max_wait_s: see `Leases`.

    Raises:
        CapacityError: the device has less memory.
        PlatformError: the platform cannot share frames of the device.
    """

    def __init__(
        self,
        capacity_bytes: int,
        page_bytes: int,
        device: torch.device,
        policy: str | Policy = "lru",
        eviction: Eviction = "pages",
        quantum_s: float = 0.25,
        max_wait_s: float = 1.0,
    ) -> None:
        ring = Ring(n_frames_in(capacity_bytes, page_bytes), eviction)
        chosen = sparing_what_waits(make_policy(policy))
        self.leases = Leases(ring, chosen, quantum_s, max_wait_s)
        self.page_bytes = page_bytes
        self._space = open_address_space(device, ring.n_frames, page_bytes, shared=True)
        self.device = self._space.device
        self._descriptors = self._space.export()
        self._writers: dict[str, asyncio.StreamWriter] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def status(self) -> RingStatus:
        """Return the state of the ring."""
        return RingStatus.of(self.leases, str(self.device), self.page_bytes)

    def run(self, path: Path, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve on a socket until SIGTERM or SIGINT, then clean up.

        Raises:
            ConfigError: another broker uses the socket or the GPU.
        """
        try:
            with only_one_on(self.device), listening(path) as listener:
                asyncio.run(self._serve(listener, on_ready))
        finally:
            self.close()

    async def _serve(self, listener: socket.socket, on_ready: Callable[[], None]) -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        accepting = asyncio.create_task(self._accept(listener))
        on_ready()
        try:
            await stop.wait()
        finally:
            for task in (accepting, *self._tasks):
                task.cancel()
            await asyncio.gather(accepting, *self._tasks, return_exceptions=True)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError:  # too many open files: there will be fewer
                await asyncio.sleep(_RETRY_S)
                continue
            task = asyncio.create_task(self._talk(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    # -- one connection ------------------------------------------------------------------------

    async def _talk(self, connection: socket.socket) -> None:
        """Serve one client until it disconnects."""
        reader, writer = await asyncio.open_connection(sock=connection)
        pid, uid = protocol.peer(connection)
        try:
            async with asyncio.timeout(_GREETING_S):
                self._greet(writer, await read_message(reader), uid)
            while (message := await read_message(reader)) is not None:
                if message["kind"] == "status":
                    writer.write(protocol.encode("status", **self.status().fields()))
                    await writer.drain()  # a client that does not read gets no more
                else:
                    await self._serve_engine(message, reader, writer, connection, pid)
                    return
        except (DjinnError, TimeoutError) as error:
            writer.write(protocol.refused(error))
        except ConnectionError:
            pass
        except asyncio.CancelledError:  # the broker ends, and does not wait until the client reads
            writer.transport.abort()
            raise
        finally:
            with contextlib.suppress(ConnectionError):
                writer.close()
                await writer.wait_closed()

    def _greet(self, writer: asyncio.StreamWriter, message: Message | None, uid: int) -> None:
        if uid != os.getuid():
            raise ConfigError(
                f"this ring belongs to user {os.getuid()} and you are user {uid}: start a ring of "
                "your own"
            )
        hello = protocol.expect(message or {"kind": "nothing"}, "hello")
        if (version := hello.get("version")) != protocol.VERSION:
            raise ConfigError(
                f"this ring speaks version {protocol.VERSION} of its protocol and the client "
                f"version {version}: install the same djinn_lib on both sides"
            )
        writer.write(
            protocol.encode(
                "welcome",
                version=protocol.VERSION,
                page_bytes=self.page_bytes,
                n_frames=self.leases.ring.n_frames,
                device=str(self.device),
            )
        )

    async def _serve_engine(
        self,
        message: Message,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        connection: socket.socket,
        pid: int,
    ) -> None:
        join = protocol.expect(message, "join")
        model = protocol.field(join, "model", str)
        self.leases.join(model, protocol.field(join, "n_pages", int))
        self._writers[model], left = writer, False
        try:
            writer.write(protocol.encode("joined", n_descriptors=len(self._descriptors)))
            await writer.drain()
            await asyncio.to_thread(self._lend, connection)
            while (said := await read_message(reader)) is not None:
                if left := said["kind"] == "leave":
                    break
                self._carry_out(self._event(model, said))
        except DjinnError as error:
            writer.write(protocol.refused(error))
            writer.write_eof()
        except asyncio.CancelledError:
            left = True  # the broker ends: these frames go to nobody
            raise
        finally:
            del self._writers[model]
            if not left:
                await process_ended(pid)
            self._carry_out(self.leases.leave(model, time.monotonic()))

    def _lend(self, connection: socket.socket) -> None:
        """Send the frames through a blocking duplicate of the socket."""
        with connection.dup() as blocking:
            blocking.settimeout(_GREETING_S)
            protocol.send_descriptors(blocking, self._descriptors)

    def _event(self, model: str, message: Message) -> list[Frames | Revoke]:
        """Pass a message of an engine on to the leases; return their decisions."""
        now_s, leases = time.monotonic(), self.leases
        match message["kind"]:
            case "ask":
                return leases.ask(model, now_s)
            case "give_back":
                return leases.give_back(model, now_s, protocol.field(message, "drop", bool))
            case "loaded":
                leases.loaded(model, protocol.field(message, "seconds", float), now_s)
            case "use":
                leases.use(model, now_s)
            case kind:
                raise ProtocolError(f"an engine cannot say {kind!r} to the ring")
        return leases.tick(now_s)

    def _carry_out(self, decisions: list[Frames | Revoke]) -> None:
        """Send the decisions of the leases, and set a timer for the next end of a quantum."""
        for one in decisions:
            if writer := self._writers.get(one.model):
                writer.write(_as_message(one))
        if self._timer:
            self._timer.cancel()
            self._timer = None
        deadline_s = self.leases.deadline_s()
        if deadline_s is not None:
            delay_s = max(0.0, deadline_s - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._tick)

    def _tick(self) -> None:
        self._carry_out(self.leases.tick(time.monotonic()))

    def close(self) -> None:
        """Free the frames; frames that an engine has mapped are freed when it unmaps them."""
        while self._descriptors:
            os.close(self._descriptors.pop())
        self._space.close()


def open_broker(
    capacity: int | str,
    device: str | torch.device | None = None,
    page: int | str | None = None,
    policy: str | Policy = "lru",
    eviction: str = "pages",
    quantum_s: float = 0.25,
    max_wait_s: float = 1.0,
) -> Broker:
    """Make a broker from options of users: sizes as text, defaults by device.

    Raises:
        ConfigError: a value is invalid.
        CapacityError, PlatformError: see `Broker`.
    """
    place = parse_device(device)
    page_bytes = parse_bytes(page or DEFAULT_PAGE_BYTES[place.type])
    unit: Eviction = "models" if eviction == "models" else "pages"
    if eviction != unit:
        raise ConfigError(f"eviction {eviction!r} is unknown: choose 'pages' or 'models'")
    return Broker(parse_bytes(capacity), page_bytes, place, policy, unit, quantum_s, max_wait_s)


def _as_message(decision: Frames | Revoke) -> bytes:
    if isinstance(decision, Revoke):
        return protocol.encode("revoke")
    return protocol.encode(
        "frames",
        n_kept=decision.n_kept,
        frames=decision.frames,
        granted=decision.granted,
        n_evicted=decision.n_evicted,
    )
