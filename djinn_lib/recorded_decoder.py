"""Decoding with everything in its place: recorded prefills, and one recorded step a token.

transformers' own forward pass is recorded over tensors that never move: a prompt padded to one of a
few lengths, a `KvCache`, the next token and its logits. The prefill is recorded in pieces, so that
layers compute while later ones still load; the step is recorded as one, compiled or not. Both are
recorded once a model, at set-up, and hold whatever frames its weights are moved to.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

import torch
from transformers import PreTrainedModel

from djinn_lib.compiling import CompiledUnits, attentions, has_triton
from djinn_lib.decode_modes import Decode
from djinn_lib.decoder import Decoder, EagerDecoder, Proceed
from djinn_lib.errors import ConfigError, DjinnError
from djinn_lib.generate import Tokens, eos_ids
from djinn_lib.kv_cache import KvCache
from djinn_lib.models import Unit
from djinn_lib.recording import Recorder, Recording, Repeated, Wait
from djinn_lib.sampling import Sampler, Sampling

Manner = Callable[[], AbstractContextManager[None]]  # in which the step runs
FUSED = "fused layers"
SHORTEST_PREFILL = 32
PROBE_STEPS = 4
# How far the logits of compiled code may be from the others', which round elsewhere, as a share of
# their norm. Rounding gives a tenth of that.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class RecordedDecoder:
    """Replays recordings of one model, whose weights must be resident when they are made.

    Args:
        model: in evaluation mode, bound to its addresses.
        units: of the model, in the order of execution.
        max_model_len: tokens of a prompt and its continuation together.
        recorder: makes the recordings.
        compiled: make the step faster than transformers' code is, before it is recorded.
        progress: told what begins.

    Raises:
        ConfigError: the architecture cannot be served from a `KvCache`.
        Exception: whatever its forward pass raises when it cannot be recorded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        units: Sequence[Unit],
        max_model_len: int,
        recorder: Recorder,
        compiled: bool = False,
        progress: Callable[[str], None] = lambda step: None,
    ) -> None:
        self.model, self.max_model_len, self.device = model, max_model_len, model.device
        if "logits_to_keep" not in signature(model.forward).parameters:
            raise ConfigError(f"expected a forward pass with logits_to_keep in {type(model)}")
        self.cache = KvCache(model.config, max_model_len, self.device)
        self._prompt = torch.zeros((1, max_model_len), dtype=torch.long, device=self.device)
        self._last = torch.zeros(1, dtype=torch.long, device=self.device)
        self._token = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        self._logits: torch.Tensor = self._forward_prompt(1)
        self._manner: Manner = nullcontext
        for function in (lambda: self._prefill(min(max_model_len, SHORTEST_PREFILL)), self._decode):
            recorder.ensure_recordable(function)
        self._mailbox = _Mailbox(max_model_len, self.device)
        self._prefills: dict[int, Recording] = {}
        for length in prefill_lengths(max_model_len):
            progress(f"recording the prefill of up to {length} tokens")
            self._prefills[length] = recorder.record(
                lambda length=length: self._prefill(length), model, units
            )
        self.mode: Decode = "graph"
        self.way = "plain"
        self._step = self._record_step(recorder, units, compiled, progress)
        self.cache.clear()
        self.kv_cache_bytes = self.cache.n_bytes

    def _record_step(
        self,
        recorder: Recorder,
        units: Sequence[Unit],
        compiled: bool,
        progress: Callable[[str], None],
    ) -> Recording:
        end_byte = max(unit.end_byte for unit in units)
        expected = self._probe(Repeated(self._decode))
        for way, make in self._faster_ways(units) if compiled else ():
            progress(f"making a faster decode step: {way}")
            try:
                self._manner = make()
                step = recorder.record(self._decode, self.model, (), end_byte)
                ensure_alike(self._probe(step), expected)
                self.mode, self.way = "compiled", way
                return step
            except Exception as error:  # of any kind: it comes from the architecture's own code
                refused = way == FUSED and isinstance(error, ConfigError)
                logging.getLogger(__name__).log(
                    logging.INFO if refused else logging.WARNING,
                    "the decode step of a %s cannot be made with %s (%s: %s)",
                    self.model.config.model_type,
                    way,
                    type(error).__name__,
                    str(error).strip().split("\n")[0],
                )
                self._manner = nullcontext
        progress("recording the decode step")
        return recorder.record(self._decode, self.model, (), end_byte)

    def _faster_ways(self, units: Sequence[Unit]) -> Iterator[tuple[str, Callable[[], Manner]]]:
        """Ways to make the step faster than transformers' own code is, the fastest first."""
        if has_triton(self.device):
            from djinn_lib.fused_layers import FusedUnits  # needs triton

            yield FUSED, lambda: FusedUnits(self.model, units, self.cache).in_place
        for attention in attentions(self.device):
            yield (
                f"torch.compile, attention {attention}",
                lambda attention=attention: (
                    CompiledUnits(self.model, units, self.cache, attention).in_place
                ),
            )

    def _probe(self, step: Recording) -> torch.Tensor:
        """Logits (1, vocabulary) that a few steps give after some prompt, the tokens being set."""
        length = min(self._prefills)
        vocab_size = self.model.config.get_text_config().vocab_size
        with torch.no_grad():
            self._load_prompt([i % vocab_size for i in range(1, length - PROBE_STEPS)])
            self._prefills[length].replay(lambda end_byte: None)
            for i in range(PROBE_STEPS):
                self._token.fill_(i % vocab_size)
                step.replay(lambda end_byte: None)
            return self._logits.clone()

    def close(self) -> None:
        """Release the recordings and the cache."""
        self._prefills.clear()
        del self._step, self._manner, self.cache

    # -- what is recorded ------------------------------------------------------------------

    def _forward_prompt(self, length: int) -> torch.Tensor:
        """Logits (1, vocabulary) after the last token of the prompt, padded to `length`."""
        self.cache.mode(prefilling=True)
        output: Any = self.model(
            input_ids=self._prompt[:, :length],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=self._last,
        )
        return output.logits[:, -1]

    def _prefill(self, length: int) -> None:
        """Take the prompt in; leaves its logits, the most likely token, and where that goes."""
        self._logits.copy_(self._forward_prompt(length))
        self._token.copy_(self._logits.argmax(-1, keepdim=True))
        self.cache.position.copy_(self._last + 1)

    def _decode(self) -> None:
        """Take the token in; leaves what `_prefill` does."""
        self.cache.mode(prefilling=False)
        with self._manner():
            output: Any = self.model(
                input_ids=self._token, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
        self._logits.copy_(output.logits[:, -1])
        self._token.copy_(self._logits.argmax(-1, keepdim=True))
        self.cache.position.add_(1)

    # -- a request -------------------------------------------------------------------------

    def generate(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        ignore_eos: bool = False,
        sampling: Sampling | None = None,
        wait: Wait = lambda end_byte: None,
        proceed: Proceed | None = None,
    ) -> Tokens:
        """Continue a prompt whose ids and length have been checked.

        The host submits a step before it looks at the token of the step before, so that the device
        never waits for it; a token computed after the end of the sequence is dropped.

        Args:
            prompt_ids: token ids of one prompt.
            max_new_tokens: upper limit of new tokens; with `ignore_eos` exactly as many.
            ignore_eos: do not stop at the end-of-sequence token.
            sampling: how to choose tokens; default is the most likely one.
            wait: called before a piece runs that needs weights up to a byte.
            proceed: called once each token is submitted; what it raises ends the generation.
        """
        begin_s = time.perf_counter()
        ends = frozenset() if ignore_eos else eos_ids(self.model)
        sampler = None if sampling is None or sampling.greedy else Sampler(sampling, self.device)
        tokens: list[int] = []
        first_s = 0.0
        with torch.no_grad():
            self._load_prompt(prompt_ids)
            for n_submitted in range(1, max_new_tokens + 1):
                if n_submitted == 1:
                    self._prefills[self._prefill_length(len(prompt_ids))].replay(wait)
                else:
                    self._step.replay(wait)
                if proceed:
                    proceed()
                if sampler:
                    self._token.copy_(sampler.draw(self._logits))
                self._mailbox.send(n_submitted - 1, self._token)
                if n_submitted > 1:
                    tokens.append(self._mailbox.receive(n_submitted - 2))
                    first_s = first_s or time.perf_counter() - begin_s
                    if tokens[-1] in ends:
                        break
            else:
                tokens.append(self._mailbox.receive(max_new_tokens - 1))
        last_s = time.perf_counter() - begin_s
        return Tokens(tuple(tokens), first_s or last_s, last_s)

    def check_length(self, n_prompt: int, max_new_tokens: int) -> None:
        """Check that a prompt and its continuation fit.

        Raises:
            ConfigError: together they exceed `max_model_len`.
        """
        if n_prompt + max_new_tokens > self.max_model_len:
            raise ConfigError(
                f"expected at most {self.max_model_len} tokens, prompt and continuation together, "
                f"got {n_prompt} + {max_new_tokens}: shorten one, or raise max_model_len"
            )

    def _load_prompt(self, prompt_ids: Sequence[int]) -> None:
        """Put the prompt in its place; padding repeats its last token, and is never attended to."""
        n_padded = self._prefill_length(len(prompt_ids)) - len(prompt_ids)
        padded = torch.tensor([*prompt_ids, *[prompt_ids[-1]] * n_padded])
        self.cache.clear()
        self._prompt[0, : len(padded)].copy_(padded)
        self._last.fill_(len(prompt_ids) - 1)

    def _prefill_length(self, n_prompt: int) -> int:
        return min(length for length in self._prefills if length >= n_prompt)


def ensure_alike(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Refuse logits that cannot be explained by rounding.

    Raises:
        DjinnError: they are further apart.
    """
    distance = float((got.float() - expected.float()).norm() / expected.float().norm())
    if not distance <= TOLERANCE[got.dtype]:  # nor may it be NaN
        raise DjinnError(
            f"expected logits within {TOLERANCE[got.dtype]} of the plain step's, got {distance:.2g}"
        )


def prefill_lengths(max_model_len: int) -> list[int]:
    """Lengths that prompts are padded to: powers of two, and the longest there can be."""
    lengths, length = [], SHORTEST_PREFILL
    while length < max_model_len:
        lengths.append(length)
        length *= 2
    return [*lengths, max_model_len]


def make_decoder(
    decode: Decode,
    model: PreTrainedModel,
    units: Sequence[Unit],
    max_model_len: int,
    recorder: Recorder,
    progress: Callable[[str], None],
) -> Decoder:
    """Return a decoder that works as wished, or as near to that as the architecture allows.

    Not every forward pass can be compiled (some decide in Python what to compute next) or recorded
    (some look at values on the host). Such a model is served the next slower way, with a warning.
    """
    if decode == "eager":
        return EagerDecoder(model)
    compiled = decode == "compiled"
    try:
        return RecordedDecoder(model, units, max_model_len, recorder, compiled, progress)
    except Exception as error:  # of any kind: it comes from the architecture's own code
        logging.getLogger(__name__).warning(
            "a %s cannot be recorded, and decodes with transformers' own generate (%s: %s)",
            model.config.model_type,
            type(error).__name__,
            str(error).strip().split("\n")[0],
        )
        return EagerDecoder(model)


class _Mailbox:
    """Token ids on their way to the host, each with an event that says when it is there."""

    def __init__(self, n_slots: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._ids = torch.zeros(n_slots, dtype=torch.long, pin_memory=self._on_gpu)
        self._events = [torch.cuda.Event() for _ in range(n_slots if self._on_gpu else 0)]

    def send(self, slot: int, token: torch.Tensor) -> None:
        """Copy a token (1, 1) to a slot once the work submitted before is done."""
        self._ids[slot : slot + 1].copy_(token.view(1), non_blocking=True)
        if self._on_gpu:
            self._events[slot].record()

    def receive(self, slot: int) -> int:
        """Wait for the token of a slot and return it."""
        if self._on_gpu:
            self._events[slot].synchronize()
        return int(self._ids[slot])
