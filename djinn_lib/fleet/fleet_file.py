"""Read `fleet.yml`, which says which models `djinn serve` serves, and with how much memory.

    capacity: 25GiB
    models:
      chat: {model: Qwen/Qwen3-8B, max_model_len: 8192}
      code: {model: some/moe-fp8}

Other options: device, page, policy, eviction, quantum_s, max_wait_s (see `Fleet`), host, port.
The other fields of a model are options of `vllm serve`, with underscores for hyphens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from djinn_lib.errors import ConfigError, first_line, shown
from djinn_lib.fleet.options import ON_ONE_DEVICE
from djinn_lib.validation import in_words_of_yaml

_OURS = ("worker_cls", "served_model_name", "host", "port", "uds", "api_server_count")


@dataclass(frozen=True, slots=True)
class FleetFile:
    """Content of a fleet file; `models` maps names to options, and "model" is the source."""

    capacity: str | int
    models: Mapping[str, Mapping[str, Any]]
    host: str = "127.0.0.1"
    port: int = 8000
    device: str | None = None
    page: str | int | None = None
    policy: str = "lru"
    eviction: str = "pages"
    quantum_s: float = 0.25
    max_wait_s: float = 1.0
    python: str | None = field(default=None)

    def ring_options(self) -> dict[str, Any]:
        """Return the options of `djinn ring`, without the socket."""
        options = {
            "capacity": _as_text(self.capacity), "device": self.device,
            "page": _as_text(self.page),
            "policy": self.policy, "eviction": self.eviction,
            "quantum": self.quantum_s, "max-wait": self.max_wait_s,
        }  # fmt: skip
        return {name: value for name, value in options.items() if value is not None}


def _as_text(size: str | int | None) -> str | int | None:
    return f"{size}B" if isinstance(size, int) else size


def read_fleet_file(path: Path) -> FleetFile:
    """Read and check a fleet file.

    Raises:
        ConfigError: it cannot be read, or a value is invalid.
    """
    if not path.exists():
        raise ConfigError(f"the file {path} does not exist: check the path")
    try:
        said = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} cannot be used: {in_words_of_yaml(error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({first_line(error)}): correct it") from error
    if not isinstance(said, dict):
        raise ConfigError(f"{path} has no options: it needs at least `capacity` and `models`")
    known = [one.name for one in fields(FleetFile)]
    if unknown := [name for name in said if name not in known]:
        raise ConfigError(f"{path} has an unknown option {shown(unknown[0])}: choose from {known}")
    for name in ("capacity", "models"):
        if not said.get(name):
            raise ConfigError(f"{path} has no `{name}`: add it")
    if not isinstance(said["models"], dict):
        raise ConfigError(f"`models` in {path} maps names to options: correct it")
    port = said.get("port", 1)
    if not isinstance(port, int) or isinstance(port, bool) or not 0 < port < 1 << 16:
        raise ConfigError(f"`port` in {path} is {shown(port)}: it is a number from 1 to 65535")
    for name, options in said["models"].items():
        _check_model(path, name, options)
    return FleetFile(**said)


def _check_model(path: Path, name: object, options: object) -> None:
    if not isinstance(name, str) or not isinstance(options, dict) or not options.get("model"):
        raise ConfigError(
            f"the model {shown(name)} in {path} has no `model`: name a folder or a hub id"
        )
    if ours := [one for one in _OURS if one in options]:
        raise ConfigError(f"`{ours[0]}` of {name!r} in {path} is set by djinn: leave it out")
    if split := [one for one in ON_ONE_DEVICE if options.get(one, 1) != 1]:
        raise ConfigError(
            f"`{split[0]}` of {name!r} in {path} is above 1, and a model on the ring runs on one "
            "device: leave it out"
        )


def vllm_arguments(name: str, options: Mapping[str, Any]) -> list[str]:
    """Return the arguments of `vllm serve` for a model; mappings become JSON."""
    arguments = ["serve", str(options["model"]), "--served-model-name", name]
    for option, value in options.items():
        if option == "model" or value is None:
            continue
        flag = f"--{option.replace('_', '-')}"
        match value:
            case True:
                arguments.append(flag)
            case False:
                arguments.append(f"--no-{flag[2:]}")
            case dict():
                arguments += [flag, json.dumps(value)]
            case list():
                arguments += [flag, *map(str, value)]
            case _:
                arguments += [flag, str(value)]
    return arguments
