"""The common interface of all systems under test.

A system gets the folders of the models' weights and a capacity, and serves one request at a time:
token ids in, token ids and costs out. How it gets the right weights onto the device is what the
experiment measures.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from djinn_lib.engine.decode.eager import Tokens
from djinn_lib.engine.serving.generation import Generation
from djinn_lib.errors import CapacityError, CheckpointError, ConfigError


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk: a folder with config.json and `n_bytes` of safetensors.

    `digests` maps its files' names to `integrity.file_digests`, as recorded at set-up.
    """

    name: str
    folder: Path
    n_bytes: int
    dtype: str
    digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Served:
    """The result and costs of one request; bytes of weights, milliseconds.

    `total_ms` runs from the moment the system takes up the request until it is ready for the next
    one. `switch_ms` is the part that the weights cost: load, offload and engine start; with
    overlap, only the exposed wait. `ttft_ms` runs from the start to the first token, and
    `decode_ms` from the first to the last new token.
    """

    token_ids: tuple[int, ...]
    switch_ms: float
    ttft_ms: float
    decode_ms: float
    total_ms: float
    loaded_bytes: int = 0
    evicted_bytes: int = 0
    writeback_bytes: int = 0
    resident_before_bytes: int = 0
    resident_bytes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def generated(
        cls, g: Generation, total_ms: float, ttft_ms: float, resident_bytes: dict[str, int]
    ) -> Served:
        """Return the result of a request to a ring, from its generation."""
        return cls(
            g.token_ids,
            switch_ms=g.switch_ms,
            ttft_ms=ttft_ms,
            decode_ms=g.decode_ms,
            total_ms=total_ms,
            loaded_bytes=g.loaded_bytes,
            evicted_bytes=g.evicted_bytes,
            resident_before_bytes=g.resident_before_bytes,
            resident_bytes=resident_bytes,
        )


def served_later(
    pending: Future[Generation], served: Callable[[Generation, float, float], Served]
) -> Future[Served]:
    """Return the result of a queued request when its generation is done.

    `served` makes it from the generation, its total and its time to the first token, both in
    milliseconds and without the time in the queue.
    """
    result: Future[Served] = Future()

    def finish(done: Future[Generation]) -> None:
        try:
            g = done.result()
            result.set_result(served(g, g.total_ms - g.queue_ms, g.ttft_ms - g.queue_ms))
        except BaseException as error:  # a request that was given up too: somebody waits for it
            result.set_exception(error)

    pending.add_done_callback(finish)
    return result


def columns_as_dict(table: pd.DataFrame, column: str) -> dict[str, int]:
    """Return a column of bytes of a table with a row for each model, by model."""
    return dict(zip(table["model"], table[column].tolist(), strict=True))


