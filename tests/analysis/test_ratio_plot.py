"""The figure of the headline comparisons on every machine."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.figure import Figure
from run_factory import on_another_machine

from djinn_lib.analysis.comparisons import machine_ratio_table
from djinn_lib.analysis.host_pace import one_pace_table
from djinn_lib.analysis.plots.ratios import machine_ratios
from djinn_lib.analysis.run import Run, published
from djinn_lib.analysis.selection import CPU_CLOCKS


def markers(figure: Figure, panel: int) -> list[tuple[float, bool]]:
    """The heights of a panel's markers, and whether they are hollow."""
    drawn: list[Any] = [line for line in figure.axes[panel].lines if line.get_marker() == "o"]
    return [(float(line.get_ydata()[0]), line.get_markerfacecolor() == "white") for line in drawn]


def test_each_machine_has_a_marker_and_a_shared_one_is_hollow(gpu: Run):
    busy = on_another_machine(gpu, "djinn_eager", total_ms=lambda ms: ms / 2)
    busy = on_another_machine(busy, "pytorch_pinned")
    for cell in ("paper-25-djinn_eager", "paper-25-pytorch_pinned"):
        busy.manifests[cell]["busy_neighbours"] = ["GPU-b"]
    table = machine_ratio_table(busy)
    alike = table.loc[("paper", "25", "PyTorch pinned", "Djinn, eager decode")]
    at_one_pace = one_pace_table(busy)
    figure = machine_ratios(table, at_one_pace, published())
    drawn = markers(figure, 0)
    assert set(drawn) >= set(
        zip(alike["P50 (x)"], alike["machine"].str.endswith("(shared)"), strict=True)
    )
    assert sorted(hollow for _, hollow in drawn) == [False] * (len(drawn) - 1) + [True]
    hollow = at_one_pace.reset_index()["machine"].str.endswith("(shared)")
    assert markers(figure, 1) == [
        *zip(at_one_pace["P50, at the mean pace (x)"], hollow, strict=True)
    ]
    fastest = [float(line.get_ydata()[0]) for line in figure.axes[1].lines  # type: ignore[arg-type]
               if line.get_marker() == "x"]  # fmt: skip
    assert fastest == at_one_pace["P50, at the fastest pace (x)"].tolist()
    sleep = table.xs("vLLM sleep", level="latency of")
    assert sorted(sleep["mean (x)"]) == sorted(height for height, _ in markers(figure, 2))
    top = figure.axes[0].get_ylim()[1]
    assert top > max(*alike["P50 high (x)"], *published()["sensitivity"]["speedup"])


@pytest.mark.parametrize("paper", [None, published()])
def test_the_figure_says_how_many_requests_it_rests_on(gpu: Run, paper: Any):
    figure = machine_ratios(machine_ratio_table(gpu), one_pace_table(gpu), paper)
    assert "n = 30 requests of the paper's trace" in figure.get_supxlabel()
    for axes in figure.axes[:2]:  # both panels of PyTorch pinned
        assert any("paper" in text.get_text() for text in axes.texts) == bool(paper)
    assert len(figure.axes) == 4


def test_without_ratios_the_figure_says_why(gpu: Run, cpu: Run):
    (text,) = machine_ratios(machine_ratio_table(cpu), one_pace_table(cpu)).axes[0].texts
    assert CPU_CLOCKS in " ".join(text.get_text().split())
    drawn = ["PyTorch pinned", "vLLM sleep", "vLLM sleep, read-only"]
    table = machine_ratio_table(gpu)
    without = one_pace_table(cpu)
    assert markers(machine_ratios(table, without), 1) == []
    others = table[~table.index.get_level_values("latency of").isin(drawn)]
    (text,) = machine_ratios(others, without).axes[0].texts
    assert "No machine ran two of the systems" in " ".join(text.get_text().split())
