"""Read and check profiles, which say what an experiment runs (``params/<name>.yml``)."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from djinn_lib.errors import ConfigError
from djinn_lib.experiment.paper_form import load_trace
from djinn_lib.experiment.parameters import label
from djinn_lib.paths import REPO, user_path
from djinn_lib.systems import SYSTEMS
from djinn_lib.trace import Trace, check_models, paper_trace, renamed, zipf_trace
from djinn_lib.units import parse_bytes, parse_capacity

# Labels are parts of the names of folders and files, which may have at most 255 characters.
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.]*$", max_length=64)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]

Mode = Literal["sequential", "concurrent"]
Start = Literal["cold", "warm"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelEntry(_Strict):
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


class PaperTrace(_Strict):
    """The paper's trace, over the three models of the profile."""

    kind: Literal["paper"]


class ZipfTrace(_Strict):
    """A trace that is drawn by Zipf's law; see `zipf_trace`. By default it is over all models."""

    kind: Literal["zipf"]
    n: int
    alpha: float
    seed: int
    rate_per_s: float
    models: list[str] | None = Field(default=None, min_length=1)


class FileTrace(_Strict):
    """A trace that is read from a file."""

    kind: Literal["file"]
    path: str


TraceEntry = Annotated[PaperTrace | ZipfTrace | FileTrace, Field(discriminator="kind")]


class SystemEntry(_Strict):
    """A labelled system: its name and its options."""

    system: str
    options: dict[str, Any] = {}


class CellsEntry(_Strict):
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


class LargeEntry(_Strict):
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


def cell_id(trace: str, capacity_label: str, system: str, mode: str, start: str = "cold") -> str:
    """Return the name of a cell, which is the stem of its files."""
    usual = {"sequential", "cold"}
    return "-".join([trace, capacity_label, system, *(x for x in (mode, start) if x not in usual)])


class Cell(_Strict):
    """One system on one trace at one capacity."""

    trace: str
    capacity_label: str
    system: str
    repeats: int
    mode: Mode = "sequential"
    speed: float = 1.0
    start: Start = "cold"
    requests: int | None = None

    @property
    def id(self) -> str:
        """Name of the cell, and the stem of its files."""
        return cell_id(self.trace, self.capacity_label, self.system, self.mode, self.start)


class Profile(_Strict):
    """A whole experiment. See the comments in ``params/cpu.yml`` for each field."""

    name: Name
    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "float16", "bfloat16"]
    page: str
    prompt_tokens: int = Field(ge=1)
    new_tokens: int = Field(ge=1)
    repeats: int = Field(ge=1)
    models: dict[Name, ModelEntry] = Field(min_length=1)
    capacities: dict[Label, str] = Field(min_length=1)
    traces: dict[Label, TraceEntry] = Field(min_length=1)
    systems: dict[Label, SystemEntry] = Field(min_length=1)
    cells: list[CellsEntry] = Field(min_length=1)
    large: dict[Name, LargeEntry] = {}
    _given: str | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _names_exist(self) -> Profile:
        for name, entry in self.systems.items():
            _ensure_known(f"system of {name!r}", [entry.system], SYSTEMS)
        for entry in self.traces.values():
            if entry.kind == "zipf":
                _ensure_known("model of a trace", entry.models or [], self.models)
        for entry in self.cells:
            _ensure_known("trace", entry.traces, self.traces)
            _ensure_known("capacity", entry.capacities, self.capacities)
            _ensure_known("system", entry.systems, self.systems)
        for entry in self.large.values():
            if entry.model:
                _ensure_known("model of large", [entry.model], self.models)
        parse_bytes(self.page)
        large = [entry.capacity for entry in self.large.values()]
        for text in [*self.capacities.values(), *large]:
            parse_capacity(text, total_bytes=1 << 40)
        return self

    @property
    def given(self) -> str:
        """The argument of `load_profile` for this profile: a name or the path of a file."""
        return self._given or self.name

    def all_cells(self) -> list[Cell]:
        """Every cell once, in the order of the profile."""
        cells: dict[str, Cell] = {}
        for entry in self.cells:
            alike = {"repeats": entry.repeats or self.repeats, "mode": entry.mode,
                     "speed": entry.speed, "start": entry.start,
                     "requests": entry.requests}  # fmt: skip
            for trace, size, system in product(entry.traces, entry.capacities, entry.systems):
                cell = Cell(trace=trace, capacity_label=size, system=system, **alike)
                cells.setdefault(cell.id, cell)
        return list(cells.values())

    def cell(
        self,
        trace: str,
        capacity_label: str | float,
        system: str,
        mode: str = "sequential",
        start: str = "cold",
    ) -> Cell:
        """Return a cell by its names, whether or not the profile lists it.

        A label of digits may be a number, because papermill's ``-p`` converts it. A cell that is
        not listed has the speed of the first listed cell with its mode.

        Raises:
            ConfigError: one of the names is unknown.
        """
        capacity_label = label(capacity_label)
        try:
            _ensure_known("trace", [trace], self.traces)
            _ensure_known("capacity", [capacity_label], self.capacities)
            _ensure_known("system", [system], self.systems)
            _ensure_known("mode", [mode], get_args(Mode))
            _ensure_known("start", [start], get_args(Start))
        except ValueError as error:
            raise ConfigError(f"profile {self.name!r}: {error}") from error
        listed = {cell.id: cell for cell in self.all_cells()}
        speed = next((cell.speed for cell in listed.values() if cell.mode == mode), 1.0)
        names = {"trace": trace, "capacity_label": capacity_label, "system": system, "mode": mode,
                 "start": start}  # fmt: skip
        cell = Cell.model_validate({**names, "repeats": self.repeats, "speed": speed})
        return listed.get(cell.id, cell)

    def make_trace(self, name: str) -> Trace:
        """Generate a trace over the profile's models.

        Raises:
            TraceError: the trace does not fit the profile's models, or cannot be read.
        """
        entry, models = self.traces[name], tuple(self.models)
        if entry.kind == "paper":
            return paper_trace(models=models)
        if entry.kind == "zipf":
            fields = entry.model_dump(exclude={"kind", "models"})
            return zipf_trace(models=entry.models or models, **fields)
        stand_ins = {model.stands_for: name for name, model in self.models.items()}
        trace = renamed(load_trace(user_path(entry.path)), stand_ins, keep=self.models)
        check_models(trace, self.models)
        return trace


def _ensure_known(what: str, names: list[str], known: Any) -> None:
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"expected a {what} out of {list(known)}, got {unknown[0]!r}")


def load_profile(given: str, folder: Path = REPO / "params") -> Profile:
    """Read and check a profile: a name, for ``<folder>/<name>.yml``, or the path of a ``.yml``
    file.

    Raises:
        ConfigError: there is no such profile, or a field is invalid; the message names it.
    """
    if given.endswith(".yml"):
        path = user_path(given).resolve()
        if not path.is_file():
            raise ConfigError(f"the profile {given!r} does not exist: check the path")
    else:
        known = sorted(path.stem for path in folder.glob("*.yml"))
        if given not in known:
            raise ConfigError(
                f"there is no profile {given!r}: choose one of {known} (files in {folder}), or "
                "give the path of a .yml file"
            )
        path = folder / f"{given}.yml"
    try:
        profile = Profile.model_validate({**yaml.safe_load(path.read_text()), "name": path.stem})
    except (ValidationError, yaml.YAMLError, TypeError, OSError) as error:
        raise ConfigError(f"{path} cannot be used:\n{error}") from error
    profile._given = str(path) if given.endswith(".yml") else None
    return profile
