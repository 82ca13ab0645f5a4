"""What models of a `Djinn` and of a `Fleet` have in common for their users.

A handle (`NamedModel`) has the methods of its owner without the name. `ByName` makes the owner look
like a mapping of names to handles.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol, Unpack

from djinn_lib.engine.decode.sampling import Sampling, SamplingOptions
from djinn_lib.engine.prompts import Messages, Prompt
from djinn_lib.engine.serving.generation import Generation
from djinn_lib.engine.serving.stream import Stream
from djinn_lib.errors import ConfigError


class _Owner(Protocol):
    """An object that serves requests to models by name."""

    def generate(self, name: str, *args: Any, **kwargs: Any) -> Any: ...
    def chat(self, name: str, *args: Any, **kwargs: Any) -> Generation: ...
    def stream(self, name: str, *args: Any, **kwargs: Any) -> Stream[Any]: ...
    def submit(self, name: str, *args: Any, **kwargs: Any) -> Any: ...
    def remove(self, name: str) -> None: ...


class NamedModel(ABC):
    """A handle of one model.

    After the model was removed every method raises `ConfigError`, even if another model has its
    name by then.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the model in requests."""

    @abstractmethod
    def _ensure_present(self) -> _Owner:
        """Return the owner; raise `ConfigError` if the model was removed."""

    def _removed(self) -> ConfigError:
        return ConfigError(
            f"the model {self.name!r} of this handle was removed: add it again, and use what "
            "add returns"
        )

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int | None = None,
        ignore_eos: bool | None = None,
        *,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation | Any:
        """Continue a prompt, or each of a list of them; see `generate` of the owner."""
        return self._ensure_present().generate(
            self.name, prompt, max_new_tokens, ignore_eos, sampling=sampling, **options
        )

    def chat(
        self,
        messages: Messages,
        max_new_tokens: int | None = None,
        ignore_eos: bool | None = None,
        *,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation:
        """Answer a conversation; see `chat` of the owner."""
        return self._ensure_present().chat(
            self.name, messages, max_new_tokens, ignore_eos, sampling=sampling, **options
        )

    def stream(
        self,
        prompt: Prompt | Messages,
        max_new_tokens: int | None = None,
        ignore_eos: bool | None = None,
        *,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Stream[Any]:
        """Yield a continuation while it is decoded; see `stream` of the owner."""
        return self._ensure_present().stream(
            self.name, prompt, max_new_tokens, ignore_eos, sampling=sampling, **options
        )

    def submit(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int | None = None,
        ignore_eos: bool | None = None,
        *,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Any:
        """Queue what `generate` does, and return a future at once; see `submit` of the owner."""
        return self._ensure_present().submit(
            self.name, prompt, max_new_tokens, ignore_eos, sampling=sampling, **options
        )

    def remove(self) -> None:
        """Remove the model and free everything that it holds; see `remove` of the owner."""
        self._ensure_present().remove(self.name)


class ByName(ABC):
    """A collection of models, which are found by name."""

    @property
    @abstractmethod
    def _names(self) -> Collection[str]:
        """The names of the models, in order of addition."""

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._names

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the models."""
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __bool__(self) -> bool:
        return True  # even without models

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)  # what a notebook offers after `djinn["`
