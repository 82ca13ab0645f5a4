"""Keep masters on disk, with a limited amount of host memory as a cache.

Only the disk limits the number of models. Host memory works like device memory: a `Ring` of host
frames decides which pages of which master are in memory, a victim loses pages from its tail, and
nothing is written back.

Each master has a `SwapFile`. Several threads read its pages directly into their frames. Loaders of
whole files (fastsafetensors, the Run:ai Model Streamer) do not fit here: they read all tensors of a
checkpoint into memory of their own.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from pathlib import Path

import torch

from djinn_lib.engine.memory.devices import host
from djinn_lib.engine.memory.frames import Extent, n_frames_in
from djinn_lib.engine.memory.layout import Fill, Layout, Report, Shrink, say_nothing
from djinn_lib.engine.memory.masters import MasterBytes
from djinn_lib.engine.memory.policies import LRU
from djinn_lib.engine.memory.ring import Ring
from djinn_lib.engine.memory.swap_file import BLOCK_BYTES, SwapFile
from djinn_lib.errors import CapacityError, ConfigError, DjinnError
from djinn_lib.units import format_bytes

READ_BYTES = 16 << 20  # for each read of a thread; enough to keep a disk busy
N_READERS = 8


class DiskTier:
    """`Masters` on disk, with `capacity_bytes` of host memory as a cache.

    Args:
        capacity_bytes: host memory for pages of masters; rounded down to whole pages.
        page_bytes: page size of the pager; a multiple of `BLOCK_BYTES`.
        folder: folder of the files; it must be on a disk, not in memory.
        pin: register the host memory with the CUDA driver.

    Raises:
        CapacityError: the capacity is below one page or above the free host memory.
        ConfigError: the page size does not suit direct reads, or the folder cannot be written to.
    """

    def __init__(
        self, capacity_bytes: int, page_bytes: int, folder: str | Path, pin: bool = False
    ) -> None:
        if page_bytes % BLOCK_BYTES:
            raise ConfigError(
                f"expected pages of a multiple of {BLOCK_BYTES} bytes with host_capacity, got "
                f"{page_bytes}: choose another page size"
            )
        self._page_bytes, self._folder, self._pin = page_bytes, Path(folder), pin
        self.ring = Ring(n_frames_in(capacity_bytes, page_bytes, "host_capacity"))
        n_bytes = self.ring.n_frames * page_bytes
        self._frames = host.allocate(n_bytes, "host_capacity", "lower host_capacity", now=True)
        if pin:
            host.pin(self._frames)
        self._policy = LRU()
        self._files: dict[str, SwapFile] = {}
        self._reading: set[str] = set()
        self._n_brief = 0  # holds that are not lasting
        # `with` a lock, not its condition, whose Python code an interrupt can leave half done.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._readers = ThreadPoolExecutor(N_READERS, "djinn-reader")
        self._block_until_copied: Callable[[str], None] = lambda model: None
        self.bytes_read = 0

    @property
    def n_bytes(self) -> int:
        """Host memory for masters in bytes."""
        return self._frames.numel()

    def add(
        self,
        model: str,
        layout: Layout,
        fill: Fill,
        report: Report = say_nothing,
        shrink: Shrink | None = None,
    ) -> None:
        """Write the master of `model`; see `Store.add`.

        Raises:
            CapacityError: it is larger than the host memory, or the disk is full.
            ConfigError: see `Store.add`; or the folder cannot be used.
        """
        if model in self._files:
            raise ConfigError(f"expected a new model name, got {model!r}, which was added before")
        if not layout.n_bytes:
            raise ConfigError(f"expected a model with weights, got none for {model!r}")
        if shrink is None:  # else its size is not known yet
            self._ensure_fits(model, -(-layout.n_bytes // self._page_bytes))
        file = SwapFile(self._folder, layout, self._page_bytes, fill, shrink)
        try:
            self._ensure_fits(model, file.n_pages)
        except CapacityError:
            file.close()
            raise
        with self._lock:
            self._files[model] = file
            self.ring.add(model, file.n_pages)

    def _ensure_fits(self, model: str, n_pages: int) -> None:
        if n_pages > self.ring.n_frames:
            raise CapacityError(
                f"expected host_capacity of at least {format_bytes(n_pages * self._page_bytes)} "
                f"for {model!r}, got {format_bytes(self.n_bytes)}: raise it"
            )

    def discard(self, model: str) -> None:
        """Delete the master of `model`, if there is one; wait for brief holds of it.

        Raises:
            LeaseError: it has a lasting hold; nothing changes.
        """
        with self._lock:
            self._changed.wait_for(
                lambda: not (self._n_brief and model in self.ring and self.ring.is_leased(model))
            )
            if model in self._files:
                self.ring.ensure_unleased(model)
                self._block_until_copied(model)
                self.ring.remove(model)
                self._policy.forget(model)
                self._files.pop(model).close()

    def layout(self, model: str) -> Layout:
        """Return how the tensors of `model` are packed."""
        return self._known(model).layout

    def _known(self, model: str) -> SwapFile:
        if (file := self._files.get(model)) is None:
            raise ConfigError(
                f"expected one of the models {list(self._files)}, got {model!r}: add it first"
            )
        return file

    def hold(self, model: str, lasting: bool = False) -> None:
        """Read all bytes of `model` into host memory, and keep them there until `let_go`.

        Waits for the brief holds of others, but not for lasting ones.

        Raises:
            ConfigError: there is no such model, or the tier is closed.
            CapacityError: other holds leave too little host memory.
            DjinnError: pages cannot be read, or have changed on disk.
        """
        with self._lock:
            self._known(model)
            self._changed.wait_for(lambda: model not in self._reading and self._has_room(model))
            self.ring.lease(model)
            self._n_brief += not lasting
            try:
                missing = self._take_frames(model)
            except BaseException:
                self._release(model, lasting)
                raise
        if missing.frames:
            self._fill_frames(missing, lasting)

    def _has_room(self, model: str) -> bool:
        """Whether the pages of a model fit, or waiting cannot help."""
        return self.ring.can_load(model) or not self._n_brief

    def _take_frames(self, model: str) -> Extent:
        for extent in self.ring.make_room(model, self._policy):
            self._block_until_copied(extent.model)
        missing = self.ring.map_missing(model)
        self._policy.touch(model, 0.0)
        if missing.frames:
            self._reading.add(model)
        return missing

    def _fill_frames(self, missing: Extent, lasting: bool) -> None:
        """Read pages without the lock, so others can use the tier meanwhile."""
        model, error = missing.model, None
        try:
            self._read_all(missing)
        except BaseException as raised:
            error = raised
        with self._lock:
            self._reading.discard(model)
            if error:
                self.ring.roll_back(model, len(missing.frames))
                self._release(model, lasting)
            else:
                self.bytes_read += len(missing.frames) * self._page_bytes
            self._changed.notify_all()
        if error and not isinstance(error, Exception):
            raise error  # the caller was interrupted
        if error:
            raise DjinnError(
                f"expected {len(missing.frames)} pages of {model!r} from its swap file in "
                f"{self._folder}, got: {error}; try the request again, or add the model again"
            ) from error

    def _read_all(self, missing: Extent) -> None:
        """Read pages with all readers; no reader is active after this returns or raises."""
        file = self._known(missing.model)
        reads = [
            self._readers.submit(file.read, first_page, [self._frame(frame) for frame in frames])
            for first_page, frames in self._runs(missing)
        ]
        try:
            for read in reads:
                read.result()
        finally:  # after errors, too: the frames may go to another model
            for read in reads:
                read.cancel()
            wait(reads)

    def _runs(self, extent: Extent) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield consecutive pages for one read, as (first page, frames)."""
        n_pages = max(1, READ_BYTES // self._page_bytes)
        for i in range(0, len(extent.frames), n_pages):
            yield extent.first_page + i, extent.frames[i : i + n_pages]

    def _frame(self, frame: int) -> torch.Tensor:
        return self._frames[frame * self._page_bytes : (frame + 1) * self._page_bytes]

    def let_go(self, model: str, lasting: bool = False) -> None:
        """Undo one `hold` of the same kind; does nothing after the tier was closed."""
        with self._lock:
            if model in self._files:
                self._release(model, lasting)

    def _release(self, model: str, lasting: bool) -> None:
        self.ring.release(model)
        self._n_brief -= not lasting
        self._changed.notify_all()

    def read(self, model: str, begin: int, end: int) -> torch.Tensor:
        """Return bytes `begin` to `end` of a held model, within one page, read-only."""
        page = begin // self._page_bytes
        offset = begin - page * self._page_bytes
        return self._frame(self.ring.frames(model)[page])[offset : offset + end - begin]

    def pieces(self, model: str, begin: int, end: int) -> tuple[torch.Tensor, ...]:
        """Return stored bytes `begin` to `end` of a held model, page by page."""
        cuts = range((begin // self._page_bytes + 1) * self._page_bytes, end, self._page_bytes)
        return tuple(self.read(model, *piece) for piece in pairwise([begin, *cuts, end]))

    def tables(
        self, model: str, device: torch.device, moved_by: int = 0
    ) -> dict[str, torch.Tensor]:
        """Return no tables: they would have to stay in host memory.

        Raises:
            ConfigError: the model was packed with lookup tables.
        """
        if self.layout(model).n_tables:
            raise ConfigError(
                f"expected all of {model!r} to be paged with host_capacity, got lookup tables: "
                "use embeddings='ring'"
            )
        return {}

    def when_reused(self, block_until_copied: Callable[[str], None]) -> None:
        """Register a function to call before frames of a model get other content."""
        self._block_until_copied = block_until_copied

    def sha256(self, model: str) -> str:
        """Return the hash of the stored bytes, to compare masters."""
        digest, n_bytes = hashlib.sha256(), self._known(model).n_bytes
        self.hold(model)
        try:
            for begin in range(0, n_bytes, self._page_bytes):
                end = min(begin + self._page_bytes, n_bytes)
                digest.update(self.read(model, begin, end).numpy().data)
        finally:
            self.let_go(model)
        return digest.hexdigest()

    def sizes(self) -> dict[str, MasterBytes]:
        """Return the size of each master."""
        files = tuple(self._files.items())
        return {m: MasterBytes(file.layout.n_bytes, file.n_bytes) for m, file in files}

    def close(self) -> None:
        """Delete all masters and free the host memory; a second call does nothing."""
        with self._lock:
            self._changed.wait_for(lambda: not self._reading)
            for model in list(self._files):
                self._block_until_copied(model)
                self._files.pop(model).close()
        self._readers.shutdown()
        if self._pin and self._frames.numel():
            host.unpin(self._frames)
        self._frames = self._frames[:0].clone()
