"""Fork Jupyter kernels from a process that has already imported large packages.

So kernels start at once. Importing torch and transformers takes seconds, longer than a small cell
on the CPU. Only packages other than djinn_lib are imported in advance, because they do not change
during a run. Every kernel imports djinn_lib itself, as it is on disk when its cell starts. A forked
kernel ends with the run that started it, even if that is killed.

This does not work with GPUs: a process that has used CUDA cannot be forked, and imports may use it.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.forkserver import _forkserver
from pathlib import Path
from typing import Any

from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning.local_provisioner import LocalProvisioner

# Imports of cells, of notebooks that read rows and of the page, the slowest first. If one is
# missing here or in the installed version of its package, processes only start more slowly.
_IMPORTED = [
    "torch._dynamo", "transformers.modeling_utils", "transformers.generation",
    "transformers.loss.loss_utils", "transformers.conversion_mapping",
    "transformers.integrations.finegrained_fp8", "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama", "transformers.models.mistral.modeling_mistral",
    "transformers.models.phi.modeling_phi", "transformers.generation.continuous_batching",
    "safetensors.torch", "pandera.pandas", "pandera.backends.pandas.register",
    "pandera.strategies.pandas_strategies", "pyarrow.dataset", "pyarrow.parquet",
    "scipy.stats", "pydantic", "yaml", "tqdm", "matplotlib.pyplot",
    "matplotlib.backends.backend_agg", "matplotlib.backends.backend_pdf", "seaborn",
    "matplotlib_inline.backend_inline",
    "IPython.core.interactiveshell", "ipykernel.kernelapp", "papermill.execute", "nbconvert",
]  # fmt: skip


def fork_context() -> ForkServerContext:
    """Return the context that forks processes from one with the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context


def import_ahead() -> None:
    """Start that process, which imports for seconds, and do not wait for it."""
    # By default OpenMP's threads spin while they wait for each other. If another process needs the
    # cores too, they keep the awaited thread from running, and a cell takes five times as long.
    # With "passive" they sleep. Torch reads it on import, before the first fork.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    fork_context()
    _forkserver.ensure_running()


def begin_worker() -> None:
    """Prepare a forked process to fork kernels too; the run handles Ctrl-C and ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.version_info < (3, 14):
        # It has the address of the process that it was forked from. But Python looks for a pid that
        # only the run knows, and would start another one, with all the imports again.
        vars(_forkserver)["ensure_running"] = lambda: None


class ForkingKernelManager(AsyncKernelManager):
    """Starts the kernel of this environment as a fork; everything else is Jupyter's."""

    async def _async_pre_start_kernel(self, **options: Any) -> tuple[list[str], dict[str, Any]]:
        self.kernel_id = self.kernel_id or str(uuid.uuid4())
        if self.provisioner is None:
            self.provisioner = _ForkProvisioner(
                kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self
            )
        return await super()._async_pre_start_kernel(**options)


class _ForkProvisioner(LocalProvisioner):
    async def launch_kernel(self, cmd: list[str], **options: Any) -> Any:
        arguments = cmd[cmd.index("-f") :]  # the arguments before start Python
        cwd = Path(options.get("cwd") or Path.cwd())
        self.process = _Forked(arguments, options["env"], cwd)
        self.pid = self.pgid = self.process.pid
        self.cwd = cwd
        return self.connection_info


class _Forked:
    """A forked process with the interface of `subprocess.Popen` that Jupyter uses."""

    stdin = stdout = stderr = None

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], cwd: Path) -> None:
        self._process: ForkServerProcess = fork_context().Process(
            target=_serve, args=(list(arguments), dict(environment), str(cwd)), name="djinn-kernel"
        )
        self._process.start()
        self.pid = self._process.pid or 0

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def terminate(self) -> None:
        self._process.terminate()


def _serve(arguments: list[str], environment: dict[str, str], cwd: str) -> None:
    """Run a kernel in a forked process."""
    # Millions of imported objects are never garbage. Without this every full collection visits them
    # all, which takes half a second: as long as a system of the CPU profile needs to load a model.
    gc.freeze()
    os.setsid()  # the run handles Ctrl-C and ends its kernels
    threading.Thread(target=_end_with_the_run, name="djinn-run-watch", daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    from ipykernel.kernelapp import IPKernelApp
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # the default lock outlives a killed kernel
    # 1 means that the kernel need not watch its parent. Matplotlib chose its backend when it was
    # imported, before a kernel could ask for figures in the notebook.
    options = ["--IPKernelApp.parent_handle=1", "--IPKernelApp.matplotlib=inline"]
    IPKernelApp.launch_instance([*arguments, *options])


def _end_with_the_run() -> None:
    """Wait until the process that requested this one ends, then end."""
    run = multiprocessing.parent_process()
    if run is not None:
        run.join()
        os._exit(1)
