"""`Djinn`: several models behind one ring of device memory. The object that users hold."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Unpack

import pandas as pd
import torch
from transformers import PreTrainedModel

from djinn_lib.arguments import flag, function
from djinn_lib.engine.decode.eager import Generation
from djinn_lib.engine.decode.modes import Decode, default_decode
from djinn_lib.engine.decode.sampling import Sampling, SamplingOptions
from djinn_lib.engine.device import DEFAULT_PAGE_BYTES, parse_device
from djinn_lib.engine.holdings import Holdings
from djinn_lib.engine.memory.disk_tier import open_masters
from djinn_lib.engine.memory.masters import Masters
from djinn_lib.engine.memory.pager import Pager
from djinn_lib.engine.memory.policies import Policy, make_policy, sparing_what_waits
from djinn_lib.engine.memory.ring import Residency
from djinn_lib.engine.models.packing import Embeddings, choose_embeddings
from djinn_lib.engine.models.sources import open_source
from djinn_lib.engine.models.spec import ModelSpec
from djinn_lib.engine.prompts import Prompt
from djinn_lib.engine.serving.catalog import Catalog, check_decoding
from djinn_lib.engine.serving.queue import Order, RequestQueue
from djinn_lib.engine.serving.request import PendingGeneration, for_each
from djinn_lib.engine.serving.scheduler import Server
from djinn_lib.engine.serving.turns import Ticket
from djinn_lib.errors import DjinnError
from djinn_lib.units import parse_bytes


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
            model as CUDA graphs (on the CPU it runs them as they are); "compiled" also has
            kernels of its own for the step, or those of `torch.compile`, once made. Default
            is "compiled" on a GPU, "eager" on the CPU. A model that cannot be recorded is served
            eagerly, with a warning.
        max_model_len: tokens of a prompt and its continuation together, where decoding is not
            eager; device memory for keys and values is set aside for as many.
        order: of requests that wait: "fifo", or "affinity", which serves the oldest one whose model
            is resident first.
        max_overtaken: with "affinity", by how many later requests one is overtaken at most.
        lookahead: while one request computes, load what the next ones miss.
        embeddings: "host" leaves lookup tables (embeddings that are not tied to the head) in host
            memory, from where the device reads a row a token; "ring" pages them like all else.
            Default is "host", but "ring" with `host_capacity`.
        host_capacity: host memory for master copies, in bytes or as text; the rest is kept on disk
            and read when it is needed. Default is as much as all models need.
        swap_dir: where, with `host_capacity`; default DJINN_SWAP_DIR, or the user's cache.
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
        order: Order = "fifo",
        max_overtaken: int = 8,
        lookahead: bool = True,
        embeddings: Embeddings | None = None,
        host_capacity: int | str | None = None,
        swap_dir: str | Path | None = None,
        progress: Callable[[str], None] = print,
    ) -> None:
        self.device = parse_device(device)
        if page is None:
            page = DEFAULT_PAGE_BYTES[self.device.type]
        decode = default_decode(self.device.type) if decode is None else decode
        check_decoding(decode, max_model_len)
        overlap, lookahead = flag(overlap, "overlap"), flag(lookahead, "lookahead")
        function(progress, "progress")
        queue = RequestQueue[Ticket](order, max_overtaken)
        chosen = sparing_what_waits(make_policy(policy)) if lookahead else make_policy(policy)
        place = choose_embeddings(embeddings, host_capacity is None)
        n_bytes, page_bytes = parse_bytes(capacity), parse_bytes(page)
        with ExitStack() as undo:  # what was made, should the next step fail
            masters = open_masters(host_capacity, page_bytes, swap_dir, self.device.type == "cuda")
            undo.callback(masters.close)
            pager = Pager(masters, n_bytes, page_bytes, self.device, chosen, residency)
            undo.callback(pager.close)
            server = Server(pager, queue, overlap, lookahead)
            models = Catalog(
                masters,
                pager,
                server.turn,
                self.device,
                decode,
                int(max_model_len),
                place,
                progress,
            )
            undo.pop_all()
        self._holdings = Holdings(server, pager, models, masters)
        # At the end of the process the system frees everything, and waits for nobody.
        weakref.finalize(self, self._holdings.collect).atexit = False

    @property
    def _server(self) -> Server:
        return self._holdings.ensure_open().server

    @property
    def _pager(self) -> Pager:
        return self._holdings.ensure_open().pager

    @property
    def _models(self) -> Catalog:
        return self._holdings.ensure_open().models

    @property
    def _masters(self) -> Masters:
        return self._holdings.ensure_open().masters

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
    ) -> None:
        """Read a model into its master, and prepare to decode with it.

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
            CapacityError: the host is full, or the model is larger than the ring and so are its two
                largest layers in a row.
            ConfigError: the name is taken, or the architecture cannot be used.
        """
        self._models.ensure_new(name)
        self._models.add(name, open_source(source, dtype, revision, trust_remote_code))

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

    # -- requests --------------------------------------------------------------------------

    def generate(
        self,
        name: str,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int = 50,
        ignore_eos: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation | Any:  # Any: for a list of prompts, list[Generation]
        """Continue a prompt, or each of a list of them.

        Safe to be called from many threads: requests wait for each other. See `submit` and
        `agenerate` for callers that do not want to wait.

        Args:
            name: which model.
            prompt: text, for a model with a tokenizer; token ids, as a list or an array of shape
                [n] or [1, n]; or what a tokenizer returns, whose padding is dropped. A list of
                prompts is served one after the other, as is the output of a tokenizer for several.
            max_new_tokens: upper limit of new tokens; exactly as many with `ignore_eos`.
            ignore_eos: do not stop at the end-of-sequence token, as benchmarks do.
            sampling: temperature, top_k, top_p and seed; see `Sampling`. The default is greedy.

        Returns:
            What the model said and what it cost; for a list of prompts a list.

        Raises:
            ConfigError: unknown model, a prompt that it cannot take, or a value without meaning;
                nothing was loaded for it.
            DjinnError: the weights could not be copied; the request can be tried again.
        """
        model = self._models[name]
        asked = model.ask(prompt, max_new_tokens, ignore_eos, Sampling.of(sampling))
        return for_each(asked, lambda request: self._server.generate(model, request))

    def chat(
        self,
        name: str,
        messages: Sequence[Mapping[str, Any]],
        max_new_tokens: int = 50,
        ignore_eos: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation:
        """Answer a conversation, formatted with the chat template of the model's tokenizer.

        Args:
            name: which model.
            messages: each with "role" and "content", both text: ``[{"role": "user", "content":
                "Hi"}]``.
            max_new_tokens, ignore_eos, sampling: see `generate`.

        Raises:
            ConfigError: as for `generate`; or the model has no chat template, or its template
                cannot take these messages.
            DjinnError: the weights could not be copied; the request can be tried again.
        """
        ids = self._models[name].chat_ids(messages)
        return self.generate(name, ids, max_new_tokens, ignore_eos, **sampling)

    def submit(
        self,
        name: str,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int = 50,
        ignore_eos: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> PendingGeneration | Any:  # Any: see `generate`
        """Queue what `generate` does, and return at once; a thread of this object serves it.

        Returns:
            A future: `result()` waits for the `Generation`, `cancel()` gives the request up. For a
            list of prompts a list of them.

        Raises:
            ConfigError: as for `generate`; nothing was queued.
        """
        model = self._models[name]
        asked = model.ask(prompt, max_new_tokens, ignore_eos, Sampling.of(sampling))
        return for_each(asked, lambda request: self._server.submit(model, request))

    async def agenerate(
        self,
        name: str,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int = 50,
        ignore_eos: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation | Any:  # Any: see `generate`
        """`generate` for asyncio; cancelling the task gives the request up.

        Raises:
            LeaseError: the task, or one that it was started from, holds a lease.
        """
        self._server.ensure_may_await(name)
        pending = self.submit(name, prompt, max_new_tokens, ignore_eos, **sampling)
        if not isinstance(pending, list):
            return await asyncio.wrap_future(pending)
        waiting = [asyncio.wrap_future(one) for one in pending]
        try:
            return await asyncio.gather(*waiting)
        finally:
            for one in waiting:  # where one failed, nobody waits for the others
                one.cancel()

    def tokenize(self, name: str, text: str) -> list[int]:
        """Return the token ids of `text`, as `generate` would have them.

        Raises:
            ConfigError: unknown model, the model has no tokenizer, or its tokenizer cannot encode
                this.
        """
        return self._models[name].tokenize(text)

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
        with self._server.turn(name), self._models.lend(name, wait) as module:
            yield module

    def wait(self, name: str) -> None:
        """Block until every byte of a leased model is on the device.

        Raises:
            LeaseError: the model holds no lease.
            DjinnError: the copy failed.
        """
        self._models.wait(name)

    def evict(self, name: str) -> int:
        """Take all pages of a model off the device; returns how many bytes that freed.

        Raises:
            LeaseError: somebody is using it.
        """
        self._models[name]
        return self._pager.evict(name)

    def reset(self) -> None:
        """Take all pages off the device, and forget what was asked for: a ring as it was at first.

        Raises:
            LeaseError: somebody is using one of them; nothing was done.
        """
        self._pager.reset()

    @property
    def overlap(self) -> bool:
        """Whether computation starts while later layers still load; may be changed."""
        return self._server.overlap

    @overlap.setter
    def overlap(self, overlap: bool) -> None:
        self._server.overlap = flag(overlap, "overlap")

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
        return sum(model.decoder.kv_cache_bytes for model in self._models)

    @property
    def masters(self) -> Masters:
        """The master copies; to be read only."""
        return self._masters

    def residency(self) -> pd.DataFrame:
        """One row a model: model, bytes, resident_bytes, frames (how many it holds).

        Bytes are those that it takes on the device; lookup tables in the host do not count.
        """
        return self._models.residency()

    def sha256(self, name: str) -> str:
        """Hash of a model's master copy in packing order."""
        self._models[name]
        return self._masters.sha256(name)

    def check(self) -> None:
        """Audit the page tables, and compare all resident bytes with their masters.

        Raises:
            AssertionError: naming what is broken.
        """
        self._pager.check()

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

    def __enter__(self) -> Djinn:
        return self

    def __exit__(self, *_: object) -> None:
        if self._holdings.is_of_this_process:  # a child that ends leaves its parent's as it is
            self.close()
