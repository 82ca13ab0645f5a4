"""What users ask of models: the methods of a `Djinn` that make requests."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from djinn_lib.engine.decode.eager import Generation
from djinn_lib.engine.decode.sampling import Sampling, SamplingOptions
from djinn_lib.engine.prompts import Prompt
from djinn_lib.engine.serving.catalog import Catalog
from djinn_lib.engine.serving.request import GenerationRequest, PendingGeneration, for_each
from djinn_lib.engine.serving.scheduler import Scheduler
from djinn_lib.engine.serving.served_model import ServedModel


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
        model, asked = self._asked(name, prompt, max_new_tokens, ignore_eos, sampling)
        return for_each(asked, lambda request: self._scheduler.generate(model, request))

    def _asked(
        self, name: str, prompt: object, n: int, ignore_eos: bool, how: SamplingOptions
    ) -> tuple[ServedModel, GenerationRequest | list[GenerationRequest]]:
        model = self._models[name]
        return model, model.ask(prompt, n, ignore_eos, Sampling.of(how))

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
            messages: such as ``[{"role": "user", "content": "Hi"}]``.
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
        model, asked = self._asked(name, prompt, max_new_tokens, ignore_eos, sampling)
        return for_each(asked, lambda request: self._scheduler.submit(model, request))

    async def agenerate(
        self,
        name: str,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int = 50,
        ignore_eos: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation | Any:  # Any: see `generate`
        """`generate` for asyncio; cancelling the task gives the request up.

        A task that holds a lease, or was started from one that does, gets a `LeaseError`.
        """
        self._scheduler.ensure_may_await(name)
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
            ConfigError: unknown model, no tokenizer, or one that cannot encode this.
        """
        return self._models[name].tokenize(text)
