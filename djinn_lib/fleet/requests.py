"""Requests to a fleet: check them, pass them to an engine, and convert what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Unpack

from djinn_lib.engine.decode.sampling import Sampling, SamplingOptions
from djinn_lib.engine.prompts import (
    Messages,
    Prompt,
    ReadPrompt,
    is_conversation,
    read_prompts,
)
from djinn_lib.engine.serving.generation import Generation
from djinn_lib.engine.serving.stream import Stream
from djinn_lib.errors import ConfigError, shown
from djinn_lib.fleet.engines import EngineClient, PendingResult, Result

Part = str | list[int]


class Requests(ABC):
    """The methods of a `Fleet` that make requests."""

    @abstractmethod
    def engine(self, name: str) -> EngineClient:
        """Return the engine of a model.

        Raises:
            ConfigError: there is no such model.
        """

    def generate(
        self,
        name: str,
        prompt: Prompt | list[Prompt],
        max_new_tokens: int | None = None,
        ignore_eos: bool | None = None,
        *,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation | Any:  # Any: for a list of prompts, list[Generation]
        """Continue a prompt, or all of a list of them at once.

        Args:
            name: which model.
            prompt: as for `Djinn.generate`; vLLM batches a list of prompts.
            max_new_tokens, ignore_eos, sampling, options: as for `Djinn.generate`.

        Returns:
            The continuation and its costs; for a list of prompts a list. Bytes that several
            requests waited for count for the first of them.

        Raises:
            ConfigError: the model is unknown, or the prompt or a value is invalid.
            EngineDied: its engine ended.
        """
        asked = self.submit(name, prompt, max_new_tokens, ignore_eos, sampling=sampling, **options)
        if not isinstance(asked, list):
            return wait_for(asked)
        try:
            return [wait_for(one) for one in asked]
        finally:
            for one in asked:  # if one failed, the others are not needed
                one.cancel()

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
            max_new_tokens, ignore_eos, sampling, options: as for `generate`.

        Raises:
            ConfigError: as for `generate`; or the model has no chat template, or its template
                cannot take these messages.
            CheckpointError: the tokenizer cannot be read.
            EngineDied: its engine ended.
        """
        ids = chat_ids(self.engine(name), messages)
        return self.generate(name, ids, max_new_tokens, ignore_eos, sampling=sampling, **options)

    def submit(
        self,
        name: str,
        prompt: Prompt | list[Prompt],
        max_new_tokens: int | None = None,
        ignore_eos: bool | None = None,
        *,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> PendingResult | Any:  # Any: see `generate`
        """Queue what `generate` does, and return at once.

        Returns:
            A future: `result()` waits for the `Generation`, `cancel()` cancels the request. For a
            list of prompts, a list of futures.

        Raises:
            ConfigError: as for `generate`; nothing was queued.
        """
        engine = self.engine(name)
        asked = Sampling.of(sampling, max_new_tokens, ignore_eos, options)
        parameters = sampling_parameters(engine, asked)
        prompts, several = read_prompts(prompt)
        for one in prompts:
            check_prompt(engine, one, parameters["max_tokens"])
        pending = [engine.submit(one, parameters, convert=generation_of(engine)) for one in prompts]
        return pending if several else pending[0]

    def stream(
        self,
        name: str,
        prompt: Prompt | Messages,
        max_new_tokens: int | None = None,
        ignore_eos: bool | None = None,
        *,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Stream[Any]:  # Any: str, or list[int] for a model without a tokenizer
        """Yield a continuation during decoding: text, or token ids without a tokenizer.

        Each piece is the result of one step. Leaving the loop early cancels the request.

        Args:
            name: which model.
            prompt: one prompt, as for `generate`; or a list of messages, as for `chat`.
            max_new_tokens, ignore_eos, sampling, options: as for `generate`.

        Raises:
            ConfigError, EngineDied: as for `generate` and `chat`.
        """
        engine = self.engine(name)
        asked = Sampling.of(sampling, max_new_tokens, ignore_eos, options)
        parameters = sampling_parameters(engine, asked)
        prompts, several = read_prompts(
            chat_ids(engine, prompt) if is_conversation(prompt) else prompt
        )
        if several:
            raise ConfigError("several prompts cannot be streamed at once: pass one")
        check_prompt(engine, prompts[0], parameters["max_tokens"])
        parts: SimpleQueue[Part | None] = SimpleQueue()
        has_text = engine.facts["has_tokenizer"]
        pending = engine.submit(
            prompts[0], parameters, lambda ids, text: parts.put(text if has_text else ids)
        )
        return Stream(pending, parts, drop=pending.drop, name=name)


def sampling_parameters(engine: EngineClient, sampling: Sampling) -> dict[str, Any]:
    """Return a request's options under vLLM's names.

    Raises:
        ConfigError: there are stop texts, and the model has no tokenizer.
    """
    parameters: dict[str, Any] = {
        "max_tokens": sampling.max_new_tokens,
        "ignore_eos": sampling.ignore_eos,
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
    }
    if not sampling.greedy:
        seed = sampling.next_seed() & (2**63 - 1)  # vLLM takes signed seeds
        parameters |= {"top_k": sampling.top_k, "top_p": sampling.top_p, "seed": seed}
    if sampling.stops:
        if not engine.facts["has_tokenizer"]:
            raise ConfigError(f"stop needs a tokenizer, and {engine.name!r} has none: leave it out")
        parameters["stop"] = list(sampling.stops)
    return parameters


def chat_ids(engine: EngineClient, messages: object) -> list[int]:
    """Return the token ids of a conversation, up to the start of the model's answer.

    Raises:
        ConfigError: the model has no tokenizer or chat template, or the template cannot format
            these messages.
        CheckpointError: the tokenizer cannot be read.
    """
    if engine.tokenizer is None:
        raise ConfigError(f"{engine.name!r} has no tokenizer: pass token ids to generate()")
    return engine.tokenizer.encode_chat(messages)


def check_prompt(engine: EngineClient, prompt: ReadPrompt, max_new_tokens: int) -> None:
    """Check a prompt that vLLM would cut, or that has invalid token ids.

    Raises:
        ConfigError: the message says what is wrong with it.
    """
    facts = engine.facts
    if isinstance(prompt, str):
        if not facts["has_tokenizer"]:
            raise ConfigError(f"{engine.name!r} has no tokenizer: pass token ids")
        return
    if not prompt:
        raise ConfigError("a prompt without tokens cannot be continued: pass at least one")
    if wrong := [one for one in prompt if not 0 <= one < facts["vocab_size"]]:
        raise ConfigError(
            f"token id {shown(wrong[0])} is none of {engine.name!r}: its ids go from 0 to "
            f"{facts['vocab_size'] - 1}"
        )
    if len(prompt) + max_new_tokens > facts["max_model_len"]:
        raise ConfigError(
            f"{len(prompt)} tokens of prompt and {max_new_tokens} new ones are more than the "
            f"{facts['max_model_len']} of {engine.name!r}: ask for fewer, or add the model with a "
            "larger max_model_len"
        )


def generation_of(engine: EngineClient) -> Callable[[Result, float], Generation]:
    """Return a function from a result and its submission time to a `Generation`."""

    def convert(result: Result, submitted_s: float) -> Generation:
        has_text = engine.facts["has_tokenizer"]
        switch_ms = 1e3 * result["switch_s"]
        return Generation(
            token_ids=tuple(result["token_ids"]),
            text=result["text"] if has_text else None,
            finish_reason="length" if result["finish_reason"] == "length" else "stop",
            n_prompt_tokens=result["n_prompt_tokens"],
            loaded_bytes=result["loaded_bytes"],
            evicted_bytes=result["evicted_bytes"],
            resident_before_bytes=result["resident_before_bytes"],
            prefetched_bytes=0,
            queue_ms=1e3 * (result["begin_s"] - submitted_s),
            stall_ms=switch_ms,
            switch_ms=switch_ms,
            ttft_ms=1e3 * (result["first_s"] - submitted_s),
            decode_ms=1e3 * (result["last_s"] - result["first_s"]),
            total_ms=1e3 * (result["last_s"] - submitted_s),
        )

    return convert


def wait_for(pending: PendingResult) -> Generation:
    """Wait for a request; an interrupt cancels it."""
    try:
        return pending.result()
    except BaseException:
        pending.cancel()
        raise
