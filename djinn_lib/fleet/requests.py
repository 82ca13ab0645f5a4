"""Requests of a fleet: checked before an engine sees them, and made into `Generation`s after."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, Unpack

from djinn_lib.arguments import whole_number
from djinn_lib.engine.decode.eager import Generation
from djinn_lib.engine.decode.sampling import MOST_TOKENS, Sampling, SamplingOptions
from djinn_lib.engine.prompts import Prompt, ReadPrompt, read_prompts
from djinn_lib.errors import ConfigError, shown
from djinn_lib.fleet.engines import EngineClient, PendingResult, Result

Part = str | list[int]


class Requests(ABC):
    """What a fleet is asked."""

    @abstractmethod
    def engine(self, name: str) -> EngineClient:
        """Return the engine of a model.

        Raises:
            ConfigError: no model is called so.
        """

    def generate(
        self,
        name: str,
        prompt: Prompt | list[Prompt],
        max_new_tokens: int = 50,
        ignore_eos: bool = False,
        stop: str | list[str] | None = None,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation | Any:  # Any: for a list of prompts, list[Generation]
        """Continue a prompt, or all of a list of them at once.

        Args:
            name: which model.
            prompt: as for `Djinn.generate`; a list of prompts is batched by vLLM.
            max_new_tokens: upper limit of new tokens; exactly as many with `ignore_eos`.
            ignore_eos: do not stop at the end-of-sequence token, as benchmarks do.
            stop: texts that end a continuation, for a model with a tokenizer.
            sampling: how to choose; or its fields as options: temperature, top_k, top_p and seed.
                The default is greedy.
            options: see `sampling`.

        Returns:
            What the model said and what it cost; for a list of prompts a list. Bytes that several
            requests waited for count for the first of them.

        Raises:
            ConfigError: unknown model, a prompt that it cannot take, or a value without meaning.
            EngineDied: its engine ended.
        """
        asked = self.submit(name, prompt, max_new_tokens, ignore_eos, stop, sampling, **options)
        if not isinstance(asked, list):
            return wait_for(asked)
        try:
            return [wait_for(one) for one in asked]
        finally:
            for one in asked:  # where one failed, nobody waits for the others
                one.cancel()

    def submit(
        self,
        name: str,
        prompt: Prompt | list[Prompt],
        max_new_tokens: int = 50,
        ignore_eos: bool = False,
        stop: str | list[str] | None = None,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> PendingResult | Any:  # Any: see `generate`
        """Hand what `generate` does to the engine and return at once.

        Returns:
            A future: `result()` waits for the `Generation`, `cancel()` gives the request up. For a
            list of prompts a list of them.

        Raises:
            ConfigError: as for `generate`; nothing was asked.
        """
        engine = self.engine(name)
        chosen = one_sampling(sampling, options)
        parameters = sampling_parameters(max_new_tokens, ignore_eos, stop, chosen)
        prompts, several = read_prompts(prompt)
        for one in prompts:
            check_prompt(engine, one, parameters["max_tokens"])
        pending = [engine.submit(one, parameters, convert=generation_of(engine)) for one in prompts]
        return pending if several else pending[0]

    def stream(
        self,
        name: str,
        prompt: Prompt,
        max_new_tokens: int = 50,
        ignore_eos: bool = False,
        stop: str | list[str] | None = None,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[Part]:
        """Yield a continuation as it comes: text, or token ids for a model without a tokenizer.

        Leaving the loop early gives the request up.

        Raises:
            ConfigError, EngineDied: as for `generate`.
        """
        engine = self.engine(name)
        chosen = one_sampling(sampling, options)
        parameters = sampling_parameters(max_new_tokens, ignore_eos, stop, chosen)
        prompts, several = read_prompts(prompt)
        if several:
            raise ConfigError("several prompts cannot be streamed at once: pass one")
        check_prompt(engine, prompts[0], parameters["max_tokens"])
        parts: SimpleQueue[Part | None] = SimpleQueue()
        has_text = engine.facts["has_tokenizer"]
        pending = engine.submit(
            prompts[0], parameters, lambda ids, text: parts.put(text if has_text else ids)
        )
        pending.add_done_callback(lambda done: parts.put(None))
        return parts_of(pending, parts)


def one_sampling(sampling: Sampling | None, options: SamplingOptions) -> Sampling:
    """Return how to choose, whichever way it was said.

    Raises:
        ConfigError: both ways, or a value has no meaning.
    """
    if sampling is None:
        return Sampling.of(options)
    if options:
        raise ConfigError(f"sampling and {sorted(options)[0]} were both given: pass one of them")
    return sampling


def sampling_parameters(
    max_new_tokens: int, ignore_eos: bool, stop: str | list[str] | None, sampling: Sampling
) -> dict[str, Any]:
    """Return a request's options as vLLM calls them."""
    parameters: dict[str, Any] = {
        "max_tokens": whole_number(max_new_tokens, "max_new_tokens", 1, MOST_TOKENS),
        "ignore_eos": bool(ignore_eos),
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
    }
    if not sampling.greedy:
        seed = sampling.next_seed() & (2**63 - 1)  # vLLM's are signed
        parameters |= {"top_k": sampling.top_k, "top_p": sampling.top_p, "seed": seed}
    if stop:
        parameters["stop"] = [stop] if isinstance(stop, str) else list(stop)
    return parameters


def check_prompt(engine: EngineClient, prompt: ReadPrompt, max_new_tokens: int) -> None:
    """Refuse a prompt that vLLM would cut, or read beyond its tables for.

    Raises:
        ConfigError: naming what is wrong with it.
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
    """Return what makes a `Generation` of an engine's result and of when it was asked for."""

    def convert(result: Result, submitted_s: float) -> Generation:
        has_text = engine.facts["has_tokenizer"]
        switch_ms = 1e3 * result["switch_s"]
        return Generation(
            token_ids=tuple(result["token_ids"]),
            text=result["text"] if has_text else None,
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
    """Wait for a request; an interrupt gives it up."""
    try:
        return pending.result()
    except BaseException:
        pending.cancel()
        raise


def parts_of(pending: PendingResult, parts: SimpleQueue[Part | None]) -> Iterator[Part]:
    """Yield the parts of a request until it is done; leaving early gives it up."""
    try:
        while (part := parts.get()) is not None:
            yield part
        pending.result()
    finally:
        pending.cancel()
