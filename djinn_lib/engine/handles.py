"""One model of a `Djinn`, as `add` returns it: the same methods without the name."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Unpack, cast

from transformers import PreTrainedModel

from djinn_lib.engine.decode.modes import Decode
from djinn_lib.engine.decode.sampling import Sampling, SamplingOptions
from djinn_lib.engine.pictures import ModelState, picture
from djinn_lib.engine.prompts import Messages, Prompt
from djinn_lib.engine.serving.generation import Generation
from djinn_lib.engine.serving.named import ByName, NamedModel
from djinn_lib.engine.serving.requests import Requests
from djinn_lib.engine.serving.served_model import ServedModel
from djinn_lib.errors import ConfigError, DjinnError
from djinn_lib.units import format_bytes

if TYPE_CHECKING:
    from djinn_lib.engine.djinn import Djinn


class Model(NamedModel):
    """A model of a `Djinn`.

    After the model was removed every method raises `ConfigError`, even if another model has its
    name by then.
    """

    def __init__(self, djinn: Djinn, served: ServedModel) -> None:
        self._owner, self._served = djinn, served

    def _ensure_present(self) -> Djinn:
        if self._served.removed:
            raise self._removed()
        return self._owner

    @property
    def name(self) -> str:
        """The name of the model in requests."""
        return self._served.name

    @property
    def n_bytes(self) -> int:
        """Bytes that it takes on the device when all of it is resident."""
        return self._served.n_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of it that are on the device now."""
        resident_bytes = self._ensure_present().stats().resident_bytes
        if self.name not in resident_bytes:  # it is being removed
            raise self._removed()
        return resident_bytes[self.name]

    @property
    def residency(self) -> float:
        """The share of its bytes that is on the device now, from 0 to 1."""
        return self.resident_bytes / self.n_bytes

    @property
    def decode_mode(self) -> Decode:
        """How it decodes."""
        return self._served.decoder.mode

    # -- requests of asyncio, and tokens ---------------------------------------------------------

    async def agenerate(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int | None = None,
        ignore_eos: bool | None = None,
        *,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation | Any:
        """`generate` for asyncio; see `Djinn.agenerate`."""
        return await self._ensure_present().agenerate(
            self.name, prompt, max_new_tokens, ignore_eos, sampling=sampling, **options
        )

    def astream(
        self,
        prompt: Prompt | Messages,
        max_new_tokens: int | None = None,
        ignore_eos: bool | None = None,
        *,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncIterator[Any]:
        """`stream` for asyncio; see `Djinn.astream`."""
        return self._ensure_present().astream(
            self.name, prompt, max_new_tokens, ignore_eos, sampling=sampling, **options
        )

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of `text`; see `Djinn.tokenize`."""
        return self._ensure_present().tokenize(self.name, text)

    # -- its pages -------------------------------------------------------------------------------

    def lease(self, *, wait: bool = True) -> AbstractContextManager[PreTrainedModel]:
        """Lend the transformers model; see `Djinn.lease`."""
        return self._ensure_present().lease(self.name, wait=wait)

    def evict(self) -> int:
        """Take all its pages off the device; returns how many bytes that freed."""
        return self._ensure_present().evict(self.name)

    # -- in a notebook ---------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Model) and self._served is other._served

    def __hash__(self) -> int:
        return id(self._served)

    def __repr__(self) -> str:
        try:
            residency = self.residency
        except ConfigError:
            return f"Model({self.name!r}, removed)"
        except DjinnError:
            closed = "closed" if self._owner.closed else "of another process"
            return f"Model({self.name!r}, {closed})"
        return (
            f"Model({self.name!r}, {format_bytes(self.n_bytes)}, {residency:.0%} resident, "
            f"decode={self.decode_mode!r})"
        )

    def _repr_html_(self) -> str | None:
        """Draw how much of it is resident."""
        try:
            return picture([ModelState(self.name, self.n_bytes, self.resident_bytes)])
        except DjinnError:
            return None


class ModelsByName(Requests, ByName):
    """The models of a `Djinn` by name, as handles."""

    @property
    def _names(self) -> list[str]:
        return [model.name for model in self._models]

    def __getitem__(self, name: str) -> Model:
        """Return a model by name.

        Raises:
            ConfigError: there is no such model.
        """
        return Model(cast("Djinn", self), self._models[name])
