"""Decode from recordings: prefills of a few lengths, and one step per token.

transformers' own forward pass is recorded over tensors that keep their addresses: a prompt padded
to one of a few lengths, a `KvCache`, the next token and its logits. The prefill is recorded in
pieces, so that early layers compute while later ones still load. The step is a single recording,
compiled or not. Both are recorded once per model, at set-up, and stay valid for any frames.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from inspect import signature
from typing import Any

import torch
from transformers import PreTrainedModel

from djinn_lib.engine.decode.compiled import StepContext, faster_ways, note_refusal
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
LONG_PROBE = 128  # tokens of the longer probe, unless a window is longer


class RecordedDecoder:
    """Replays recordings of one model; its weights are resident when they are made.

    Args:
        model: in evaluation mode, bound to its addresses.
        units: of the model, in the order of execution.
        max_model_len: maximum tokens of a prompt and its continuation together; the cache is no
            larger than the model's positions.
        recorder: makes the recordings.
        compiled: replace transformers' code in the step by faster code before recording it.
        progress: called with the name of each stage when it starts.
        wait: called before a recorded piece runs, with the bytes of weights that it needs.

    Raises:
        ConfigError: the architecture cannot run on a `KvCache`.
        DjinnError: it can, but its logits differ from those of transformers' `generate`.
        Exception: an error of its forward pass that prevents recording.
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
            raise ConfigError(f"the forward pass of {type(model)} has no logits_to_keep")
        room = longest(model, max_model_len)
        if room <= N_TOKENS:
            raise ConfigError(f"expected positions for more than {N_TOKENS} tokens, got {room}")
        self.cache = KvCache(model.config, room, self.device)
        progress("decoding with transformers, as a reference")
        references = References(model, _probe_lengths(room, self.cache.longest_window))
        self._prompt = torch.zeros((1, room), dtype=torch.long, device=self.device)
        self._last = torch.zeros(1, dtype=torch.long, device=self.device)
        self._token = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        self._logits: torch.Tensor = self._forward_prompt(1)
        self._step_context: StepContext = nullcontext
        for function in (lambda: self._prefill(min(room, SHORTEST_PREFILL)), self._decode):
            recorder.ensure_recordable(function)
        self._mailbox = Mailbox(room, self.device)
        # Compare before recording: wrong logits would make every recording useless.
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
        self.logits_distance = 0.0
        self._step = self._record_step(recorder, units, compiled, progress, wait, references)
        self._options = _options(model)
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
            self.logits_distance = references.ensure_alike(
                lambda reference: self._follow(reference, step)
            )
            return step

        # Use the first faster step that can be recorded and gives the reference's logits.
        ways = faster_ways(self.model, units, self.cache) if compiled else ()
        for way, make in ways:
            progress(f"making a faster decode step: {way}")
            try:
                self._step_context = make()
                step = record()
                self.mode, self.way = "compiled", way
                return step
            except Exception as error:  # the architecture's own code may raise anything
                note_refusal(self.model, way, error)
                self._step_context = nullcontext
        progress("recording the decode step")
        return record()

    def _follow(self, reference: Reference, step: Recording) -> Followed:
        """Decode a reference's prompt and tokens, and collect the logits of each step."""
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
        """Release the recordings and the cache; closing twice is harmless."""
        self._prefills.clear()
        for held in ("_step", "_step_context", "cache"):
            vars(self).pop(held, None)

    # -- computations to record ------------------------------------------------------------

    def _forward_prompt(self, length: int) -> torch.Tensor:
        """Return logits (1, vocabulary) after the prompt, which is padded to `length`."""
        self.cache.mode(prefilling=True)
        output: Any = self.model(
            input_ids=self._prompt[:, :length],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=self._last,
        )
        return output.logits[:, -1]

    def _prefill(self, length: int) -> None:
        """Process the prompt; set the logits, the most likely token and its position."""
        self._logits.copy_(self._forward_prompt(length))
        self._token.copy_(self._logits.argmax(-1, keepdim=True))
        self.cache.position.copy_(self._last + 1)

    def _decode(self) -> None:
        """Process the token; set the same outputs as `_prefill`."""
        self.cache.mode(prefilling=False)
        with self._step_context():
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

        The host submits a step before it reads the previous step's token, so the device never waits
        for the host. A token computed after the end of the sequence is dropped.

        Args:
            prompt_ids: token ids of one prompt.
            max_new_tokens: upper limit of new tokens; the exact number with `ignore_eos`.
            ignore_eos: do not stop at the end-of-sequence token.
            sampling: how to choose tokens; default is the most likely one.
            proceed: called after each token is submitted; an error in it ends the generation.
            on_token: called with each new token; the sequence ends if it returns True.
        """
        begin_s = time.perf_counter()
        self._ensure_same_options()
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
                # Read one token behind the submissions: the step above runs meanwhile.
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

    def _ensure_same_options(self) -> None:
        """Refuse a changed generation_config, which was only checked at set-up."""
        if self._options != _options(self.model):
            raise ConfigError(
                f"the generation_config of a {self.model.config.model_type} has changed since it "
                "was added: call set_decode to use the new one"
            )

    def _load_prompt(self, prompt_ids: Sequence[int]) -> None:
        """Write the prompt to its buffer; repetitions of its last token pad it."""
        n_padded = self._prefill_length(len(prompt_ids)) - len(prompt_ids)
        padded = torch.tensor([*prompt_ids, *[prompt_ids[-1]] * n_padded])
        self.cache.clear()
        self._prompt[0, : len(padded)].copy_(padded)
        self._last.fill_(len(prompt_ids) - 1)

    def _prefill_length(self, n_prompt: int) -> int:
        return min(length for length in self._prefills if length >= n_prompt)


def prefill_lengths(max_model_len: int) -> list[int]:
    """List the lengths that prompts are padded to: powers of two, and the maximum."""
    lengths, length = [], SHORTEST_PREFILL
    while length < max_model_len:
        lengths.append(length)
        length *= 2
    return [*lengths, max_model_len]


def _probe_lengths(room: int, longest_window: int) -> list[int]:
    """List prompt lengths to compare: beyond every window, and without padding."""
    lengths = [min(room, max(LONG_PROBE, longest_window + 2 * N_TOKENS)) - N_TOKENS]
    if lengths[0] > SHORTEST_PREFILL:
        lengths.append(SHORTEST_PREFILL)
    return lengths


def _options(model: PreTrainedModel) -> dict[str, Any]:
    """Return a generation_config's options but eos_token_id (read per request)."""
    return {k: v for k, v in vars(model.generation_config).items() if k != "eos_token_id"}
