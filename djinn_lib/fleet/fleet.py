"""`Fleet`: several models behind one ring, each in a vLLM engine of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from djinn_lib import nvml
from djinn_lib.engine.device import DEFAULT_PAGE_BYTES, parse_device
from djinn_lib.engine.memory.opening import MastersForm, choose_masters
from djinn_lib.engine.serving.named import ByName
from djinn_lib.errors import ConfigError, DjinnError, unknown_model
from djinn_lib.fleet.engines import EngineClient
from djinn_lib.fleet.environment import vllm_python
from djinn_lib.fleet.handles import FleetModel
from djinn_lib.fleet.live import drawn_again
from djinn_lib.fleet.options import engine_environment, engine_options
from djinn_lib.fleet.requests import Requests
from djinn_lib.fleet.ring_process import RingProcess
from djinn_lib.fleet.starting import StartingRoom, need_bytes
from djinn_lib.fleet.status import RingStatus
from djinn_lib.sockets import socket_folder
from djinn_lib.units import parse_bytes

if TYPE_CHECKING:
    import pandas as pd

_LONGEST_SOCKET = "/djinn-12345678/12345678-1234-1234-1234-123456789012"


class Fleet(Requests, ByName):
    """Serves models with vLLM that together are larger than the device memory given to them.

    Every model gets a vLLM engine in its own process, which batches requests. The weights of all
    models share one ring. The processes end when this object is closed or this process ends.

    Args:
        capacity: device memory for weights, in bytes or as text ("25GiB").
        device: "cuda", or "cpu" (Linux); default is a GPU where there is one.
        page: size of a page; default 64 MiB on a GPU, 1 MiB on the CPU.
        policy: name of the eviction policy.
        eviction: "pages" evicts only what is needed; "models" evicts entire models.
        quantum_s: minimum time that an engine computes while others wait.
        max_wait_s: approximate limit of the time that an engine waits.
        masters: "plain", "compressed" or "auto": how engines keep their masters, as for a `Djinn`.
        python: Python of an environment with vLLM; default is DJINN_VLLM_PYTHON, else this Python,
            else the one of `.venv-vllm`.
        progress: called with messages during longer steps.

    Raises:
        ConfigError: a parameter is invalid, or the GPU already has a ring.
        CapacityError: the capacity is below one page or above the free memory.
        PlatformError: vLLM is missing, or the platform cannot share frames of the device.
    """

    def __init__(
        self,
        capacity: int | str,
        device: str | torch.device | None = None,
        page: int | str | None = None,
        policy: str = "lru",
        eviction: str = "pages",
        quantum_s: float = 0.25,
        max_wait_s: float = 1.0,
        python: str | Path | None = None,
        progress: Callable[[str], None] = print,
        masters: MastersForm = "plain",
    ) -> None:
        self.device = parse_device(device)
        self._masters = choose_masters(masters, torch.device("cpu"))  # checks the name only
        self.capacity_bytes = parse_bytes(capacity)
        page_bytes = parse_bytes(page or DEFAULT_PAGE_BYTES[self.device.type])
        self._python, self._progress = vllm_python(python), progress
        self._folder = Path(
            tempfile.mkdtemp(prefix="djinn-", dir=socket_folder(len(_LONGEST_SOCKET)))
        )
        self._engines: dict[str, EngineClient] = {}
        self._lock = threading.Lock()  # of the engines' names
        self._starting = StartingRoom(nvml.free_bytes)
        options = {
            "capacity": f"{self.capacity_bytes}B", "page": f"{page_bytes}B",
            "device": self.device, "policy": policy, "eviction": eviction,
            "quantum": quantum_s, "max-wait": max_wait_s,
        }  # fmt: skip
        try:
            self._ring = RingProcess(self._folder, options)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        self._process = os.getpid()
        self._finalizer = weakref.finalize(
            self, _close, self._process, self._engines, self._ring, self._folder
        )

    @property
    def socket(self) -> Path:
        """Where engines connect to the ring (DJINN_RING)."""
        return self._ring.socket

    # -- models ----------------------------------------------------------------------------

    def add(self, name: str, source: str | Path, **options: Any) -> FleetModel:
        """Start the engine of a model; threads may add several at the same time.

        On a GPU several start side by side as far as its memory allows.

        Args:
            name: name of the model in requests.
            source: a folder with config.json and safetensors, or a hub id.
            options: options of vLLM's engine (`vllm.LLM`), such as max_model_len or dtype.
                `kv_cache_memory_bytes` is not part of the ring; default 2 GiB on a GPU.

        Returns:
            The model, with methods of its own: ``fleet.add("chat", ...).generate("Hi")``.

        Raises:
            ConfigError: the name is taken, or the options cannot be used with a ring.
            CapacityError: the model is larger than the ring.
            EngineDied: vLLM did not start; the message has the end of its log.
        """
        settings = engine_options(name, source, self.device.type, options)
        with self._lock:
            self._ensure_open()
            if name in self._engines or not name:
                raise ConfigError(
                    f"a model {name!r} cannot be added: choose another name, or remove it first"
                )
            self._engines[name] = starting = _Starting()  # type: ignore[assignment]
        try:
            need = need_bytes(source, settings) if self.device.type == "cuda" else 0
            with self._starting.held(need) if need else nullcontext():
                self._progress(f"starting the engine of {name}")
                engine = EngineClient(
                    name,
                    self._python,
                    settings,
                    self._folder / f"engine-{len(self._engines)}-{time.monotonic_ns()}.log",
                    engine_environment(self.socket, self._masters),
                )
        except BaseException as error:
            with self._lock:
                self._engines.pop(name, None)
            if not self.closed or not isinstance(error, Exception):
                raise
            raise _closed() from error  # its folder may be gone already
        with self._lock:
            if self._engines.get(name) is starting:
                self._engines[name] = engine
        if not self.closed:
            return FleetModel(self, engine)
        engine.close()
        raise _closed()

    def remove(self, name: str) -> None:
        """End the engine of a model and free its frames; its unfinished requests fail."""
        engine = self.engine(name)
        with self._lock:
            if self.has(engine):  # else another thread has removed it
                self._engines.pop(name, None)
        engine.close()

    def evict(self, name: str) -> None:
        """Evict all pages of a model, after the current step."""
        self.engine(name).call("ring_sleep")

    def engine(self, name: str) -> EngineClient:
        """Return the engine of a model.

        Raises:
            ConfigError: there is no such model.
        """
        self._ensure_open()
        engine = self._engines.get(name)
        if engine is None or isinstance(engine, _Starting):
            raise ConfigError(
                unknown_model(name, self.models, "add it with fleet.add(name, source)")
            )
        return engine

    def has(self, engine: EngineClient) -> bool:
        """Whether an engine is one of this fleet, and was not removed."""
        return self._engines.get(engine.name) is engine

    @property
    def models(self) -> list[str]:
        """The names of the models that have started."""
        return [n for n, one in list(self._engines.items()) if not isinstance(one, _Starting)]

    @property
    def _names(self) -> list[str]:
        return self.models

    def __getitem__(self, name: str) -> FleetModel:
        """Return a model by name.

        Raises:
            ConfigError: there is no such model.
        """
        return FleetModel(self, self.engine(name))

    # -- state -----------------------------------------------------------------------------

    def status(self) -> RingStatus:
        """Query the state of the ring.

        Raises:
            BrokerGone: its process ended.
        """
        self._ensure_open()
        return self._ring.status()

    def residency(self) -> pd.DataFrame:
        """One row a model: model, bytes, resident_bytes, frames; bytes are whole pages."""
        return self.status().residency()

    def stats(self) -> pd.DataFrame:
        """One row a model: costs of its leases since it was added."""
        return self.status().stats()

    def _repr_html_(self) -> str:
        """Draw the ring, in a notebook."""
        try:
            return self.status().html()
        except DjinnError:
            if self.closed:  # perhaps just now, in another thread
                return "<i>closed</i>"
            raise

    def live(self, every_s: float = 0.2) -> AbstractContextManager[None]:
        """Show the ring in a notebook, and redraw it until the block ends."""
        return drawn_again(self._repr_html_, every_s)

    @property
    def closed(self) -> bool:
        """Whether the fleet was closed."""
        return not self._finalizer.alive

    def _ensure_open(self) -> None:
        if os.getpid() != self._process:
            raise DjinnError(
                f"this fleet belongs to process {self._process}, and this is a forked child of it "
                f"({os.getpid()}): make a fleet of its own here, or ask the parent process"
            )
        if self.closed:
            raise _closed()

    def close(self) -> None:
        """End all engines and the broker; unfinished requests fail. A second call does nothing."""
        self._finalizer()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _closed() -> DjinnError:
    return DjinnError("this fleet was closed: make a new one")


class _Starting:
    """Reserves the name of a model whose engine is starting."""

    def ask_to_end(self) -> None:
        """Do nothing: `add` checks whether the fleet was closed."""

    def close(self) -> None:
        """Do nothing."""


def _close(owner: int, engines: dict[str, Any], ring: RingProcess, folder: Path) -> None:
    """End everything that a fleet started; does nothing in a forked child."""
    if os.getpid() != owner:
        return
    ending = []
    while engines:  # threads may add some meanwhile
        ending.append(engines.popitem()[1])
    for engine in ending:
        engine.ask_to_end()
    for engine in ending:
        engine.close()
    ring.end()
    shutil.rmtree(folder, ignore_errors=True)
