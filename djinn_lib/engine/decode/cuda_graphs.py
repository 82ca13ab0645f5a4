"""Recording a computation once and running it again at no cost for the host.

A computation that waits for weights is recorded in pieces, one a unit of the model, so that each
piece can wait for its bytes before it runs. Recorded work reads and writes fixed addresses; that
weights change their frames under their addresses in between makes no difference.
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
    """A computation that can be run again, and waits for the weights that it reads."""

    def replay(self) -> None:
        """Run it."""
        ...


class Repeated:
    """Nothing is recorded: the function is called again, and the model's own hooks wait."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def replay(self) -> None:
        """Call the function."""
        self._function()


class GraphRecording:
    """CUDA graphs, one after each other, and the bytes that each of them waits for."""

    def __init__(self, pieces: Sequence[tuple[Extents, torch.cuda.CUDAGraph]], wait: Wait) -> None:
        self._pieces, self._wait = tuple(pieces), wait

    def replay(self) -> None:
        """Submit all graphs to the current stream."""
        for extents, graph in self._pieces:
            if extents:
                self._wait(extents)
            graph.replay()


_LOOKS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})


def looks_at_values(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operator lets the host know what a tensor holds, or how much of it."""
    if func is torch.ops.aten.index.Tensor:  # by position it does not, by a mask it does
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return bool(_LOOKS & set(func.tags))


class NoLookingAtValues(TorchDispatchMode):
    """Refuses what the host cannot do while a computation is recorded: look at a tensor's values.

    A capture that meets such an operation is lost, and with it memory of the allocator; so this is
    found out before.

    Raises:
        ConfigError: inside, at the first such operation.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if looks_at_values(func, args):
            raise ConfigError(
                f"expected a forward pass that does not depend on values on the host, got {func}"
            )
        return func(*args, **(kwargs or {}))


class Recorder:
    """Records computations on a device.

    Args:
        device: without CUDA graphs (the CPU) functions are only kept and called again.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._stream = _capture_stream(device)
            self._pool: Any = torch.cuda.graph_pool_handle()

    def ensure_recordable(self, function: Callable[[], None]) -> None:
        """Run a function once to see whether it can be recorded; where it need not be, do nothing.

        Raises:
            ConfigError: it looks at values on the host.
        """
        if self._on_gpu:
            with torch.no_grad(), NoLookingAtValues():
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

        All weights must be on the device. The function runs `WARM_UPS` times first, since kernels
        that are loaded or tuned at their first calls cannot be captured.

        Args:
            function: reads and writes tensors that stay where they are.
            model: calls of its units mark where pieces begin.
            units: in the order of execution; none to record a single piece.
            wait: called before each piece with the bytes that it needs. What is not recorded
                waits by the model's own hooks (see `hold_back`).
            extents: bytes that the first piece needs.

        Raises:
            Exception: whatever the function raises; later recordings are none the worse for it.
        """
        if not self._on_gpu:
            return Repeated(function)
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
    """One stream for all captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


# Graphs whose capture failed: torch's allocator of pinned memory may still refer to them.
_ABANDONED: list[torch.cuda.CUDAGraph] = []


class _Capture:
    """The capture under way: ends one graph and begins the next when more bytes are needed."""

    def __init__(self, pool: Any, extents: Extents) -> None:
        self._pool, self._extents = pool, extents
        self.pieces: list[tuple[Extents, torch.cuda.CUDAGraph]] = []

    def begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile; what they do is none of this graph's business.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> None:
        self._graph.capture_end()
        self.pieces.append((self._extents, self._graph))

    def abandon(self) -> None:
        """Take back what has begun, after an error.

        When a capture fails, torch ends the stream's part of it but not the allocator's: without
        this, memory would go on being taken from the pool of a graph that does not exist.
        """
        with suppress(RuntimeError):
            self._graph.capture_end()
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        _ABANDONED.append(self._graph)

    def need(self, extents: Extents) -> None:
        """What comes next reads these bytes; a new piece begins if they end after earlier ones."""
        if self._extents and extents[-1][1] <= self._extents[-1][1]:
            return
        if self._extents:
            self.end()
            self.begin()
        self._extents = extents


class Mailbox:
    """Token ids on their way to the host, each with an event that says when it is there."""

    def __init__(self, n_slots: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._ids = torch.zeros(n_slots, dtype=torch.long, pin_memory=self._on_gpu)
        self._events = [torch.cuda.Event() for _ in range(n_slots if self._on_gpu else 0)]

    def send(self, slot: int, token: torch.Tensor) -> None:
        """Copy a token (1, 1) to a slot once the work submitted before is done."""
        self._ids[slot : slot + 1].copy_(token.view(1), non_blocking=True)
        if self._on_gpu:
            self._events[slot].record()

    def receive(self, slot: int) -> int:
        """Wait for the token of a slot and return it."""
        if self._on_gpu:
            self._events[slot].synchronize()
        return int(self._ids[slot])