class SystemUnderTest(ABC):
    """One way to serve several models from one device.

    Args:
        models: the models by name.
        capacity_bytes: device memory for weights; systems without such a limit ignore it.
        device: "cpu" or "cuda".
        options: of this system, see each class.
    """

    option_names: ClassVar[frozenset[str]] = frozenset()
    reads_files_while_serving: ClassVar[bool] = False  # if False, only `start` reads files
    batches: ClassVar[bool] = False  # whether waiting requests may be computed together

    def __init__(
        self, models: Mapping[str, ModelFiles], capacity_bytes: int, device: str, **options: object
    ) -> None:
        if unknown := sorted(options.keys() - self.option_names):
            raise ConfigError(
                f"expected options of {type(self).__name__} out of "
                f"{sorted(self.option_names)}, got {unknown}"
            )
        self.models = dict(models)
        self.capacity_bytes = capacity_bytes
        self.device = torch.device(device)
        self.options = options

    @classmethod
    def unavailable(cls, device: str) -> str | None:
        """Return why this system cannot run here, or None if it can."""
        return None

    def notes(self) -> list[str]:
        """List facts about this run that a reader must know."""
        return []

    @abstractmethod
    def start(self, progress: Callable[[str], None] = lambda step: None) -> None:
        """Set up once, before the first request; not part of any request's time."""

    @abstractmethod
    def serve(self, model: str, prompt_ids: Sequence[int], max_new_tokens: int) -> Served:
        """Serve one request with exactly `max_new_tokens` greedy tokens."""

    def submit(
        self, worker: Executor, model: str, prompt_ids: Sequence[int], max_new_tokens: int
    ) -> Future[Served]:
        """Queue a request; by default, the one thread of `worker` serves them in turn.

        Times of the result count from the moment the request is taken up, not from its arrival.
        """
        return worker.submit(self.serve, model, prompt_ids, max_new_tokens)

    def device_bytes(self) -> dict[str, int]:
        """Return each fully loaded model's bytes on the device; call after `start`.

        These are all its weights, unless a system can keep some elsewhere.
        """
        return {name: files.n_bytes for name, files in self.models.items()}

    def decoding(self) -> dict[str, dict[str, Any]]:
        """Return how each model decodes, where this is Djinn's work; call after `start`.

        `mode` is what the model got, which may be slower than what was asked for, and
        `logits_distance` how far its logits are from those of transformers' `generate`.
        """
        return {}

    def warm_up(self, model: str, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
        """Pay the one-time costs of a model: allocations, caches, compilation.

        It serves a request of the cell's own size: after requests of two tokens, the first full
        request of each model decoded at a third of the pace (H100, transformers' own steps).
        Systems that start cold for every request do nothing.
        """
        self.serve(model, prompt_ids, max_new_tokens)

    def reset(self) -> None:
        """Take all weights off the device, before each repeat of the trace."""
        return

    def resize(self, capacity_bytes: int) -> None:
        """Go on with another capacity, and with nothing on the device, where `resizes` says so.

        Raises:
            CapacityError: a model is larger.
        """
        self.reset()
        self.capacity_bytes = capacity_bytes

    @abstractmethod
    def close(self) -> None:
        """Free everything; called once, also after a failure."""

    def known(self, model: str) -> ModelFiles:
        """Return the files of a model.

        Raises:
            ConfigError: no model has that name.
        """
        if model not in self.models:
            raise ConfigError(f"expected one of the models {list(self.models)}, got {model!r}")
        return self.models[model]

    def served(
        self,
        model: str,
        tokens: Tokens,
        load_s: float,
        total_s: float,
        unload_s: float = 0.0,
        *,
        found: bool = False,
        evicted: Collection[str] = (),
        written_back: Collection[str] = (),
        resident: Collection[str] = (),
    ) -> Served:
        """Return the result and costs of a request, for systems that move whole models.

        Args:
            model: the requested model.
            tokens: the new tokens; their times count from the end of the load.
            load_s: from the start of the request to the end of the load.
            total_s: from the start until the system is ready for the next request.
            unload_s: part of `total_s` in which weights are taken away again.
            found: whether the model was resident, and so nothing was loaded.
            evicted, written_back: models that left the device, and those copied to the host.
            resident: models on the device afterwards.
        """
        sizes = {name: files.n_bytes for name, files in self.models.items()}
        return Served(
            tokens.token_ids,
            switch_ms=(load_s + unload_s) * 1e3,
            ttft_ms=(load_s + tokens.first_s) * 1e3,
            decode_ms=(tokens.last_s - tokens.first_s) * 1e3,
            total_ms=total_s * 1e3,
            loaded_bytes=0 if found else sizes[model],
            evicted_bytes=sum(sizes[name] for name in evicted),
            writeback_bytes=sum(sizes[name] for name in written_back),
            resident_before_bytes=sizes[model] if found else 0,
            resident_bytes={name: sizes[name] if name in resident else 0 for name in sizes},
        )

    def victims(self, model: str, resident: Collection[str]) -> list[str]:
        """Return which of the resident models must go to make room for a whole one.

        `resident` has the least recently used one first.

        Raises:
            CapacityError: the model is larger than the capacity.
        """
        n_bytes, room, victims = self.models[model].n_bytes, self.capacity_bytes, []
        if n_bytes > room:
            raise CapacityError(
                f"expected a model of at most {room} bytes, got {model!r} with {n_bytes}: raise "
                "the capacity"
            )
        room -= sum(self.models[name].n_bytes for name in resident)
        for name in resident:
            if n_bytes <= room:
                break
            victims.append(name)
            room += self.models[name].n_bytes
        return victims

    def synchronize(self) -> None:
        """Wait for the device, so that the clock includes all submitted work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def clock_s(self) -> float:
        """Read the clock after all work submitted so far."""
        self.synchronize()
        return time.perf_counter()


def load_ordinarily(
    files: ModelFiles, device: str | torch.device = "cpu", device_map: bool = False
) -> PreTrainedModel:
    """Load a model to the host and move it to a device, as transformers' users do.

    With `device_map`, `from_pretrained` puts each weight on the device as it reads it. On the CPU
    the parameters are then copied: safetensors only maps the file, so without the copy the first
    forward pass would read the weights.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt.
    """
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            files.folder,
            dtype=files.dtype,
            use_safetensors=True,
            trust_remote_code=False,
            device_map=str(device) if device_map else None,
        )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"expected a whole checkpoint of {files.name!r} in {files.folder}, got "
            f"{type(error).__name__}: {error}: restore it, or run notebook 00_setup again"
        ) from error
    model = model.eval().requires_grad_(False).to(device)
    if model.device.type == "cpu":
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model
