"""The picture of compressed masters."""

import importlib

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from djinn_lib.errors import RecordError
from djinn_lib.paths import REPO

ROWS = pd.DataFrame(
    [
        ("bfloat16", "llama-7b", "plain", 250.0, 247.0, 1.0),
        ("bfloat16", "llama-7b", "compressed", 172.0, 247.0, 0.67),
        ("bfloat16", "phi-2", "plain", 104.0, 100.0, 1.0),
        ("float16", "llama-7b", "plain", 251.0, 247.0, 1.0),
    ],
    columns=["dtype", "model", "form", "load_ms", "link_ms", "share"],
).assign(repeats=5)


@pytest.fixture
def masters_plot(monkeypatch):
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    return importlib.import_module("masters_plot")


@pytest.fixture
def full_misses(masters_plot):
    return masters_plot.full_misses


def test_rows_of_a_result_have_its_repeats(masters_plot):
    result = {"repeats": 5, "rows": ROWS.drop(columns="repeats").to_dict("records")}
    pd.testing.assert_frame_equal(masters_plot.result_rows(result), ROWS)


def test_bars_and_the_line_of_the_link_are_those_of_the_rows(full_misses):
    figure = full_misses(ROWS)
    try:
        figure.draw_without_rendering()
        first, second = figure.axes
        widths = sorted(bar.get_width() for bar in first.patches if bar.get_width())
        assert widths == [104.0, 172.0, 250.0]
        lines = [line.get_segments()[0][0][0] for line in first.collections]
        assert sorted(lines) == [100.0, 247.0]
        said = {text.get_text() for text in first.texts}
        assert {"172 ms, 67% of bytes", "104 ms, 100% of bytes"} < said
        assert [axes.get_title(loc="left") for axes in (first, second)] == ["bfloat16", "float16"]
        assert "n = 5 loads for each bar" in figure.get_supxlabel()
        box = figure.get_tightbbox()
        assert box.x0 >= 0 and box.x1 <= figure.get_figwidth()
    finally:
        plt.close(figure)


def test_without_rows_there_is_nothing_to_draw(full_misses):
    with pytest.raises(RecordError, match="compressed masters"):
        full_misses(ROWS[:0])
