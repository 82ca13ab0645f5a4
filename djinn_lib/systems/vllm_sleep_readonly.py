"""Provide the system `vllm_sleep_readonly`: sleep mode without writing weights back.

It runs the engines of `vllm_sleep` with our worker. Masters stay pinned in host memory. Sleeping
unmaps all pages of a model, and waking copies the whole model from its master. As in sleep mode, an
engine must finish before it sleeps, and a model is resident as a whole or not at all. The KV cache
stays on the device, which favours this system.
"""

from __future__ import annotations

from typing import Any

from djinn_lib.fleet import environment
from djinn_lib.fleet.engines import EngineClient
from djinn_lib.fleet.fleet import Fleet
from djinn_lib.systems.base import ModelFiles
from djinn_lib.systems.vllm_recreate import engine_options
from djinn_lib.systems.vllm_sleep import VllmSleep

_FOR_EVER_S = 1e6  # no lease is revoked: engines sleep only on command


class VllmSleepReadonly(VllmSleep):
    """Put engines to sleep and wake them as `VllmSleep` does.

    Options:
        page: size of a page, e.g. "1MiB". All others: see `VllmSleep`, but for `core_process`.
    """

    option_names = VllmSleep.option_names - {"core_process"} | {"page"}
    writes_back = False

    @classmethod
    def unavailable(cls, device: str) -> str | None:
        """Return the reason if vLLM is not installed here."""
        return environment.unavailable()

    def _prepare(self) -> None:
        page: Any = self.options.get("page")
        self._fleet = Fleet(
            # Each model may end within a page, while `SleepOrder` counts bytes: add room for that.
            self.capacity_bytes + len(self.models) * 2 * _page_bytes(page, self.device.type),
            self.device,
            page,
            eviction="models",
            quantum_s=_FOR_EVER_S,
            max_wait_s=_FOR_EVER_S,
            progress=lambda step: None,
        )

    def _start_engine(self, files: ModelFiles) -> EngineClient:
        options = engine_options(files, self.engine_options)
        for name in ("model", "gpu_memory_utilization", "page"):
            options.pop(name, None)
        self._fleet.add(files.name, files.folder, **options)
        return self._fleet.engine(files.name)

    def _sleep(self, engine: EngineClient) -> None:
        engine.call("ring_sleep")

    def _wake(self, engine: EngineClient) -> None:
        engine.call("ring_wake_up")

    def _end_engine(self, name: str, engine: EngineClient) -> None:
        self._fleet.remove(name)

    def close(self) -> None:
        """End all engines and the ring."""
        super().close()
        if hasattr(self, "_fleet"):
            self._fleet.close()


def _page_bytes(page: int | str | None, device: str) -> int:
    from djinn_lib.engine.device import DEFAULT_PAGE_BYTES
    from djinn_lib.units import parse_bytes

    return parse_bytes(page or DEFAULT_PAGE_BYTES[device])
