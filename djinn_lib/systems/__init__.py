"""The systems under test, by name.

A module is imported when its system is asked for: whoever only needs the names needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from djinn_lib.errors import ConfigError

if TYPE_CHECKING:
    from djinn_lib.systems.base import SystemUnderTest

SYSTEMS = {
    "djinn": ("djinn", "DjinnRing"),
    "djinn_vllm": ("djinn_vllm", "DjinnVllm"),
    "pytorch_pinned": ("pytorch", "PyTorchPinned"),
    "pytorch_pinned_readonly": ("pytorch", "PyTorchPinnedReadonly"),
    "pytorch_lru": ("pytorch", "PyTorchLRU"),
    "pytorch_pageable": ("pytorch", "PyTorchPageable"),
    "serverless": ("serverless", "Serverless"),
    "ray_actors": ("ray_actors", "RayActors"),
    "vllm_recreate": ("vllm_recreate", "VllmRecreate"),
    "vllm_sleep": ("vllm_sleep", "VllmSleep"),
    "vllm_sleep_readonly": ("vllm_sleep_readonly", "VllmSleepReadonly"),
}
# Jupyter kernels of environments of their own, for systems that need one where there is no GPU.
KERNELS = {"vllm_recreate": "djinn-vllm"}
# Those that can change their capacity while they run: see `SystemUnderTest.resize`.
_RESIZED = frozenset({"pytorch_pinned", "pytorch_pinned_readonly", "pytorch_lru",
                      "pytorch_pageable", "vllm_sleep"})  # fmt: skip


def resizes(name: str, options: Mapping[str, object]) -> bool:
    """Whether one start of a system serves cells of every capacity.

    An LRU cache with Djinn's decoder does not: it has as many frames as its capacity needs.
    """
    return name in _RESIZED and not (name == "pytorch_lru" and "decode" in options)


def system_class(name: str) -> type[SystemUnderTest]:
    """Return the class of a system.

    Raises:
        ConfigError: no system has that name.
    """
    if name not in SYSTEMS:
        raise ConfigError(f"expected a system out of {list(SYSTEMS)}, got {name!r}")
    module, class_name = SYSTEMS[name]
    return getattr(import_module(f"djinn_lib.systems.{module}"), class_name)
