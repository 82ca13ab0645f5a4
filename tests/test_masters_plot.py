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
)


@pytest.fixture
def full_misses(monkeypatch):
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    return importlib.import_module("masters_plot").full_misses


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
        box = figure.get_tightbbox()
        assert box.x0 >= 0 and box.x1 <= figure.get_figwidth()
    finally:
        plt.close(figure)


def test_without_rows_there_is_nothing_to_draw(full_misses):
    with pytest.raises(RecordError, match="compressed masters"):
        full_misses(ROWS[:0])
