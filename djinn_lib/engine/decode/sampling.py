"""How a prompt is continued: which token comes next, and where the continuation ends."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

import torch
from torch.overrides import TorchFunctionMode
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from djinn_lib.arguments import flag, real_number, whole_number
from djinn_lib.errors import ConfigError, did_you_mean, shown

GREEDY_BELOW = 1e-5  # as in vLLM: logits divided by less than that overflow
_HOTTEST = 10**6  # by then every token is as likely as any other, in float32
MOST_TOKENS = 2**31 - 1  # to ask for, or to choose from
DEFAULT_NEW_TOKENS = 50
_MOST_SEED = 2**64 - 1  # what torch's generators take


class SamplingOptions(TypedDict, total=False):
    """Fields of `Sampling` as keywords; `max_new_tokens` and `ignore_eos` are parameters."""

    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    stop: str | Sequence[str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """How each token is chosen; see `Sampling`, which adds where a continuation ends."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checked: dict[str, object] = {
            "temperature": real_number(self.temperature, "temperature", 0, _HOTTEST),
            "top_k": whole_number(self.top_k, "top_k", 0, MOST_TOKENS),
            "top_p": real_number(self.top_p, "top_p", 0, 1),
        }
        if not checked["top_p"]:
            raise ConfigError(f"expected top_p above 0 and at most 1, got {shown(self.top_p)}")
        if self.seed is not None:
            checked["seed"] = whole_number(self.seed, "seed", 0, _MOST_SEED)
        _set(self, checked)

    @property
    def greedy(self) -> bool:
        """Whether nothing is random."""
        return self.temperature < GREEDY_BELOW

    def next_seed(self) -> int:
        """The seed of one generation: the one given, or another each time."""
        return secrets.randbits(64) if self.seed is None else self.seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling(Draws):
    """How to continue a prompt; names and meanings are vLLM's, but for `max_new_tokens`.

    Numbers may be numpy's, and a temperature or top_p may be a whole number.

    Args:
        max_new_tokens: upper limit of new tokens.
        ignore_eos: do not stop at the end-of-sequence token, as benchmarks do.
        temperature: 0, or less than 0.00001, takes the most likely token; 1 samples from the
            model's distribution.
        top_k: sample from the k most likely tokens only; 0 means all.
        top_p: sample from the most likely tokens that together reach this probability.
        seed: the same seed gives the same tokens in the same mode on the same machine; None draws
            anew each time.
        stop: a text, or several, that ends the continuation where it appears. It is not part of
            the text. Needs a tokenizer.

    Raises:
        ConfigError: a value has no meaning.
    """

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    ignore_eos: bool = False
    stop: str | Sequence[str] | None = ()

    def __post_init__(self) -> None:
        Draws.__post_init__(self)  # not super(): with slots the class is made twice
        checked = {
            "max_new_tokens": whole_number(self.max_new_tokens, "max_new_tokens", 1, MOST_TOKENS),
            "ignore_eos": flag(self.ignore_eos, "ignore_eos"),
            "stop": _stop_texts(self.stop),
        }
        _set(self, checked)

    @classmethod
    def of(
        cls,
        sampling: Sampling | None,
        max_new_tokens: int | None,
        ignore_eos: bool | None,
        options: SamplingOptions,
    ) -> Sampling:
        """Return what a request asks for: a `Sampling`, in which single fields are overridden.

        Args:
            sampling: default is `Sampling()`.
            max_new_tokens, ignore_eos: None keeps those of `sampling`.
            options: other fields.

        Raises:
            ConfigError: a keyword is none of the fields, or a value has no meaning.
        """
        if not isinstance(sampling, Sampling | None):
            raise ConfigError(
                f"expected sampling to be a dj.Sampling, got {shown(sampling)}: pass "
                "sampling=dj.Sampling(...), or its fields as keywords"
            )
        if isinstance(max_new_tokens, Sampling):
            raise ConfigError(
                "expected max_new_tokens to be a whole number, got a Sampling: pass it by its "
                "name, sampling=..."
            )
        known = [field.name for field in fields(cls)]
        if unknown := sorted(options.keys() - known):
            raise ConfigError(
                f"expected sampling options out of {sorted(known)}, got {shown(unknown[0])}: "
                f"{did_you_mean(unknown[0], known, 'check the name')}"
            )
        changes: dict[str, Any] = dict(options)
        if max_new_tokens is not None:
            changes["max_new_tokens"] = max_new_tokens
        if ignore_eos is not None:
            changes["ignore_eos"] = ignore_eos
        return replace(sampling or cls(), **changes)

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end a continuation."""
        return _stop_texts(self.stop)


def _set(frozen: object, values: Mapping[str, object]) -> None:
    """Replace fields of a frozen object that is being made by their checked values."""
    for name, value in values.items():
        object.__setattr__(frozen, name, value)


def _stop_texts(stop: object) -> tuple[str, ...]:
    texts = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, list | tuple):
        raise ConfigError(f"expected stop to be a text or a list of texts, got {shown(stop)}")
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ConfigError(
                f"expected stop to hold texts of at least one character, got {shown(text)}: leave "
                "it out"
            )
    return tuple(texts)


class Sampler:
    """Draws tokens on the device; the host never waits for one."""

    def __init__(self, sampling: Draws, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(sampling.next_seed())
        self._warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
        if sampling.top_k:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """Return one token id for `logits`: (1, vocabulary) gives (1, 1).

        The greatest of p / Exp(1) is distributed as p (the Gumbel-max trick), and needs none of
        the checks for which `torch.multinomial` would wait for the device.
        """
        scores = self._warpers(torch.empty(0), logits.float())  # type: ignore[arg-type]
        return self.choose(scores.softmax(-1), 1)

    def choose(self, probabilities: torch.Tensor, n: int) -> torch.Tensor:
        """Return `n` different ids a row, for probabilities (rows, ids); they need no sum of 1."""
        noise = torch.empty_like(probabilities).exponential_(generator=self._generator)
        return (probabilities / noise).topk(n).indices


class DrawNext(LogitsProcessor):
    """As the last processor of a greedy `generate`: leaves only the token that a sampler draws."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Called with the sequence so far, and logits of shape (1, vocabulary)."""
        drawn = self._sampler.draw(scores)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


class OwnDraws(TorchFunctionMode):
    """Draws with a sampler what `torch.multinomial` is asked for, in the calling thread only.

    For what transformers draws itself (several beams at once, say): it would draw from the global
    generator, which other threads use too.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.multinomial:
            given = dict(zip(("input", "num_samples"), args, strict=False)) | (kwargs or {})
            return self._sampler.choose(given["input"], given["num_samples"])
        return func(*args, **(kwargs or {}))
