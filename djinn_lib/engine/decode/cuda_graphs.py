"""Record a computation once as CUDA graphs, and replay it at almost no host cost.

A computation that waits for weights is recorded in pieces, one per unit of the model. Each piece
can then wait for its bytes before it runs. Recorded work uses fixed virtual addresses. It remains
valid when other frames are mapped under these addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from djinn_lib.engine.memory.layout import Extents
from djinn_lib.engine.models.packing import Unit, Wait
from djinn_lib.errors import ConfigError

WARM_UPS = 2


class Recording(Protocol):
    """A computation that can be replayed, and that waits for the weights it reads."""

    def replay(self) -> None:
        """Run the computation."""
        ...


class Repeated:
    """Call the function again instead of recording it; the model's own hooks wait."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def replay(self) -> None:
        """Call the function."""
        self._function()


class GraphRecording:
    """A sequence of CUDA graphs, and the bytes that each of them waits for."""

    def __init__(self, pieces: Sequence[tuple[Extents, torch.cuda.CUDAGraph]], wait: Wait) -> None:
        self._pieces, self._wait = tuple(pieces), wait

    def replay(self) -> None:
        """Submit all graphs to the current stream."""
        for extents, graph in self._pieces:
            if extents:
                self._wait(extents)
            graph.replay()


_HOST_READS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})


def reads_on_host(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operator returns values, or sizes that depend on them, to the host."""
    if func is torch.ops.aten.index.Tensor:  # only an index that is a mask does
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return bool(_HOST_READS & set(func.tags))


class NoHostReads(TorchDispatchMode):
    """Refuse operators that read tensor values on the host; captures cannot do so.

    A capture that meets such an operator fails and leaks allocator memory. So a computation is
    checked before it is captured.

    Raises:
        ConfigError: inside, at the first such operator.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if reads_on_host(func, args):
            raise ConfigError(
                f"expected a forward pass that does not depend on values on the host, got {func}"
            )
        return func(*args, **(kwargs or {}))


class Recorder:
    """Records computations on a device.

    Args:
        device: on the CPU, which has no CUDA graphs, functions are called again instead.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._stream = _capture_stream(device)
            self._pool: Any = torch.cuda.graph_pool_handle()

    def ensure_recordable(self, function: Callable[[], None]) -> None:
        """Run a function once to check that it can be recorded; on the CPU do nothing.

        Raises:
            ConfigError: it reads values on the host.
        """
        if self._on_gpu:
            with torch.no_grad(), NoHostReads():
                function()

    def record(
        self,
        function: Callable[[], None],
        model: PreTrainedModel,
        units: Sequence[Unit],
        wait: Wait = lambda extents: None,
        extents: Extents = (),
    ) -> Recording:
        """Record `function`, which runs `model` once, with a piece for each of `units`.

        All weights must be on the device. The function first runs `WARM_UPS` times, because the
        first call of a kernel may load or tune it, which cannot be captured.

        Args:
            function: reads and writes tensors that keep their addresses.
            model: calls of its units mark where pieces begin.
            units: in the order of execution; none to record a single piece.
            wait: called before each piece with the bytes that it needs. Without recording, the
                model's own hooks wait (see `hold_back`).
            extents: bytes that the first piece needs.

        Raises:
            Exception: what the function raises; later recordings still work.
        """
        if not self._on_gpu:
            return Repeated(function)
        # Capture needs a stream other than the default one; order it after the current stream.
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.no_grad(), torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                function()
            self._stream.synchronize()
            capture = _Capture(self._pool, extents)
            hooks = [
                model.get_submodule(unit.module).register_forward_pre_hook(
                    lambda *_, extents=unit.extents: capture.need(extents)
                )
                for unit in units
            ]
            try:
                capture.begin()
                function()
                capture.end()
            except BaseException:
                capture.abandon()
                self._pool = torch.cuda.graph_pool_handle()
                raise
            finally:
                for hook in hooks:
                    hook.remove()
        current.wait_stream(self._stream)
        return GraphRecording(capture.pieces, wait)


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for all captures: cuBLAS keeps a workspace per stream."""
    return torch.cuda.Stream(device)


# Graphs whose capture failed. torch's allocator of pinned memory may still refer to them.
_ABANDONED: list[torch.cuda.CUDAGraph] = []


class _Capture:
    """A capture in progress; it begins a new graph when more bytes are needed."""

    def __init__(self, pool: Any, extents: Extents) -> None:
        self._pool, self._extents = pool, extents
        self.pieces: list[tuple[Extents, torch.cuda.CUDAGraph]] = []

    def begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile; their work must not invalidate the capture.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> None:
        self._graph.capture_end()
        self.pieces.append((self._extents, self._graph))

    def abandon(self) -> None:
        """Clean up a failed capture.

        torch then ends the capture of the stream but not that of the allocator. Without this call,
        later allocations would still come from the pool of the failed graph.
        """
        with suppress(RuntimeError):
            self._graph.capture_end()
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        _ABANDONED.append(self._graph)

    def need(self, extents: Extents) -> None:
        """Begin a new piece if the next unit's bytes end after those waited for so far."""
        if self._extents and extents[-1][1] <= self._extents[-1][1]:
            return
        if self._extents:
            self.end()
            self.begin()
        self._extents = extents


class Mailbox:
    """Copies token ids to the host, with an event per slot that marks completion."""

    def __init__(self, n_slots: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._ids = torch.zeros(n_slots, dtype=torch.long, pin_memory=self._on_gpu)
        self._events = [torch.cuda.Event() for _ in range(n_slots if self._on_gpu else 0)]

    def send(self, slot: int, token: torch.Tensor) -> None:
        """Copy a token (1, 1) to a slot, after the work already submitted to the stream."""
        self._ids[slot : slot + 1].copy_(token.view(1), non_blocking=True)
        if self._on_gpu:
            self._events[slot].record()

    def receive(self, slot: int) -> int:
        """Wait for the token in a slot and return it."""
        if self._on_gpu:
            self._events[slot].synchronize()
        return int(self._ids[slot])
