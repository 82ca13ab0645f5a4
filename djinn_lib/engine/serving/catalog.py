"""The models of a `Djinn`: loaded, bound to their addresses, ready to decode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel

from djinn_lib.engine.decode.cuda_graphs import Recorder
from djinn_lib.engine.decode.decoder import Decoder, EagerDecoder, make_decoder
from djinn_lib.engine.decode.eager import hold_back
from djinn_lib.engine.decode.modes import Decode, parse_decode
from djinn_lib.engine.lending.lender import Lending
from djinn_lib.engine.memory.layout import Layout
from djinn_lib.engine.memory.masters import Masters
from djinn_lib.engine.memory.pager import Pager
from djinn_lib.engine.models.packing import Unit, Wait, bind, pack
from djinn_lib.engine.models.sources import OpenedModel
from djinn_lib.engine.models.tokenizer import Tokenizer
from djinn_lib.engine.serving.options import EngineOptions
from djinn_lib.engine.serving.progress import Progress, progress_of
from djinn_lib.engine.serving.served_model import ServedModel
from djinn_lib.errors import ConfigError, shown, unknown_model


class Catalog:
    """Served models by name.

    Args:
        masters: stores their master copies.
        pager: stores their pages.
        turn: takes a turn on the device, for recordings while a model is added.
        options: how new models decode, and where their lookup tables are.
    """

    def __init__(
        self,
        masters: Masters,
        pager: Pager,
        turn: Callable[[str], AbstractContextManager[None]],
        options: EngineOptions,
    ) -> None:
        self._masters, self._pager, self._turn, self._options = masters, pager, turn, options
        self._device = pager.space.device
        self._recorder = Recorder(self._device)
        self._models: dict[str, ServedModel] = {}
        self._is_cleared = False

    def __iter__(self) -> Iterator[ServedModel]:
        """Iterate over all models in order of addition."""
        return iter(tuple(self._models.values()))

    def __len__(self) -> int:
        return len(self._models)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._models

    def __getitem__(self, name: str) -> ServedModel:
        """Return a model by name.

        Raises:
            ConfigError: there is no such model.
        """
        model = self._models.get(name) if isinstance(name, str) else None
        if model is None:
            raise ConfigError(
                unknown_model(name, tuple(self._models), "add it with djinn.add(name, source)")
            )
        return model

    def ensure_new(self, name: str) -> None:
        """Raise `ConfigError` for an invalid name or one that is in use."""
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"a model's name must be non-empty text, got {shown(name)}")
        if name in self._models:
            raise ConfigError(
                f"model {name!r} already exists; choose another name or remove it first"
            )

    def add(self, name: str, opened: OpenedModel) -> ServedModel:
        """Load a model and prepare decoding, or leave nothing; see `Djinn.add`."""
        module = opened.module
        layout, units = pack(module, self._options.tables)
        # Pages come first: if they are refused, no weights are read in vain.
        device_bytes = self._pager.add(name, layout.paged_bytes, [unit.extents for unit in units])
        try:
            with progress_of(self._options.progress, name, layout.n_bytes) as progress:
                return self._prepare(name, opened, layout, units, device_bytes, progress)
        except BaseException:
            try:
                self._pager.remove(name)  # waits for copies from the master
            finally:  # a pager that was closed meanwhile has no such model
                self._masters.discard(name)
            raise

    def _prepare(
        self,
        name: str,
        opened: OpenedModel,
        layout: Layout,
        units: tuple[Unit, ...],
        device_bytes: torch.Tensor,
        progress: Progress,
    ) -> ServedModel:
        """Fill the master, bind the module to its addresses, and make its decoder."""
        module = opened.module
        self._masters.add(
            name, layout, lambda views: opened.fill(views, progress.advance), progress.step
        )
        tables = self._masters.tables(name, self._device)
        bind(module, layout.paged_views(device_bytes) | tables, self._device)
        hold_back(module, units, self._wait(name))
        addresses = range(device_bytes.data_ptr(), device_bytes.data_ptr() + len(device_bytes))
        lending = Lending(
            name,
            module,
            units,
            addresses,
            self._pager.is_streamed(name),
            lambda: self._pager.is_intact(name),
        )
        mode = self._options.decode_mode
        decoder = self._make_decoder(name, module, units, mode, opened.tokenizer, progress)
        self._models[name] = served = ServedModel(
            name, module, units, layout.paged_bytes, opened.tokenizer, decoder, lending
        )
        if self._is_cleared:  # meanwhile, perhaps without this model
            self.clear()
            raise ConfigError(f"the models were closed before {name!r} was added: make a new Djinn")
        return served

    def set_decode(self, name: str, decode: str) -> Decode:
        """Change how one model decodes; return the actual mode; see `Djinn.set_decode`."""
        mode = parse_decode(decode)
        self[name]  # refuses an unknown name before waiting
        with self._turn(name), self._lease_to_record(name, mode):
            model = self[name]  # look up again; the lease prevents its removal from here on
            with progress_of(self._options.progress, name, 0) as progress:
                decoder = self._make_decoder(
                    name, model.module, model.units, mode, model.tokenizer, progress
                )
            before, model.decoder = model.decoder, decoder
            before.close()
        return decoder.mode

    def _lease_to_record(self, name: str, decode: Decode) -> AbstractContextManager[Any]:
        """Lease a model if its weights are needed to make its decoder."""
        # A streamed model's step is bound by the link, so recording it brings nothing.
        needless = decode == "eager" or self._pager.is_streamed(name)
        return nullcontext() if needless else self._pager.lease(name)

    def _make_decoder(
        self,
        name: str,
        module: PreTrainedModel,
        units: Sequence[Unit],
        decode: Decode,
        tokenizer: Tokenizer | None,
        progress: Progress,
    ) -> Decoder:
        own = tokenizer.own if tokenizer else None
        if decode == "eager" or self._pager.is_streamed(name):
            return EagerDecoder(module, own)
        with self._turn(name), self._pager.lease(name):
            self._pager.block_until_loaded(name)
            return make_decoder(
                decode,
                module,
                units,
                self._options.max_model_len,
                self._recorder,
                progress.step,
                own,
                self._wait(name),
            )

    def _wait(self, name: str) -> Wait:
        """Return a function that blocks until given bytes of a model are loaded."""
        return lambda extents: self._pager.wait_for(name, extents)

    @contextmanager
    def lend(self, name: str, wait: bool) -> Iterator[PreTrainedModel]:
        """Lend a model to a user who holds a turn; see `Djinn.lease`."""
        self[name]  # refuses an unknown name before loading
        lending: Lending | None = None
        try:
            with self._pager.lease(name):
                lending = self[name].lending  # the lease prevents its removal from here on
                with lending.lend() as module:
                    if wait:
                        self.block_until_loaded(name)
                    yield module
        finally:
            if lending and lending.take_stale():
                self._pager.evict(name)  # the next lease reloads it from its master

    def block_until_loaded(self, name: str) -> None:
        """Block until a leased model is on the device; see `Djinn.wait`."""
        lending = self[name].lending
        self._pager.block_until_loaded(name)
        lending.now_whole()

    def remove(self, name: str) -> None:
        """Remove a model and free everything that it holds; see `Djinn.remove`."""
        model = self[name]
        self._pager.remove(name)
        self._masters.discard(name)
        model.removed = True  # before the name is free for another model
        self._models.pop(name, None)  # `clear` may have done so
        model.lending.retire("it was removed")
        model.decoder.close()

    def residency(self) -> pd.DataFrame:
        """Tabulate the resident bytes of each model; see `Djinn.residency`."""
        stats = self._pager.stats()
        return pd.DataFrame(
            [
                (m.name, m.n_bytes, stats.resident_bytes[m.name], len(stats.frames[m.name]))
                for m in self
                if m.name in stats.frames  # another thread may remove or add models
            ],
            columns=["model", "bytes", "resident_bytes", "frames"],
        )

    def clear(self) -> None:
        """Close all decoders and forget all models, also those that threads add meanwhile."""
        self._is_cleared = True
        for model in self:
            model.lending.retire("its Djinn was closed")
            model.decoder.close()
        self._models.clear()
