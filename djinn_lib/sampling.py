"""Choosing the next token: the most likely one, or a random one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from djinn_lib.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose; the names and their meaning are vLLM's.

    Args:
        temperature: 0 takes the most likely token; 1 samples from the model's distribution.
        top_k: sample from the k most likely tokens only; 0 means all.
        top_p: sample from the most likely tokens that together reach this probability.
        seed: the same seed gives the same tokens in the same mode on the same machine.

    Raises:
        ConfigError: a value has no meaning.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"expected a temperature of at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ConfigError(f"expected top_k of at least 0 (0 means all), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"expected top_p above 0 and at most 1, got {self.top_p}")

    @property
    def greedy(self) -> bool:
        """Whether nothing is random."""
        return self.temperature == 0


class Sampler:
    """Draws tokens on the device; the host never waits for one."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(sampling.seed)
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
        noise = torch.empty_like(scores).exponential_(generator=self._generator)
        return (scores.softmax(-1) / noise).argmax(-1, keepdim=True)
