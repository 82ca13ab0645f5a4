"""Own the resources of a `Djinn`, and release them when it is closed or collected."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from djinn_lib.engine.memory.masters import Masters
from djinn_lib.engine.memory.opening import open_masters
from djinn_lib.engine.memory.pager import Pager
from djinn_lib.engine.serving.catalog import Catalog
from djinn_lib.engine.serving.options import EngineOptions
from djinn_lib.engine.serving.scheduler import Scheduler
from djinn_lib.errors import CapacityError, DjinnError

_OWN_THREADS = "djinn-"  # prefix of the names of a Djinn's threads


class Holdings:
    """Threads, device memory and host memory of one `Djinn`, released together and once.

    Nothing here refers to the `Djinn`, so it can be collected while this is in use.
    """

    def __init__(
        self, scheduler: Scheduler, pager: Pager, models: Catalog, masters: Masters
    ) -> None:
        self.scheduler, self.pager = scheduler, pager
        self.models, self.masters = models, masters
        self._process = os.getpid()
        self._releasing = threading.Lock()
        self._is_closed = self._is_released = False

    @classmethod
    def made_of(cls, options: EngineOptions) -> Holdings:
        """Make everything that a `Djinn` needs; after an error nothing is left.

        Raises:
            CapacityError: the capacity is below one page or above the free memory.
            PlatformError: the platform lacks what the device's backend needs.
        """
        device, page_bytes = options.torch_device, options.page_bytes
        with ExitStack() as undo:
            masters = open_masters(
                options.host_capacity,
                page_bytes,
                options.swap_dir,
                device.type == "cuda",
                options.master_form,
            )
            undo.callback(masters.close)
            capacity_bytes, policy = options.capacity_bytes, options.victims
            with _explaining_the_cpu(options):
                pager = Pager(masters, capacity_bytes, page_bytes, device, policy, options.eviction)
            undo.callback(pager.close)
            scheduler = Scheduler(pager, options)
            models = Catalog(masters, pager, scheduler.turn, options)
            undo.pop_all()
        return cls(scheduler, pager, models, masters)

    @property
    def is_of_this_process(self) -> bool:
        """Whether this process made them; a forked child has none of the threads."""
        return os.getpid() == self._process

    @property
    def is_closed(self) -> bool:
        """Whether they were released, or are being released."""
        return self._is_closed

    def ensure_open(self) -> Holdings:
        """Return these holdings.

        Raises:
            DjinnError: they were released, or belong to another process.
        """
        if not self.is_of_this_process:
            raise DjinnError(
                f"this Djinn belongs to process {self._process}, and this is a forked child of it "
                f"({os.getpid()}): make a Djinn of its own here, or ask the parent process"
            )
        if self._is_closed:
            raise DjinnError("this Djinn was closed: make a new one")
        return self

    def close(self) -> None:
        """Refuse queued requests, finish the current one, and release everything.

        A second call waits for the first one, and continues it if it was interrupted.

        Raises:
            LeaseError: called inside a lease.
            DjinnError: called in a process that these holdings do not belong to.
        """
        if not self._is_closed:
            self.ensure_open().scheduler.ensure_no_turn("close()")
        self._is_closed = True
        self._release(is_collected=False)

    def collect(self) -> None:
        """Close a `Djinn` that the garbage collector deletes; never raises.

        The garbage collector may call this in any thread at any point, including the threads of
        these holdings. So another thread does the work.
        """
        if not self.is_of_this_process or self._is_released:
            return
        self._is_closed = True
        thread = threading.Thread(target=self._release, args=(True,), name="djinn-end")
        with suppress(RuntimeError):  # the process is ending, which frees everything
            thread.start()
            if not threading.current_thread().name.startswith(_OWN_THREADS):
                thread.join()

    def _release(self, is_collected: bool) -> None:
        with self._releasing:
            if self._is_released:
                return
            with ExitStack() as steps:  # in reverse order, even if one of them raises
                steps.callback(self.masters.close)
                steps.callback(self.models.clear)
                steps.callback(self.pager.close)  # it waits for the device
                try:
                    self.scheduler.close(is_collected)
                except KeyboardInterrupt:  # a request may still compute: free nothing under it
                    steps.pop_all()
                    raise
            self._is_released = True


@contextmanager
def _explaining_the_cpu(options: EngineOptions) -> Iterator[None]:
    """If host memory is too small for the ring, explain why the CPU was chosen."""
    try:
        yield
    except CapacityError as error:
        was_chosen = options.device is not None or options.torch_device.type != "cpu"
        if was_chosen or options.capacity_bytes < options.page_bytes:
            raise
        raise CapacityError(
            f"{error} (device='cpu', because no usable GPU was found; device='cuda' says why)"
        ) from error.__cause__
