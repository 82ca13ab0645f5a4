"""Keep whole models at fixed addresses, so Djinn's decoders can run on them.

A recorded decode step reads its weights at the addresses of the recording. Plain tensors have other
addresses after every load. So this module maps and unmaps device memory, as the ring does.
Everything else is as in the PyTorch baselines: a model is copied as a whole from one pinned buffer,
and computing starts only when the whole model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from djinn_lib.engine.decode.cuda_graphs import Recorder
from djinn_lib.engine.decode.decoder import Decoder, make_decoder
from djinn_lib.engine.decode.eager import Tokens, check_prompt, vocabulary
from djinn_lib.engine.decode.modes import Decode
from djinn_lib.engine.device import DEFAULT_PAGE_BYTES
from djinn_lib.engine.memory.devices import open_address_space
from djinn_lib.engine.memory.devices.base import Range
from djinn_lib.engine.memory.masters import HostMasters
from djinn_lib.engine.models.packing import bind, pack
from djinn_lib.engine.models.sources import open_source
from djinn_lib.systems.base import ModelFiles

MAX_MODEL_LEN = 512


class StableWeights:
    """Hold models that are on the device as a whole or not at all.

    Frames are allocated once, so neither a load nor a drop waits for the driver's allocator. The
    capacity is for all resident models together. There is one extra page for each of `n_models`,
    because a model may end within a page.
    """

    def __init__(
        self,
        device: torch.device,
        decode: Decode,
        capacity_bytes: int,
        n_models: int,
        progress: Callable[[str], None],
    ) -> None:
        self._device, self._progress = device, progress
        self._decode: Decode = decode
        page_bytes = DEFAULT_PAGE_BYTES[device.type]
        n_frames = -(-capacity_bytes // page_bytes) + n_models
        self._space = open_address_space(device, n_frames, page_bytes)
        self._free = list(range(n_frames))
        self._masters = HostMasters(pin=device.type == "cuda")
        self._recorder = Recorder(device)
        self._areas: dict[str, Range] = {}
        self._mapped: dict[str, list[int]] = {}
        self._decoders: dict[str, Decoder] = {}
        self._n_ids: dict[str, int] = {}

    def add(self, files: ModelFiles) -> None:
        """Read a model into its master and create its decoder; it is not resident afterwards."""
        name, opened = files.name, open_source(files.folder, files.dtype)
        layout, units = pack(opened.module, "ring")
        self._masters.add(name, layout, opened.fill)
        area = self._space.reserve(-(-layout.paged_bytes // self._space.page_bytes))
        self._areas[name] = area
        self._n_ids[name] = vocabulary(opened.module)
        bind(opened.module, layout.paged_views(self._space.bytes_view(area)), self._device)
        self.load(name)
        try:
            self._decoders[name] = make_decoder(
                self._decode, opened.module, units, MAX_MODEL_LEN, self._recorder, self._progress
            )
        finally:
            self.drop(name)

    def load(self, name: str) -> None:
        """Map a model's pages and start to copy the whole model, on the current stream."""
        area = self._areas[name]
        frames = [self._free.pop() for _ in range(area.n_pages)]
        self._mapped[name] = frames
        self._space.map(area, 0, frames)
        self._on_device(name).copy_(self._masters.master(name), non_blocking=True)

    def write_back(self, name: str) -> None:
        """Start to copy the whole model to its master, which already has the same bytes."""
        self._masters.master(name).copy_(self._on_device(name), non_blocking=True)

    def drop(self, name: str) -> None:
        """Unmap a resident model once nothing on the device reads it any more."""
        if frames := self._mapped.pop(name, None):
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._space.unmap(self._areas[name], 0, len(frames))
            self._free += frames

    def _on_device(self, name: str) -> torch.Tensor:
        view = self._space.bytes_view(self._areas[name])
        return view[: self._masters.layout(name).paged_bytes]

    def generate(self, name: str, prompt_ids: Sequence[int], max_new_tokens: int) -> Tokens:
        """Decode with a model that is on the device.

        Raises:
            ConfigError: the prompt has ids that are not the model's, or does not fit. Recorded
                steps do not look at ids, and a wrong one makes a GPU unusable for the process.
        """
        ids = check_prompt(prompt_ids, self._n_ids[name], max_new_tokens)
        self._decoders[name].check_length(len(ids), max_new_tokens)
        return self._decoders[name].generate(ids, max_new_tokens, ignore_eos=True)

    def decoding(self) -> dict[str, dict[str, Any]]:
        """How each model decodes; see `SystemUnderTest.decoding`."""
        return {name: {"mode": decoder.mode, "logits_distance": decoder.logits_distance}
                for name, decoder in self._decoders.items()}  # fmt: skip

    def close(self) -> None:
        """Free everything."""
        for decoder in self._decoders.values():
            decoder.close()
        self._decoders.clear()
        for name, area in self._areas.items():
            self.drop(name)
            self._space.release(area)
        self._areas.clear()
        self._space.close()
        self._masters.close()
