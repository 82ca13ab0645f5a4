"""The entries of a profile: its models, traces, systems, cells and large models."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from djinn_lib.errors import shown


def _made_of(characters: str) -> AfterValidator:
    """Accept names that fit into the names of files, which may have at most 255 characters."""
    allowed = re.compile(rf"[A-Za-z0-9][A-Za-z0-9{characters}]{{,63}}")

    def checked(name: str) -> str:
        if allowed.fullmatch(name):
            return name
        raise ValueError(
            f"expected a name of 1 to 64 letters, digits and {' '.join(characters)}, the first one "
            f"a letter or digit, got {shown(name)}"
        )

    return AfterValidator(checked)


Label = Annotated[str, _made_of("_.")]
Name = Annotated[str, _made_of("_.-")]

Mode = Literal["sequential", "concurrent"]
Start = Literal["cold", "warm"]


class Strict(BaseModel):
    """Fields that cannot be changed; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelEntry(Strict):
    """A model of a profile: exactly one of `folder`, `hub_id`, `gguf_package`, `config`."""

    stands_for: str
    folder: str | None = None
    hub_id: str | None = None
    revision: str | None = None
    gguf_package: str | None = None
    config: dict[str, Any] | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _one_source(self) -> ModelEntry:
        given = [s for s in (self.folder, self.hub_id, self.gguf_package, self.config) if s]
        if len(given) != 1:
            raise ValueError(
                "expected exactly one of folder, hub_id, gguf_package, config, "
                f"got {len(given)} of them"
            )
        return self


class PaperTrace(Strict):
    """The paper's trace, over the three models of the profile."""

    kind: Literal["paper"]


class ZipfTrace(Strict):
    """A trace that is drawn by Zipf's law; see `zipf_trace`. By default it is over all models."""

    kind: Literal["zipf"]
    n: int
    alpha: float
    seed: int
    rate_per_s: float
    models: list[str] | None = Field(default=None, min_length=1)


class FileTrace(Strict):
    """A trace that is read from a file."""

    kind: Literal["file"]
    path: str


TraceEntry = Annotated[PaperTrace | ZipfTrace | FileTrace, Field(discriminator="kind")]


class SystemEntry(Strict):
    """A labelled system: its name and its options."""

    system: str
    options: dict[str, Any] = {}


class CellsEntry(Strict):
    """Every combination of the listed traces, capacities and systems.

    In `mode` "sequential", a request is sent when the previous one is done. In "concurrent", it is
    sent at its arrival time in the trace, divided by `speed`; infinity sends all at once.

    Each repeat begins with an empty device. With `start` "warm", every model is then requested once
    in the order of the profile, as in the paper's code; these requests are not counted.

    With `requests`, a cell has only that many requests, the first ones of its trace.
    """

    traces: list[str]
    capacities: list[str]
    systems: list[str]
    mode: Mode = "sequential"
    speed: float = Field(default=1.0, gt=0)
    start: Start = "cold"
    repeats: int | None = Field(default=None, ge=1)
    requests: int | None = Field(default=None, ge=1)


class LargeEntry(Strict):
    """A model larger than its ring: one of the profile, or one with its own config."""

    capacity: str
    model: str | None = None
    config: dict[str, Any] | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _one_source(self) -> LargeEntry:
        if (self.model is None) == (self.config is None):
            raise ValueError("expected either model, of the profile, or config")
        return self
