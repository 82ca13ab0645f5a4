"""What a request says so far: tokens become pieces of text, up to the first stop text.

A character may take several tokens, and how a token reads may depend on the one before it. So the
tokens since the last piece but one are decoded together, and a piece is what they say beyond the
piece before. Text that may still change, or may begin a stop text, is held back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from djinn_lib.engine.models.tokenizer import Tokenizer

Piece = str | int  # text, or the token ids of a model without a tokenizer
_UNFINISHED = "\ufffd"  # what bytes decode to that are no character yet


class Transcript:
    """Reads the tokens of one request as they come.

    Args:
        tokenizer: of the model; without one, pieces are token ids.
        stops: texts that end the continuation, which needs a tokenizer.
        deliver: called with each piece.

    Attributes:
        stopped: whether a stop text has appeared.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stops: Sequence[str] = (),
        deliver: Callable[[Piece], None] = lambda piece: None,
    ) -> None:
        self._tokenizer, self._stops, self._deliver = tokenizer, tuple(stops), deliver
        self.stopped = False
        self._given: list[str] = []
        self._held = ""  # the end of what is known, which may begin a stop text
        self._ids: list[int] = []  # since the piece before the last one
        self._n_read = 0  # how many of them the pieces cover
        self._n_characters = 0  # how many characters of what they say are known

    @property
    def text(self) -> str:
        """What has been delivered."""
        return "".join(self._given)

    def add(self, token_id: int) -> bool:
        """Take a new token; returns whether a stop text is complete."""
        if self._tokenizer is None:
            self._deliver(token_id)
            return False
        self._ids.append(token_id)
        said = self._decode(self._ids)
        sure = said.rstrip(_UNFINISHED)
        new, self._n_characters = (
            sure[self._n_characters :],
            max(self._n_characters, len(sure)),
        )
        if new and sure == said:  # the tokens before this piece are not needed any more
            self._ids, self._n_read = self._ids[self._n_read :], len(self._ids) - self._n_read
            self._n_characters = len(self._decode(self._ids))
        return self._take(new)

    def finish(self) -> None:
        """Deliver what was held back; no more tokens come."""
        if self._tokenizer is None or self.stopped:
            return
        if not self._take(self._decode(self._ids)[self._n_characters :]):
            self._give(self._held)
        self._ids, self._held = [], ""

    def _decode(self, token_ids: Sequence[int]) -> str:
        said = self._tokenizer.decode(token_ids) if self._tokenizer else None
        return said or ""

    def _take(self, new: str) -> bool:
        """Deliver new text but for what may begin a stop text, and nothing from one on."""
        text = self._held + new
        ends = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            self._give(text[: min(ends)])
            return True
        n_sure = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[n_sure:]
        self._give(text[:n_sure])
        return False

    def _give(self, text: str) -> None:
        if text:
            self._given.append(text)
            self._deliver(text)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may begin a stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
