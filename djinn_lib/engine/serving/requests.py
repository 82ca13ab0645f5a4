"""What users ask of models: the methods of a `Djinn` that make requests."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, Unpack

from djinn_lib.engine.decode.sampling import Sampling, SamplingOptions
from djinn_lib.engine.prompts import Messages, Prompt, is_conversation
from djinn_lib.engine.serving.catalog import Catalog
from djinn_lib.engine.serving.generation import Generation
from djinn_lib.engine.serving.request import GenerationRequest, PendingGeneration, for_each
from djinn_lib.engine.serving.scheduler import Scheduler
from djinn_lib.engine.serving.served_model import ServedModel
from djinn_lib.engine.serving.stream import Stream
from djinn_lib.engine.serving.transcript import Piece
from djinn_lib.errors import ConfigError


class Requests(ABC):
    """Requests to the models of a catalog, served by a scheduler."""

    @property
    @abstractmethod
    def _models(self) -> Catalog: ...

    @property
    @abstractmethod
    def _scheduler(self) -> Scheduler: ...

    def generate(
        self,
        name: str,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int | None = None,
        ignore_eos: bool | None = None,
        *,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation | Any:  # Any: for a list of prompts, list[Generation]
        """Continue a prompt, or each of a list of them.

        Safe to be called from many threads: requests wait for each other. See `submit` and
        `agenerate` for callers that do not want to wait.

        Args:
            name: which model.
            prompt: text, for a model with a tokenizer; token ids, as a list or an array of shape
                [n] or [1, n]; or what a tokenizer returns, whose padding is dropped. A list of
                prompts is served one after the other, as is the output of a tokenizer for several.
            max_new_tokens: upper limit of new tokens, 50 by default; exactly as many with
                `ignore_eos`, unless a stop text appears.
            ignore_eos: do not stop at the end-of-sequence token, as benchmarks do.
            sampling: all that can be asked for, in one object; the default is greedy.
            options: fields of `Sampling` by name (temperature, top_k, top_p, seed, stop), as
                `max_new_tokens` and `ignore_eos` are. They override those of `sampling`.

        Returns:
            What the model said and what it cost; for a list of prompts a list.

        Raises:
            ConfigError: unknown model, a prompt that it cannot take, or a value without meaning;
                nothing was loaded for it.
            DjinnError: the weights could not be copied; the request can be tried again.
        """
        model, asked = self._asked(
            name, prompt, Sampling.of(sampling, max_new_tokens, ignore_eos, options)
        )
        return for_each(asked, lambda request: self._scheduler.generate(model, request))

    def _asked(
        self, name: str, prompt: object, sampling: Sampling
    ) -> tuple[ServedModel, GenerationRequest | list[GenerationRequest]]:
        model = self._models[name]
        return model, model.ask(prompt, sampling)

    def chat(
        self,
        name: str,
        messages: Messages,
        max_new_tokens: int | None = None,
        ignore_eos: bool | None = None,
        *,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation:
        """Answer a conversation, formatted with the chat template of the model's tokenizer.

        Args:
            name: which model.
            messages: such as ``[{"role": "user", "content": "Hi"}]``; a text is one such message.
            max_new_tokens, ignore_eos, sampling, options: see `generate`.

        Raises:
            ConfigError: as for `generate`; or the model has no chat template, or its template
                cannot take these messages.
            DjinnError: the weights could not be copied; the request can be tried again.
        """
        ids = self._models[name].chat_ids(messages)
        return self.generate(name, ids, max_new_tokens, ignore_eos, sampling=sampling, **options)

    def submit(
        self,
        name: str,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int | None = None,
        ignore_eos: bool | None = None,
        *,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> PendingGeneration | Any:  # Any: see `generate`
        """Queue what `generate` does, and return at once; a thread of this object serves it.

        Returns:
            A future: `result()` waits for the `Generation`, `cancel()` gives the request up. For a
            list of prompts a list of them.

        Raises:
            ConfigError: as for `generate`; nothing was queued.
        """
        model, asked = self._asked(
            name, prompt, Sampling.of(sampling, max_new_tokens, ignore_eos, options)
        )
        return for_each(asked, lambda request: self._scheduler.submit(model, request))

    async def agenerate(
        self,
        name: str,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int | None = None,
        ignore_eos: bool | None = None,
        *,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation | Any:  # Any: see `generate`
        """`generate` for asyncio; cancelling the task gives the request up.

        A task that holds a lease, or was started from one that does, gets a `LeaseError`.
        """
        self._scheduler.ensure_may_await(name)
        pending = self.submit(
            name, prompt, max_new_tokens, ignore_eos, sampling=sampling, **options
        )
        if not isinstance(pending, list):
            return await asyncio.wrap_future(pending)
        waiting = [asyncio.wrap_future(one) for one in pending]
        try:
            return await asyncio.gather(*waiting)
        finally:
            for one in waiting:  # where one failed, nobody waits for the others
                one.cancel()

    def stream(
        self,
        name: str,
        prompt: Prompt | Messages,
        max_new_tokens: int | None = None,
        ignore_eos: bool | None = None,
        *,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Stream[Any]:  # Any: str, or int for a model without a tokenizer
        """Yield a continuation while it is decoded.

        The pieces are text; no character is cut, and together they are the generation's `text`.
        Those of a model without a tokenizer are token ids. Leaving the loop early gives the request
        up. `result()` of what is returned waits for the `Generation`.

        Args:
            name: which model.
            prompt: one prompt, as for `generate`; or a list of messages, as for `chat`.
            max_new_tokens, ignore_eos, sampling, options: see `generate`.

        Raises:
            ConfigError: as for `generate` and `chat`; nothing was queued.
            LeaseError: the calling thread holds a lease.
        """
        asked = Sampling.of(sampling, max_new_tokens, ignore_eos, options)
        pieces: SimpleQueue[Piece | None] = SimpleQueue()
        self._scheduler.ensure_may_wait(name)
        pending = self._streamed(name, prompt, asked, pieces.put)
        return Stream(
            pending,
            pieces,
            partial(self._scheduler.ensure_may_wait, name),
            pending.request.cancelled.set,
            name,
        )

    async def astream(
        self,
        name: str,
        prompt: Prompt | Messages,
        max_new_tokens: int | None = None,
        ignore_eos: bool | None = None,
        *,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncIterator[Any]:
        """`stream` for asyncio; leaving the loop or cancelling the task gives the request up."""
        asked = Sampling.of(sampling, max_new_tokens, ignore_eos, options)
        self._scheduler.ensure_may_await(name)
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece | None]()

        def deliver(piece: Piece | None) -> None:
            with suppress(RuntimeError):  # the loop was closed: nobody listens
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        pending = self._streamed(name, prompt, asked, deliver)
        pending.add_done_callback(lambda done: deliver(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            pending.result()  # which raises what the request failed with
        finally:
            pending.cancel()

    def _streamed(
        self, name: str, prompt: object, sampling: Sampling, deliver: Callable[[Piece], None]
    ) -> PendingGeneration:
        """Queue a request whose pieces are delivered."""
        if is_conversation(prompt):
            prompt = self._models[name].chat_ids(prompt)
        model, request = self._asked(name, prompt, sampling)
        if isinstance(request, list):
            raise ConfigError("several prompts cannot be streamed at once: pass one")
        request.deliver = deliver
        return self._scheduler.submit(model, request)

    def tokenize(self, name: str, text: str) -> list[int]:
        """Return the token ids of `text`, as `generate` would have them.

        Raises:
            ConfigError: unknown model, no tokenizer, or one that cannot encode this.
        """
        return self._models[name].tokenize(text)
