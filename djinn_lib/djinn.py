"""`Djinn`: several models behind one ring of device memory.

The object that users hold. It ties a transformers model to the pager: parameters are bound to the
model's virtual addresses once, and each unit of the model waits for its bytes before it runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import pandas as pd
import torch
from transformers import PreTrainedModel

from djinn_lib.decoder import Decode, Decoder, EagerDecoder, parse_decode
from djinn_lib.errors import ConfigError
from djinn_lib.generate import Generation, hold_back
from djinn_lib.models import ModelSpec, Unit, bind, pack
from djinn_lib.pager import Pager
from djinn_lib.policy import Policy
from djinn_lib.recorded_decoder import make_decoder
from djinn_lib.recording import Recorder
from djinn_lib.ring import Residency
from djinn_lib.sampling import Sampling
from djinn_lib.served import ServedModel
from djinn_lib.sources import open_source
from djinn_lib.swap_pool import SwapPool
from djinn_lib.units import parse_bytes

DEFAULT_PAGE_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}
DEFAULT_DECODE = {"cuda": "compiled"}
MIN_MODEL_LEN = 8


class Djinn:
    """Serves models that together are larger than the device memory given to them.

    Args:
        capacity: device memory for weights, in bytes or as text ("25GiB").
        device: "cuda", or "cpu" (Linux); default is a GPU where there is one.
        page: size of a page; default 64 MiB on a GPU, 1 MiB on the CPU.
        policy: who loses pages when the ring is full: "lru", or a `Policy`.
        residency: "partial" evicts only what is needed; "whole" evicts entire models.
        overlap: start computing while later layers still load; else wait for all of them first.
        decode: "eager" is transformers' own `generate`; "graph" records the same kernels once a
            model as CUDA graphs (on the CPU it runs them as they are); "compiled" also lets
            `torch.compile` make the step's kernels, which takes minutes the first time. Default
            is "compiled" on a GPU, "eager" on the CPU. A model that cannot be recorded is served
            eagerly, with a warning.
        max_model_len: tokens of a prompt and its continuation together, where decoding is not
            eager; device memory for keys and values is set aside for as many.
        progress: told what a longer step of `add` is doing.

    Raises:
        ConfigError: a parameter has no meaning.
        CapacityError: the capacity is below one page or above the free memory.
        PlatformError: the platform lacks what the device's backend needs.
    """

    def __init__(
        self,
        capacity: int | str,
        device: str | torch.device | None = None,
        page: int | str | None = None,
        policy: str | Policy = "lru",
        residency: Residency = "partial",
        overlap: bool = True,
        decode: Decode | None = None,
        max_model_len: int = 512,
        progress: Callable[[str], None] = print,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if page is None:
            page = DEFAULT_PAGE_BYTES.get(self.device.type, 1 << 20)
        self.overlap = overlap
        self.decode: Decode = parse_decode(
            decode or ("compiled" if self.device.type == "cuda" else "eager")
        )
        if max_model_len < MIN_MODEL_LEN:
            raise ConfigError(
                f"expected max_model_len of at least {MIN_MODEL_LEN} tokens, got {max_model_len}"
            )
        self.max_model_len = max_model_len
        self._progress = progress
        self._pool = SwapPool(pin=self.device.type == "cuda")
        self._pager = Pager(
            self._pool, parse_bytes(capacity), parse_bytes(page), self.device, policy, residency
        )
        self._recorder = Recorder(self.device)
        self._models: dict[str, ServedModel] = {}
        self._turn = threading.RLock()  # one computation at a time

    # -- models ----------------------------------------------------------------------------

    def add(
        self,
        name: str,
        source: str | Path | ModelSpec,
        *,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Read a model into the host swap pool, and prepare to decode with it.

        Unless decoding is eager, that takes a moment on the device: the model is loaded, and
        others may be evicted for it.

        Args:
            name: what requests will call it.
            source: a folder with config.json and safetensors, a hub id, or a `ModelSpec`.
            dtype: of the weights; default is that of the checkpoint.
            revision: commit, tag or branch of a hub id.
            trust_remote_code: allow Python code that comes with the checkpoint.

        Raises:
            CheckpointError: weights are missing, truncated, corrupt, pickled or quantised.
            CapacityError: the model alone is larger than the ring, or the host is full.
            ConfigError: the name is taken, or the architecture cannot be used.
        """
        if name in self._models:
            raise ConfigError(f"expected a new model name, got {name!r}, which was added before")
        opened = open_source(source, dtype, revision, trust_remote_code)
        module = opened.module
        layout, units = pack(module)
        device_bytes = self._pager.add(name, layout.n_bytes)  # first: a refusal costs no reading
        try:
            self._pool.add(name, layout, opened.fill)
            bind(module, layout.views(device_bytes), self.device)
            hold_back(module, units, lambda end_byte: self._pager.wait(name, end_byte))
            decoder = self._make_decoder(name, module, units, self.decode)
        except BaseException:
            self._pager.remove(name)
            self._pool.discard(name)
            raise
        self._models[name] = ServedModel(
            name, module, units, layout.n_bytes, opened.tokenizer, decoder
        )

    def set_decode(self, name: str, decode: Decode) -> Decode:
        """Change how one model decodes from now on; see the class.

        Returns:
            How it does, which is a slower way where its architecture allows nothing else.
        """
        model = self._known(name)
        with self._turn:
            decoder = self._make_decoder(name, model.module, model.units, parse_decode(decode))
            model.decoder.close()
            model.decoder = decoder
        return decoder.mode

    def _make_decoder(
        self, name: str, module: PreTrainedModel, units: Sequence[Unit], decode: Decode
    ) -> Decoder:
        if decode == "eager":
            return EagerDecoder(module)
        with self._turn, self._pager.lease(name):
            self._pager.finish(name)
            return make_decoder(
                decode,
                module,
                units,
                self.max_model_len,
                self._recorder,
                lambda step: self._progress(f"{name}: {step}"),
            )

    def remove(self, name: str) -> None:
        """Forget a model and free its frames, its addresses and its master copy.

        Raises:
            LeaseError: somebody is using it.
        """
        model = self._known(name)
        self._pager.remove(name)
        self._pool.discard(name)
        del self._models[name]
        model.decoder.close()

    def _known(self, name: str) -> ServedModel:
        if name not in self._models:
            raise ConfigError(
                f"expected one of the models {list(self._models)}, got {name!r}: "
                "add it with djinn.add(name, source)"
            )
        return self._models[name]

    # -- requests --------------------------------------------------------------------------

    def generate(
        self,
        name: str,
        prompt: str | Sequence[int],
        max_new_tokens: int = 50,
        ignore_eos: bool = False,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Generation:
        """Continue a prompt.

        Args:
            name: which model.
            prompt: text, for a model with a tokenizer, or token ids.
            max_new_tokens: upper limit of new tokens; exactly as many with `ignore_eos`.
            ignore_eos: do not stop at the end-of-sequence token, as benchmarks do.
            temperature, top_k, top_p, seed: see `Sampling`; the default is greedy.

        Raises:
            ConfigError: unknown model, or a prompt that it cannot take.
            DjinnError: the weights could not be copied; the request can be tried again.
        """
        model = self._known(name)
        sampling = Sampling(temperature, top_k, top_p, seed)
        ids = model.prompt_ids(prompt, max_new_tokens)  # first: a refusal loads nothing
        begin_s = time.perf_counter()
        with self._turn, self._pager.lease(name) as lease:
            if not self.overlap:
                self._pager.wait(name, model.n_bytes)
            lead_s = time.perf_counter() - begin_s
            tokens = model.decoder.generate(
                ids,
                max_new_tokens,
                ignore_eos,
                sampling,
                lambda end_byte: self._pager.wait(name, end_byte),
            )
        text = model.text(tokens.token_ids)
        return Generation.of(tokens, text, lease, lead_s)

    def tokenize(self, name: str, text: str) -> list[int]:
        """Return the token ids of `text`.

        Raises:
            ConfigError: the model has no tokenizer.
        """
        return self._known(name).tokenize(text)

    @contextmanager
    def lease(self, name: str) -> Iterator[PreTrainedModel]:
        """Lend the transformers model itself, loading what is missing while it runs.

        Inside the block the model can be used in any way; outside it refuses to run.
        """
        model = self._known(name)
        with self._turn, self._pager.lease(name):
            if not self.overlap:
                self._pager.wait(name, model.n_bytes)
            yield model.module

    def wait(self, name: str) -> None:
        """Block until every byte of a leased model is on the device.

        Raises:
            LeaseError: the model holds no lease.
            DjinnError: the copy failed.
        """
        self._pager.finish(name)

    def evict(self, name: str) -> int:
        """Take all pages of a model off the device; returns how many bytes that freed.

        Raises:
            LeaseError: somebody is using it.
        """
        self._known(name)
        return self._pager.evict(name)

    # -- state -----------------------------------------------------------------------------

    @property
    def capacity_bytes(self) -> int:
        """Device memory for weights: all frames together."""
        return self._pager.capacity_bytes

    @property
    def page_bytes(self) -> int:
        """Size of a page and of a frame."""
        return self._pager.page_bytes

    @property
    def kv_cache_bytes(self) -> int:
        """Device memory set aside for keys and values, beside the ring."""
        return sum(model.decoder.kv_cache_bytes for model in self._models.values())

    @property
    def pool(self) -> SwapPool:
        """The master copies in host memory; to be read only."""
        return self._pool

    def residency(self) -> pd.DataFrame:
        """One row a model: model, bytes, resident_bytes, frames (how many it holds)."""
        ring = self._pager.ring
        return pd.DataFrame(
            [
                (name, model.n_bytes, self._pager.resident_bytes(name), ring.n_resident(name))
                for name, model in self._models.items()
            ],
            columns=["model", "bytes", "resident_bytes", "frames"],
        )

    def sha256(self, name: str) -> str:
        """Hash of a model's master copy in packing order."""
        self._known(name)
        return self._pool.sha256(name)

    def check(self) -> None:
        """Audit the page tables, and compare all resident bytes with their masters.

        Raises:
            AssertionError: naming what is broken.
        """
        self._pager.check()

    def close(self) -> None:
        """Release all device and host memory; models lent before must not be used any more."""
        self._pager.close()  # first: it waits for what the device still does
        for model in self._models.values():
            model.decoder.close()
        self._models.clear()
        self._pool.close()

    def __enter__(self) -> Djinn:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
