"""Decoding with everything in its place: recorded prefills, and one recorded step a token.

transformers' own forward pass is recorded over tensors that never move: a prompt padded to one of a
few lengths, a `KvCache`, the next token and its logits. The prefill is recorded in pieces, so that
layers compute while later ones still load; the step is recorded as one, compiled or not. Both are
recorded once a model, at set-up, and hold whatever frames its weights are moved to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from inspect import signature
from typing import Any

import torch
from transformers import PreTrainedModel

from djinn_lib.engine.decode.compiled import Manner, faster_ways, note_refusal
from djinn_lib.engine.decode.cuda_graphs import Mailbox, Recorder, Recording, Repeated
from djinn_lib.engine.decode.eager import OnToken, Proceed, Tokens, ends_with
from djinn_lib.engine.decode.generation_options import eos_ids
from djinn_lib.engine.decode.kv_cache import KvCache
from djinn_lib.engine.decode.modes import Decode
from djinn_lib.engine.decode.positions import check_positions, longest
from djinn_lib.engine.decode.reference import N_TOKENS, Followed, Reference, References
from djinn_lib.engine.decode.sampling import Draws, Sampler
from djinn_lib.engine.memory.layout import Extents
from djinn_lib.engine.models.packing import Unit, Wait
from djinn_lib.errors import ConfigError

SHORTEST_PREFILL = 32
LONG_PROBE = 128  # tokens of the longer probe, where no window is longer


class RecordedDecoder:
    """Replays recordings of one model, whose weights must be resident when they are made.

    Args:
        model: in evaluation mode, bound to its addresses.
        units: of the model, in the order of execution.
        max_model_len: tokens of a prompt and its continuation together; no more than the model has
            positions for are made room for.
        recorder: makes the recordings.
        compiled: make the step faster than transformers' code is, before it is recorded.
        progress: told what begins.
        wait: called before a recorded piece runs, with the bytes of weights that it needs.

    Raises:
        ConfigError: the architecture cannot be served from a `KvCache`.
        DjinnError: it can, but with other logits than those of transformers' `generate`.
        Exception: whatever its forward pass raises when it cannot be recorded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        units: Sequence[Unit],
        max_model_len: int,
        recorder: Recorder,
        compiled: bool = False,
        progress: Callable[[str], object] = lambda step: None,
        wait: Wait = lambda extents: None,
    ) -> None:
        self.model, self.max_model_len, self.device = model, max_model_len, model.device
        if "logits_to_keep" not in signature(model.forward).parameters:
            raise ConfigError(f"expected a forward pass with logits_to_keep in {type(model)}")
        room = longest(model, max_model_len)
        if room <= N_TOKENS:
            raise ConfigError(f"expected positions for more than {N_TOKENS} tokens, got {room}")
        self.cache = KvCache(model.config, room, self.device)
        progress("decoding as transformers does, to compare with")
        references = References(model, _probe_lengths(room, self.cache.longest_window))
        self._prompt = torch.zeros((1, room), dtype=torch.long, device=self.device)
        self._last = torch.zeros(1, dtype=torch.long, device=self.device)
        self._token = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        self._logits: torch.Tensor = self._forward_prompt(1)
        self._manner: Manner = nullcontext
        for function in (lambda: self._prefill(min(room, SHORTEST_PREFILL)), self._decode):
            recorder.ensure_recordable(function)
        self._mailbox = Mailbox(room, self.device)
        # Before anything is recorded: what is wrong as it stands need not be made faster.
        self._prefills: dict[int, Recording] = {
            length: Repeated(lambda length=length: self._prefill(length))
            for length in prefill_lengths(room)
        }
        references.ensure_alike(lambda reference: self._follow(reference, Repeated(self._decode)))
        for length in self._prefills:
            progress(f"recording the prefill of up to {length} tokens")
            self._prefills[length] = recorder.record(
                lambda length=length: self._prefill(length), model, units, wait
            )
        self.mode: Decode = "graph"
        self.way = "plain"
        self._step = self._record_step(recorder, units, compiled, progress, wait, references)
        self._asked = _asked(model)
        self.cache.clear()
        self.kv_cache_bytes = self.cache.n_bytes

    def _record_step(
        self,
        recorder: Recorder,
        units: Sequence[Unit],
        compiled: bool,
        progress: Callable[[str], object],
        wait: Wait,
        references: References,
    ) -> Recording:
        whole: Extents = ((0, max(unit.end_byte for unit in units)),)

        def record() -> Recording:
            step = recorder.record(self._decode, self.model, (), wait, whole)
            references.ensure_alike(lambda reference: self._follow(reference, step))
            return step

        ways = faster_ways(self.model, units, self.cache) if compiled else ()
        for way, make in ways:
            progress(f"making a faster decode step: {way}")
            try:
                self._manner = make()
                step = record()
                self.mode, self.way = "compiled", way
                return step
            except Exception as error:  # of any kind: it comes from the architecture's own code
                note_refusal(self.model, way, error)
                self._manner = nullcontext
        progress("recording the decode step")
        return record()

    def _follow(self, reference: Reference, step: Recording) -> Followed:
        """Continue the prompt of a reference with its tokens, one step after the other."""
        rows, tokens = [], []
        with torch.no_grad():
            self._load_prompt(reference.prompt_ids)
            self._prefills[self._prefill_length(len(reference.prompt_ids))].replay()
            for token in reference.token_ids:
                rows.append(self._logits[0].clone())
                tokens.append(int(self._token))
                if len(rows) < len(reference.token_ids):
                    self._token.fill_(token)
                    step.replay()
        return Followed(torch.stack(rows), tuple(tokens))

    def close(self) -> None:
        """Release the recordings and the cache; twice is harmless."""
        self._prefills.clear()
        for held in ("_step", "_manner", "cache"):
            vars(self).pop(held, None)

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
        sampling: Draws | None = None,
        proceed: Proceed | None = None,
        on_token: OnToken | None = None,
    ) -> Tokens:
        """Continue a prompt whose ids and length have been checked.

        The host submits a step before it looks at the token of the step before, so that the device
        never waits for it; a token computed after the end of the sequence is dropped.

        Args:
            prompt_ids: token ids of one prompt.
            max_new_tokens: upper limit of new tokens; with `ignore_eos` exactly as many.
            ignore_eos: do not stop at the end-of-sequence token.
            sampling: how to choose tokens; default is the most likely one.
            proceed: called once each token is submitted; what it raises ends the generation.
            on_token: called with each new token; the sequence ends with one for which it says True.
        """
        begin_s = time.perf_counter()
        self._ensure_asked_the_same()
        ends = frozenset() if ignore_eos else eos_ids(self.model)
        sampler = None if sampling is None or sampling.greedy else Sampler(sampling, self.device)
        tokens: list[int] = []
        first_s, ended = 0.0, False
        with torch.no_grad():
            self._load_prompt(prompt_ids)
            for n_submitted in range(1, max_new_tokens + 1):
                if n_submitted == 1:
                    self._prefills[self._prefill_length(len(prompt_ids))].replay()
                else:
                    self._step.replay()
                if proceed:
                    proceed()
                if sampler:
                    self._token.copy_(sampler.draw(self._logits))
                self._mailbox.send(n_submitted - 1, self._token)
                if n_submitted > 1:
                    tokens.append(self._mailbox.receive(n_submitted - 2))
                    first_s = first_s or time.perf_counter() - begin_s
                    if ended := ends_with(tokens[-1], ends, on_token):
                        break
            else:
                tokens.append(self._mailbox.receive(max_new_tokens - 1))
                ended = ends_with(tokens[-1], ends, on_token)
        last_s = time.perf_counter() - begin_s
        return Tokens(tuple(tokens), first_s or last_s, last_s, ended)

    def check_length(self, n_prompt: int, max_new_tokens: int) -> None:
        """Check that a prompt and its continuation fit.

        Raises:
            ConfigError: together they exceed the model's positions or `max_model_len`.
        """
        check_positions(self.model, n_prompt, max_new_tokens)
        if n_prompt + max_new_tokens > self.max_model_len:
            raise ConfigError(
                f"expected at most {self.max_model_len} tokens, prompt and continuation together, "
                f"got {n_prompt} + {max_new_tokens}: shorten one, or raise max_model_len"
            )

    def _ensure_asked_the_same(self) -> None:
        """Refuse a generation_config that somebody has changed: what a step can do was looked at
        when it was made.
        """
        if self._asked != _asked(self.model):
            raise ConfigError(
                f"expected the generation_config with which a {self.model.config.model_type} was "
                "added, got another: choose how to decode with it, by set_decode"
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


def prefill_lengths(max_model_len: int) -> list[int]:
    """Lengths that prompts are padded to: powers of two, and the longest there can be."""
    lengths, length = [], SHORTEST_PREFILL
    while length < max_model_len:
        lengths.append(length)
        length *= 2
    return [*lengths, max_model_len]


def _probe_lengths(room: int, longest_window: int) -> list[int]:
    """Lengths of prompts to compare: one that is not padded, and one beyond every window."""
    lengths = [min(room, max(LONG_PROBE, longest_window + 2 * N_TOKENS)) - N_TOKENS]
    if lengths[0] > SHORTEST_PREFILL:
        lengths.append(SHORTEST_PREFILL)
    return lengths


def _asked(model: PreTrainedModel) -> dict[str, Any]:
    """What a generation_config asks for, but for the ends of a sequence: they are looked up."""
    return {k: v for k, v in vars(model.generation_config).items() if k != "eos_token_id"}
