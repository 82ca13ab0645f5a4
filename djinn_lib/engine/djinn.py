"""`Djinn`: several models behind one ring of device memory. The object that users hold."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel

from djinn_lib.arguments import flag
from djinn_lib.engine.decode.modes import Decode
from djinn_lib.engine.handles import Model, ModelsByName
from djinn_lib.engine.holdings import Holdings
from djinn_lib.engine.memory.lease import PagerStats
from djinn_lib.engine.memory.masters import Masters
from djinn_lib.engine.models.sources import open_source
from djinn_lib.engine.models.spec import ModelSpec
from djinn_lib.engine.pictures import ModelState, picture
from djinn_lib.engine.serving.catalog import Catalog
from djinn_lib.engine.serving.options import EngineOptions, takes_options
from djinn_lib.engine.serving.scheduler import Scheduler
from djinn_lib.errors import ConfigError, DjinnError
from djinn_lib.units import format_bytes


class Djinn(ModelsByName):
    """Serves models that together are larger than the device memory given to them.

    ``Djinn("25GiB")`` is enough on most machines; all parameters are those of `EngineOptions`.

    Raises:
        ConfigError: a parameter has no meaning.
        CapacityError: the capacity is below one page or above the free memory.
        PlatformError: the platform lacks what the device's backend needs.
    """

    @takes_options
    def __init__(self, options: EngineOptions) -> None:
        self.device = options.torch_device
        self._holdings = Holdings.made_of(options)
        # At the end of the process the system frees everything, and waits for nobody.
        weakref.finalize(self, self._holdings.collect).atexit = False

    @property
    def _open(self) -> Holdings:
        return self._holdings.ensure_open()

    @property
    def _models(self) -> Catalog:
        return self._open.models

    @property
    def _scheduler(self) -> Scheduler:
        return self._open.scheduler

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be copied, pickled or sent to another process."""
        raise DjinnError(
            "a Djinn cannot be copied or pickled, since it holds device memory and threads of this "
            "process: make one in each process, and send names and token ids"
        )

    # -- models ----------------------------------------------------------------------------

    def add(
        self,
        name: str,
        source: str | Path | ModelSpec,
        *,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> Model:
        """Read a model into its master, and prepare to decode with it.

        Unless decoding is eager, that takes a moment on the device: the model is loaded, and
        others may be evicted for it.

        Args:
            name: what requests will call it.
            source: a folder with config.json and safetensors, a hub id, or a `ModelSpec`.
            dtype: of the weights; default is that of the checkpoint.
            revision: commit, tag or branch of a hub id.
            trust_remote_code: allow Python code that comes with the checkpoint.

        Returns:
            The model, with methods of its own: ``djinn.add("chat", ...).generate("Hi")``.

        Raises:
            CheckpointError: weights are missing, truncated, corrupt, pickled or quantised.
            CapacityError: the host is full, or the model is larger than the ring and so are its two
                largest layers in a row.
            ConfigError: the name is taken, or the architecture cannot be used.
        """
        self._models.ensure_new(name)
        opened = open_source(source, dtype, revision, trust_remote_code)
        try:
            return Model(self, self._models.add(name, opened))
        except ConfigError:
            self._holdings.ensure_open()  # raises if they were closed meanwhile
            raise

    def set_decode(self, name: str, decode: Decode) -> Decode:
        """Change how one model decodes from now on; see the class.

        Returns:
            How it does, which is a slower way where its architecture allows nothing else.
        """
        return self._models.set_decode(name, decode)

    def remove(self, name: str) -> None:
        """Forget a model and free its frames, its addresses and its master copy.

        Raises:
            LeaseError: somebody is using it.
        """
        self._models.remove(name)

    # -- leases ------------------------------------------------------------------------------

    @contextmanager
    def lease(self, name: str, *, wait: bool = True) -> Iterator[PreTrainedModel]:
        """Lend a transformers model over the same weights that requests are computed with.

        Inside the block it can be called, and its weights can be read in any way; afterwards both
        raise `LeaseError`, until it is leased again. Weights cannot be written to. Other changes
        (adapters, hooks, training mode) are possible, affect no request, and are undone when the
        block ends, with a warning; those of the contents of `generation_config` stay. To keep
        weights, clone() them; to change them, change a copy (`copy.deepcopy(model)`).

        The weights of a model larger than the ring cannot be read by hand: it can only be called.

        Args:
            name: which model.
            wait: until every byte is on the device. Without, the model loads while it runs, layer
                by layer, and its weights cannot be read by hand before `djinn.wait(name)`.

        Raises:
            LeaseError: weights were written to in a way that could not be refused beforehand; they
                are loaded again.
            DjinnError: the weights could not be copied.
        """
        with self._scheduler.turn(name), self._models.lend(name, wait) as module:
            yield module

    def wait(self, name: str) -> None:
        """Block until every byte of a leased model is on the device.

        Raises:
            LeaseError: the model holds no lease.
            DjinnError: the copy failed.
        """
        self._models.block_until_loaded(name)

    def evict(self, name: str) -> int:
        """Take all pages of a model off the device; returns how many bytes that freed.

        Raises:
            LeaseError: somebody is using it.
        """
        self._models[name]
        return self._open.pager.evict(name)

    def reset(self) -> None:
        """Take all pages off the device, and forget what was asked for.

        Raises:
            LeaseError: somebody is using one of them; nothing was done.
        """
        self._open.pager.reset()

    @property
    def overlap(self) -> bool:
        """Whether computation starts while later layers still load; may be changed."""
        return self._scheduler.overlap

    @overlap.setter
    def overlap(self, overlap: bool) -> None:
        self._scheduler.overlap = flag(overlap, "overlap")

    # -- state -----------------------------------------------------------------------------

    @property
    def capacity_bytes(self) -> int:
        """Device memory for weights: all frames together."""
        return self._open.pager.capacity_bytes

    @property
    def page_bytes(self) -> int:
        """Size of a page and of a frame."""
        return self._open.pager.page_bytes

    @property
    def kv_cache_bytes(self) -> int:
        """Device memory set aside for keys and values, beside the ring."""
        return sum(model.decoder.kv_cache_bytes for model in self._models)

    @property
    def decode_modes(self) -> dict[str, Decode]:
        """How each model decodes, which may be a slower way than the one asked for."""
        return {model.name: model.decoder.mode for model in self._models}

    @property
    def logits_distances(self) -> dict[str, float]:
        """How far each model's logits were from those of transformers' `generate`.

        It is the greatest distance of a few prompts that were compared when the model was added, as
        a share of the norm of the logits without their mean. For eager decoding it is 0.
        """
        return {model.name: model.decoder.logits_distance for model in self._models}

    def stats(self) -> PagerStats:
        """Return what the ring holds at this moment, and for whom."""
        return self._open.pager.stats()

    @property
    def masters(self) -> Masters:
        """The master copies; to be read only."""
        return self._open.masters

    def residency(self) -> pd.DataFrame:
        """One row a model: model, bytes, resident_bytes, frames (how many it holds).

        Bytes are those that it takes on the device; lookup tables in the host do not count.
        """
        return self._models.residency()

    def sha256(self, name: str) -> str:
        """Hash of a model's master copy in packing order."""
        self._models[name]
        return self._open.masters.sha256(name)

    def check(self) -> None:
        """Audit the page tables, and compare all resident bytes with their masters.

        Raises:
            AssertionError: naming what is broken.
            DjinnError: a master cannot be read, or a compressed page of it has changed.
        """
        self._open.pager.check()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._holdings.is_closed

    def close(self) -> None:
        """Release all device and host memory; models lent before can no longer be used.

        The request that is being served comes to its end; those that wait fail. A `Djinn` that is
        collected does the same. Closing twice is harmless.

        Raises:
            LeaseError: called inside a lease.
            DjinnError: called in a forked child, which this does not belong to.
        """
        self._holdings.close()

    def __repr__(self) -> str:
        if not self._holdings.is_of_this_process:
            return "Djinn(of another process)"
        try:
            return f"Djinn({self._in_words(self.stats())})"
        except DjinnError:  # perhaps another thread closed it just now
            return "Djinn(closed)"

    def _repr_html_(self) -> str | None:
        """Draw which models are resident, and how far."""
        try:
            stats = self.stats()
            states = [
                ModelState(m.name, m.n_bytes, stats.resident_bytes[m.name], m.name in stats.leased)
                for m in self._models
                if m.name in stats.resident_bytes
            ]
            return picture(states, self._in_words(stats))
        except DjinnError:  # closed, or of another process
            return None

    def _in_words(self, stats: PagerStats) -> str:
        n, resident = len(self), format_bytes(sum(stats.resident_bytes.values()))
        ring = f"{format_bytes(self.capacity_bytes)} on {self.device}"
        words = f"{ring}, {n} model{'' if n == 1 else 's'}, {resident} resident"
        plain = sum(master.plain for master in stats.masters.values())
        stored = sum(master.stored for master in stats.masters.values())
        if stored < plain:
            words += f", masters of {format_bytes(plain)} in {format_bytes(stored)}"
        return words

    def __enter__(self) -> Djinn:
        return self

    def __exit__(self, *_: object) -> None:
        if self._holdings.is_of_this_process:  # a child that ends leaves its parent's as it is
            self.close()
