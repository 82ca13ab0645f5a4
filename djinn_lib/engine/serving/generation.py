"""What a request gave and cost, and how notebooks show it."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Literal

from djinn_lib.engine.decode.eager import Tokens
from djinn_lib.engine.memory.lease import LeaseStats
from djinn_lib.units import format_bytes

FinishReason = Literal["stop", "length"]
_SHOWN_IDS = 16


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Generation:
    """What one request gave and cost.

    Attributes:
        text: what the new tokens say, up to the first stop text; None without a tokenizer.
        token_ids: all new tokens, those of a stop text and an end-of-sequence token included.
        finish_reason: "stop" at an end-of-sequence token or a stop text, "length" at
            `max_new_tokens`.
        n_prompt_tokens: tokens of the prompt.
        loaded_bytes, evicted_bytes: weights that were moved for this request.
        resident_before_bytes: weights of the model that were on the device already.
        prefetched_bytes: weights that were loaded before the request had its turn.
        queue_ms: from the call to its turn.
        stall_ms: how long the computation waited for weights.
        switch_ms: the part of it before the first token, and the time to evict and map.
        ttft_ms, total_ms: from the call to the first and to the last new token.
        decode_ms: between those two; a model larger than the ring waits for weights here too.
    """

    text: str | None
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    n_prompt_tokens: int
    loaded_bytes: int
    evicted_bytes: int
    resident_before_bytes: int
    prefetched_bytes: int
    queue_ms: float
    stall_ms: float
    switch_ms: float
    ttft_ms: float
    decode_ms: float
    total_ms: float

    @classmethod
    def of(
        cls,
        tokens: Tokens,
        text: str | None,
        ended: bool,
        n_prompt_tokens: int,
        stats: LeaseStats,
        queue_s: float,
        lead_s: float,
    ) -> Generation:
        """Add up a request: `lead_s` seconds, the queue included, passed before its computation."""
        return cls(
            text=text,
            token_ids=tokens.token_ids,
            finish_reason="stop" if ended else "length",
            n_prompt_tokens=n_prompt_tokens,
            loaded_bytes=stats.loaded_bytes,
            evicted_bytes=stats.evicted_bytes,
            resident_before_bytes=stats.resident_before_bytes,
            prefetched_bytes=stats.prefetched_bytes,
            queue_ms=queue_s * 1e3,
            stall_ms=stats.stall_s * 1e3,
            switch_ms=stats.switch_s * 1e3,
            ttft_ms=(lead_s + tokens.first_s) * 1e3,
            decode_ms=(tokens.last_s - tokens.first_s) * 1e3,
            total_ms=(lead_s + tokens.last_s) * 1e3,
        )

    @property
    def n_new_tokens(self) -> int:
        """How many tokens are new."""
        return len(self.token_ids)

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second, from the call to the last of them: queue and loading count."""
        return 1e3 * self.n_new_tokens / self.total_ms if self.total_ms > 0 else 0.0

    def __repr__(self) -> str:
        return f"Generation({self._said()}, {self._costs()})"

    def _repr_html_(self) -> str:
        """Show the text with its own line breaks, and below it what it cost."""
        said = self._said() if self.text is None else self.text
        return (
            f'<div style="white-space:pre-wrap;text-align:left">{escape(said)}</div>'
            f'<div style="opacity:.65;font-size:90%;margin-top:.4em">{escape(self._costs())}</div>'
        )

    def _said(self) -> str:
        if self.text is not None:
            return repr(self.text)
        shown = ", ".join(map(str, self.token_ids[:_SHOWN_IDS]))
        return f"token ids [{shown}{', ...' if self.n_new_tokens > _SHOWN_IDS else ''}]"

    def _costs(self) -> str:
        plural = "" if self.n_new_tokens == 1 else "s"
        return (
            f"{self.n_new_tokens} token{plural} in {self.total_ms / 1e3:.2f} s "
            f"({self.tokens_per_s:.1f} tokens/s), finish_reason={self.finish_reason!r}, "
            f"{format_bytes(self.loaded_bytes)} loaded"
        )
