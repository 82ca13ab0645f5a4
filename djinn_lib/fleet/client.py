"""Hold a model on pages of a broker's ring, and the lease to compute with it.

This module does not depend on vLLM: any engine with packed weights and steps can be a client. The
broker decides which page is in which frame. The engine's process has its own masters, mappings and
copies (`engine.memory`).

There are two threads. The caller's thread computes. The listener's thread receives the broker's
messages. It maps and copies while the caller waits for its lease, and gives the lease back between
two steps.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace

import torch

from djinn_lib.engine.memory.devices import open_address_space, open_copier
from djinn_lib.engine.memory.frames import Extent
from djinn_lib.engine.memory.layout import Fill, Layout
from djinn_lib.engine.memory.opening import MastersForm, choose_masters, open_masters
from djinn_lib.engine.memory.paged_model import PagedModel
from djinn_lib.errors import ConfigError, DjinnError
from djinn_lib.fleet import protocol
from djinn_lib.fleet.connection import Connection
from djinn_lib.fleet.costs import Costs
from djinn_lib.fleet.protocol import Message, ProtocolError


class RingModel:
    """The weights of one model behind a broker.

    `view` has the weights. Compute between `begin_step` and `end_step`, and call `rest` when there
    is nothing to compute.

    Args:
        connection: connection to a broker; it is closed with this object.
        model: name of the model on the ring.
        layout: layout of the packed weights.
        fill: writes the weights into the master copy.
        device: device that computes; it must be that of the ring.
        on_loss: called in the listener's thread when the broker is gone. All steps fail from then
            on.
        masters: "plain", "compressed" or "auto", as for a `Djinn`.

    Raises:
        ConfigError: the ring is on another device, or already has an engine for that model.
        CapacityError: the model is larger than the ring, or the host is full.
    """

    def __init__(
        self,
        connection: Connection,
        model: str,
        layout: Layout,
        fill: Fill,
        device: torch.device,
        on_loss: Callable[[DjinnError], None] = lambda error: None,
        masters: str = "plain",
    ) -> None:
        self.model, self.n_bytes, self._connection = model, layout.n_bytes, connection
        self.page_bytes, self._on_loss = connection.page_bytes, on_loss
        self._is_cuda = device.type == "cuda"
        self._closing = ExitStack()  # for close, or if a step fails
        try:
            self._closing.callback(connection.close)
            self._paged = self._open(layout, fill, device, choose_masters(masters, device))
        except BaseException:
            self._closing.close()
            raise
        self.view: torch.Tensor = self._paged.view
        self._costs = Costs()
        self._changed = threading.Condition()  # guards everything below, and sending
        self._n_mapped = 0
        self._in_step = self._is_asking = self._is_leased = self._is_revoked = False
        self._is_switching = False  # pages were assigned after the engine asked
        self._failure: DjinnError | None = None
        self._is_closed = False
        self._listener = threading.Thread(target=self._listen, name="djinn-ring", daemon=True)
        self._listener.start()

    def _open(
        self, layout: Layout, fill: Fill, device: torch.device, form: MastersForm
    ) -> PagedModel:
        connection = self._connection
        if device.type != connection.device.type:
            raise ConfigError(
                f"the ring is on {connection.device}, but the engine of {self.model!r} is on "
                f"{device}: start both on the same device"
            )
        masters = open_masters(None, self.page_bytes, pin=self._is_cuda, form=form)
        self._closing.callback(masters.close)
        n_pages = -(-layout.n_bytes // self.page_bytes)
        descriptors = connection.join(self.model, n_pages)
        try:
            masters.add(self.model, layout, fill)
            space = open_address_space(
                device, connection.n_frames, self.page_bytes, frames=descriptors
            )
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._closing.callback(space.close)
        copier = open_copier(space.device)
        self._closing.callback(copier.close)
        return PagedModel(self.model, layout.n_bytes, None, space, copier, masters)

    # -- called by the computation --------------------------------------------------------------

    def begin_step(self) -> None:
        """Hold the lease until `end_step`; wait for it if the engine does not have it.

        Within a step this does nothing, because vLLM may begin the next step before it ends the
        first. Pages may still be in copy: see `wait`.

        Raises:
            DjinnError: the broker is gone, or pages could not be mapped.
        """
        with self._changed:
            if self._failure:
                raise self._failure
            if self._in_step:
                return
            self._changed.wait_for(lambda: not self._is_revoked or self._failure)
            self._in_step = True  # before the lease arrives, so it is not given back unused
            try:
                self._lease()
            except BaseException:
                self._in_step = False
                self._changed.notify_all()
                raise

    def _lease(self) -> None:
        if self._failure is None and not self._is_leased:
            begin_s = time.perf_counter()
            if not self._is_asking:  # an interrupted wait may have asked already
                self._is_asking, self._is_switching = True, False
                self._send("ask")
            self._changed.wait_for(lambda: self._is_leased or self._failure)
            waited_s = time.perf_counter() - begin_s
            self._costs = replace(self._costs, waited_s=self._costs.waited_s + waited_s)
        if self._failure:
            raise self._failure

    def end_step(self) -> None:
        """End a step; if the broker has revoked the lease, the listener gives it back."""
        with self._changed:
            self._in_step = False
            self._changed.notify_all()

    def note_request(self) -> None:
        """Report a request that needs no new lease to the broker's policy."""
        with self._changed:
            if self._is_leased and not self._failure:
                self._send("use")

    def rest(self) -> None:
        """Give the lease back while there is nothing to compute; pages stay until evicted."""
        with self._changed:
            if self._is_leased and not self._in_step:
                self._give_back()

    def sleep(self) -> None:
        """Give the lease back and free all frames; the next step loads the whole model."""
        with self._changed:
            self._changed.wait_for(lambda: not self._in_step)
            if self._failure:
                raise self._failure
            self._give_back(drop=True)
            self._unmap(0)

    @property
    def costs(self) -> Costs:
        """Costs of leases so far; waits until the device has passed the last wait for a copy."""
        with self._changed:
            loads = tuple(self._paged.loads)
            stalled_s = sum(load.stalls.total_s for load in loads)
            return replace(self._costs, stalled_s=self._costs.stalled_s + stalled_s)

    def wait(self, end_byte: int | None = None) -> None:
        """Delay the computation until the first `end_byte` bytes are loaded; default is all.

        Raises:
            DjinnError: the copy failed.
        """
        self._paged.wait(self.n_bytes if end_byte is None else end_byte)

    def check(self) -> None:
        """Compare all mapped bytes with the master; for tests, within a step.

        Raises:
            AssertionError: a byte differs; the message has the first one.
        """
        self._paged.block_until_copied()
        self._paged.check_bytes(self._paged.bytes_of(0, self._n_mapped))

    def close(self) -> None:
        """Leave the ring and free everything; do not use the view afterwards."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._failure = self._failure or _closed(self.model)  # for who waits for a lease
            self._changed.notify_all()
            with suppress(DjinnError, RuntimeError):
                self._fence()
            with suppress(OSError):
                protocol.send(self._connection.socket, "leave")
                self._connection.socket.shutdown(socket.SHUT_RDWR)
        self._listener.join()
        self._closing.close()

    # -- the listener ---------------------------------------------------------------------------

    def _listen(self) -> None:
        try:
            while True:
                self._hear(protocol.receive(self._connection.socket))
        except Exception as error:
            if self._is_closed:
                return
            failure = error if isinstance(error, DjinnError) else _broken(self.model, error)
            with self._changed:
                self._failure = failure
                self._changed.notify_all()
            self._on_loss(failure)

    def _hear(self, message: Message) -> None:
        match message["kind"]:
            case "frames":
                self._take(message)
            case "revoke":
                self._revoke()
            case kind:
                raise ProtocolError(
                    f"the ring sent a message of unknown kind {kind!r}: restart the ring and the "
                    "engine with the same version of djinn"
                )

    def _take(self, message: Message) -> None:
        """Map assigned frames and start their copies; the message may also grant the lease."""
        n_kept, frames = message["n_kept"], tuple(message["frames"])
        self._unmap(n_kept)
        stalled_s = self._costs.stalled_s + self._forget_arrived()
        if frames:
            self._paged.load(Extent(self.model, n_kept, frames))
            self._n_mapped += len(frames)
        granted: bool = message["granted"]
        n_bytes = self._paged.bytes_of(n_kept, len(frames))
        with self._changed:
            self._is_switching |= bool(frames)
            costs = self._costs
            self._costs = replace(
                costs,
                leases=costs.leases + granted,
                switches=costs.switches + (granted and self._is_switching),
                loaded_bytes=costs.loaded_bytes + n_bytes,
                evicted_bytes=costs.evicted_bytes + message["n_evicted"] * self.page_bytes,
                stalled_s=stalled_s,
            )
            if granted:
                self._is_leased, self._is_asking = True, False
                self._changed.notify_all()
        if granted and self._is_switching:
            self._report_arrival()

    def _forget_arrived(self) -> float:
        """Forget finished copies; return how long (s) computations waited for them."""
        loads = self._paged.loads
        self._paged.forget_arrived()
        return sum(load.stalls.total_s for load in loads if load not in self._paged.loads)

    def _report_arrival(self) -> None:
        """Report to the broker how long the copies took after the grant."""
        begin_s = time.perf_counter()
        self._paged.block_until_copied()
        with self._changed:
            if not self._is_closed:
                self._send("loaded", seconds=time.perf_counter() - begin_s)

    def _revoke(self) -> None:
        """Give the lease back between two steps, unless `rest` has already done so."""
        with self._changed:
            self._is_revoked = self._is_leased
            self._changed.wait_for(
                lambda: not self._in_step or not self._is_leased or self._is_closed
            )
            if self._is_leased and not self._is_closed:
                self._give_back()
            self._is_revoked = False
            self._changed.notify_all()

    def _give_back(self, drop: bool = False) -> None:
        """End the lease once nothing on the device reads the pages; the caller holds the lock."""
        self._fence()
        self._is_leased = False
        self._send("give_back", drop=drop)

    def _fence(self) -> None:
        self._paged.block_until_copied()
        if self._is_cuda:
            torch.cuda.synchronize(self.view.device)

    def _unmap(self, n_kept: int) -> None:
        """Unmap the pages after the first `n_kept`, which nothing reads any more."""
        self._paged.unmap(n_kept, self._n_mapped - n_kept)
        self._n_mapped = n_kept

    def _send(self, kind: str, **fields: object) -> None:
        protocol.send(self._connection.socket, kind, **fields)


def _closed(model: str) -> DjinnError:
    return DjinnError(f"the engine of {model!r} has left its ring: start it again")


def _broken(model: str, error: Exception) -> DjinnError:
    failure = DjinnError(
        f"pages of {model!r} could not be loaded ({type(error).__name__}: {error}): restart its "
        "engine"
    )
    failure.__cause__ = error
    return failure
