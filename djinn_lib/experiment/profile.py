"""Read and check profiles, which say what an experiment runs (``params/<name>.yml``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, PrivateAttr, ValidationError, model_validator

from djinn_lib.errors import ConfigError, did_you_mean, shown
from djinn_lib.experiment.paper_form import load_trace
from djinn_lib.experiment.parameters import label
from djinn_lib.experiment.profile_entries import (
    CellsEntry,
    Label,
    LargeEntry,
    Mode,
    ModelEntry,
    Name,
    Start,
    Strict,
    SystemEntry,
    TraceEntry,
)
from djinn_lib.paths import REPO, user_path
from djinn_lib.systems import SYSTEMS
from djinn_lib.trace import Trace, check_models, paper_trace, renamed, zipf_trace
from djinn_lib.units import parse_bytes, parse_capacity
from djinn_lib.validation import in_words_of_validation, in_words_of_yaml, place_in_words


def cell_id(trace: str, capacity_label: str, system: str, mode: str, start: str = "cold") -> str:
    """Return the name of a cell, which is the stem of its files."""
    usual = {"sequential", "cold"}
    return "-".join([trace, capacity_label, system, *(x for x in (mode, start) if x not in usual)])


class Cell(Strict):
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


class Profile(Strict):
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
    large: dict[Name, LargeEntry] = Field(default_factory=dict)
    _given: str | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _names_exist(self) -> Profile:
        if faults := list(self._faults()):
            raise ValueError("\n".join(faults))
        return self

    def _faults(self) -> Iterator[str]:
        """Yield a line for each unknown name and each size that cannot be used."""
        for name, entry in self.systems.items():
            yield from _unknown("system", [entry.system], SYSTEMS, "systems", name, "system")
        for name, entry in self.traces.items():
            if entry.kind == "zipf":
                models = entry.models or []
                yield from _unknown("model", models, self.models, "traces", name, "models")
        for i, entry in enumerate(self.cells):
            yield from _unknown("trace", entry.traces, self.traces, "cells", i, "traces")
            yield from _unknown("capacity", entry.capacities, self.capacities,
                                "cells", i, "capacities")  # fmt: skip
            yield from _unknown("system", entry.systems, self.systems, "cells", i, "systems")
        yield from _refused(parse_bytes, self.page, "page")
        for name, text in self.capacities.items():
            yield from _refused(_ensure_capacity, text, "capacities", name)
        for name, entry in self.large.items():
            models = [entry.model] if entry.model else []
            yield from _unknown("model", models, self.models, "large", name, "model")
            yield from _refused(_ensure_capacity, entry.capacity, "large", name, "capacity")

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
        given = {"trace": (trace, self.traces), "capacity": (capacity_label, self.capacities),
                 "system": (system, self.systems), "mode": (mode, get_args(Mode)),
                 "start": (start, get_args(Start))}  # fmt: skip
        for what, (name, known) in given.items():
            for fault in _unknown(what, [name], known):
                raise ConfigError(f"profile {self.name!r}: {fault}")
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


def _unknown(what: str, names: list[str], known: Any, *place: str | int) -> Iterator[str]:
    """Yield a line for each name that is not known."""
    for name in names:
        if name not in known:
            what_to_do = did_you_mean(name, known, "choose one of them")
            said = f"expected a {what} out of {list(known)}, got {shown(name)}: {what_to_do}"
            yield f"{place_in_words(place)}: {said}" if place else said


def _refused(check: Callable[[str], object], text: str, *place: str) -> Iterator[str]:
    """Yield a line if a check refuses a text."""
    try:
        check(text)
    except ConfigError as error:
        yield f"{place_in_words(place)}: {error}"


def _ensure_capacity(text: str) -> None:
    parse_capacity(text, total_bytes=1 << 40)


def checked(fields: Mapping[str, Any]) -> Profile:
    """Return the profile with these fields.

    Raises:
        ConfigError: fields are invalid; the message has a line for each, with its place.
    """
    try:
        return Profile.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(in_words_of_validation(error, Profile)) from error


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
        profile = checked({**_fields(path), "name": path.stem})
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be used:\n{error}") from error
    profile._given = str(path) if given.endswith(".yml") else None
    return profile


def _fields(path: Path) -> dict[str, Any]:
    """Read the fields of a YAML file."""
    try:
        fields = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"it cannot be read ({error.strerror}): correct that") from error
    except yaml.YAMLError as error:
        raise ConfigError(in_words_of_yaml(error)) from error
    except ValueError as error:  # bytes that are no text, or dates that do not exist
        raise ConfigError(f"it is not YAML ({error}): correct the YAML") from error
    if not isinstance(fields, dict):
        raise ConfigError("it has no fields: begin with a copy of a profile in params/")
    return fields
