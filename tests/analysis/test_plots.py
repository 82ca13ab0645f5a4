from __future__ import annotations

import re

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from row_factory import CAPACITIES, SIZES, TOTAL_BYTES, UNAVAILABLE, cell_rows, run_rows

from djinn_lib.analysis.arriving import load_table
from djinn_lib.analysis.plots.latency import (
    bytes_loaded,
    latency_breakdown,
    latency_cdf,
)
from djinn_lib.analysis.plots.load import load, load_intervals
from djinn_lib.analysis.plots.pace import decode_pace
from djinn_lib.analysis.plots.sensitivity import sensitivity
from djinn_lib.analysis.plots.style import (
    SYSTEM_STYLE,
    byte_scale,
    connected,
    save_figure,
)
from djinn_lib.analysis.plots.switches import switch_cdf
from djinn_lib.analysis.plots.timeline import (
    residency_over_time,
    resident_bytes,
    trace_timeline,
)
from djinn_lib.errors import RecordError
from djinn_lib.metrics import phases_ms
from djinn_lib.trace import paper_trace

PAPER = {
    "setup": {"n_requests": 30},
    "systems": {
        "djinn": {"p50_total_ms": 1392, "p99_total_ms": 14905, "completed": 30},
        "vllm_recreate": {"completed": 22},
    },
    "switches_of_djinn": [
        {"share": 0.53, "low_ms": 0, "high_ms": 10},
        {"share": 0.07, "low_ms": 10000, "high_ms": None},
    ],
    "sensitivity": {"speedup": [3.07, 3.13], "hit_share": [0.53, 1.0]},
}
COMPARING = [latency_cdf, latency_breakdown, bytes_loaded]


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return run_rows()


@pytest.fixture(scope="module")
def at_25(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["capacity_label"] == "25"]


def arriving(traces: str = "load") -> pd.DataFrame:
    """Requests at two rates: four times as many arrivals make each take ten times as long."""
    parts = [
        cell_rows(system).assign(trace=trace, mode="concurrent")
        for system in ("djinn", "pytorch_lru") for trace in (f"{traces}_1", f"{traces}_4")
    ]  # fmt: skip
    rows = pd.concat(parts, ignore_index=True)
    rows.loc[rows["trace"] == f"{traces}_4", ["ttft_ms", "total_ms"]] *= 10
    return rows


def from_warm() -> pd.DataFrame:
    """Requests of two systems from a warm start, half of them hits, at one capacity."""
    parts = [cell_rows(system).assign(start="warm") for system in ("djinn", "pytorch_lru")]
    rows = pd.concat(parts, ignore_index=True)
    return rows.assign(loaded_bytes=(rows["request"] % 2) * 1000)


def swept(machines: dict[str, int]) -> pd.DataFrame:
    """Rows of Djinn and the baseline at capacities that machines measured."""
    parts = [cell_rows(system, capacity_label=label).assign(machine=machine)
             for label, machine in machines.items() for system in ("djinn", "pytorch_pinned")
             ]  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def stretches(axes: Axes, system: str) -> list[int]:
    """How many points each line of a system connects."""
    color = SYSTEM_STYLE[system].color
    lines = [box.lines[0] for box in axes.containers if isinstance(box, ErrorbarContainer)]
    found = [line for line in lines if line is not None and line.get_color() == color]
    return [int(np.isfinite(np.asarray(line.get_ydata(), float)).sum()) for line in found]


@pytest.fixture(scope="module")
def figures(rows: pd.DataFrame, at_25: pd.DataFrame) -> dict[str, Figure]:
    sweep = rows[rows["system"].isin(["djinn", "pytorch_lru", "pytorch_pinned"])]
    return {
        "latency_cdf": latency_cdf(at_25, PAPER),
        "latency_breakdown": latency_breakdown(at_25),
        "switches": switch_cdf(at_25, PAPER),
        "every_system": latency_cdf(pd.concat([cell_rows(system) for system in SYSTEM_STYLE])),
        "load": load(arriving(), {"load_1": 1.0, "load_4": 4.0}),
        "load_pair": load(arriving("pair"), {"pair_1": 1.0, "pair_4": 4.0}, traces="pair"),
        "no_load": load(at_25.iloc[:0], {}),
        "decode_pace": decode_pace(at_25),
        "bytes_loaded": bytes_loaded(at_25, 3e9, TOTAL_BYTES),
        "sensitivity": sensitivity(sweep, paper=PAPER),
        "sensitivity_warm": sensitivity(sweep, paper=PAPER, warm=from_warm()),
        "residency_over_time": residency_over_time(at_25),
        "trace_timeline": trace_timeline(paper_trace()),
    }


def texts(figure: Figure) -> str:
    found = figure.findobj(mpl.text.Text)
    return " ".join(" ".join(text.get_text().split()) for text in found)


def test_the_pace_of_decoding_is_a_multiple_of_the_fastest_of_its_model():
    rows = cell_rows("djinn", repeats=2)
    rows["decode_ms"] = rows["model"].map({m: 100.0 * (i + 1) for i, m in enumerate(SIZES)})
    slow = (rows["repeat"] == 1) & (rows["request"] == 4)
    rows.loc[slow, "decode_ms"] *= 3
    other = cell_rows("vllm_recreate")
    image = decode_pace(pd.concat([rows, other])).axes[0].collections[0].get_array()
    grid = np.ma.filled(image, np.nan)
    assert grid.shape == (2 + 1 + 1, 30)  # lines of the first, a gap, a line of the other
    expected = np.ones((2, 30))
    expected[1, 4] = 3
    np.testing.assert_allclose(grid[:2], expected)
    assert np.isnan(grid[2]).all()
    assert list(np.isnan(grid[3])) == list(~other["ok"])


def test_modes_are_not_mixed():
    both = pd.concat([cell_rows("djinn"), cell_rows("djinn").assign(mode="concurrent")])
    for draw in (*COMPARING, decode_pace):
        with pytest.raises(
            RecordError, match=r"more than one mode .*\['concurrent', 'sequential'\]"
        ):
            draw(both)
    with pytest.raises(RecordError, match="rows of more than one mode"):
        sensitivity(both, "djinn")


def test_text_is_never_smaller_than_7_points(figures: dict[str, Figure]):
    for name, figure in figures.items():
        sizes = {t.get_fontsize() for t in figure.findobj(mpl.text.Text) if t.get_text()}
        assert min(sizes) >= 7, name
        assert figure.get_figwidth() <= 7.0


def test_nothing_reaches_beyond_the_figure(figures: dict[str, Figure]):
    for name, figure in figures.items():
        box = figure.get_tightbbox()  # inches
        assert box.x0 >= 0 and box.x1 <= figure.get_figwidth(), name
        assert box.y0 >= 0 and box.y1 <= figure.get_figheight(), name


@pytest.mark.parametrize("draw", COMPARING)
def test_empty_rows_are_refused(draw, rows: pd.DataFrame):
    with pytest.raises(RecordError, match=r"there are no rows for .*: run the cells first"):
        draw(rows.iloc[:0])


@pytest.mark.parametrize("draw", COMPARING)
def test_mixed_capacities_are_refused(draw, rows: pd.DataFrame):
    with pytest.raises(RecordError, match=r"one capacity_label .* got \['20', '25'"):
        draw(rows)


@pytest.mark.parametrize("draw", COMPARING)
def test_systems_that_cannot_run_are_named_with_the_reason(draw, at_25: pd.DataFrame):
    assert f"vLLM sleep ({UNAVAILABLE['vllm_sleep']})" in texts(draw(at_25))


def test_cdf_ends_at_the_share_that_was_served(at_25: pd.DataFrame):
    lines = {line.get_label(): line for line in latency_cdf(at_25).axes[0].lines}
    heights = lines["vLLM re-created\n(8 of 30 failed)"].get_ydata()
    assert heights[-1] == pytest.approx(100 * 22 / 30)
    assert lines["Djinn"].get_ydata()[-1] == 100


def test_cdf_draws_each_request_at_the_mean_of_its_repeats():
    rows = cell_rows("djinn", repeats=2)
    rows.loc[(rows["repeat"] == 1) & (rows["request"] == 3), "total_ms"] = 9e5  # once, by chance
    failed = (rows["repeat"] == 1) & (rows["request"] == 4)
    rows.loc[failed, ["ok", "error_kind", "total_ms"]] = [False, "oom", np.nan]
    line = latency_cdf(rows).axes[0].lines[0]
    means = rows[rows["ok"]].groupby("request")["total_ms"].mean()
    assert len(line.get_xdata()) == 31 and line.get_xdata()[-1] == pytest.approx(means[3])
    assert means[3] < 5e5
    assert line.get_ydata()[-1] == pytest.approx(100 * 59 / 60)


@pytest.mark.parametrize("draw", COMPARING)
def test_a_system_with_fewer_requests_is_labelled_so(draw, at_25):
    few = at_25[(at_25["system"] != "pytorch_lru") | (at_25["request"] < 12)]
    whole, labels = ("(first 12 requests)" in texts(draw(rows)) for rows in (at_25, few))
    assert labels and not whole


def test_the_pace_of_a_system_with_fewer_requests_ends_early(at_25):
    rows = at_25[at_25["system"].isin(["djinn", "pytorch_lru"])]
    few = rows[(rows["system"] != "pytorch_lru") | (rows["request"] < 12)]
    grid = decode_pace(few).axes[0].collections[0].get_array()
    assert np.ma.count(grid[0]) == 30 and np.ma.count(grid[-1]) == 12


def test_means_have_their_intervals_on_one_logarithmic_axis(at_25: pd.DataFrame):
    left = latency_breakdown(at_25).axes[0]
    assert left.get_xscale() == "log"
    totals = at_25[at_25["system"] == "djinn"]["total_ms"]
    drawn = left.containers[0]  # the first system: Djinn
    assert drawn[0].get_xdata()[0] == pytest.approx(totals.mean())
    ((low, _), (high, _)) = drawn[2][0].get_segments()[0]
    assert low < totals.mean() < high


def test_load_is_counted_against_a_target():
    rows = arriving()
    target_ms = float(rows[rows["trace"] == "load_1"]["total_ms"].max())
    table = load_table(rows, {"load_1": 1.0, "load_4": 4.0}, target_ms)
    djinn = table[table["system"] == "djinn"].set_index("rate")
    assert djinn.loc[1.0, "in_time"] == 100 > djinn.loc[4.0, "in_time"]
    assert djinn.loc[4.0, "total_p50"] == pytest.approx(10 * djinn.loc[1.0, "total_p50"])
    assert (table["n"] == 30).all()


def test_the_load_is_drawn_with_the_intervals_of_its_table():
    rows, rates = arriving(), {"load_1": 1.0, "load_4": 4.0}
    target_ms = float(rows.loc[rows["trace"] == "load_4", "total_ms"].median())
    table = load_table(rows, rates, target_ms).set_index(["system", "rate"])
    drawn = load_intervals(rows, rates, target_ms)
    assert ((drawn["low"] <= drawn["value"]) & (drawn["value"] <= drawn["high"])).all()
    assert (drawn["low"] < drawn["high"]).all()
    for point in drawn.itertuples():
        column = point.measure.replace("_ms_", "_")
        assert point.value == pytest.approx(table.loc[(point.system, point.rate), column])
    all_in_time = drawn[(drawn["measure"] == "in_time") & (drawn["rate"] == 1.0)]
    assert all_in_time["value"].tolist() == [100, 100]
    assert all_in_time["low"].tolist() == pytest.approx([100 * 0.025 ** (1 / 30)] * 2)


def test_only_the_load_of_the_named_traces_is_drawn():
    both = pd.concat([arriving(), arriving("pair")])
    said = texts(load(both, {"pair_1": 2.0, "pair_4": 8.0}, 1000.0, "pair"))
    assert "30 at 2/s, 30 at 8/s" in said and "Done within 1 s" in said
    assert "at the rates of traces pair_*" in texts(load(arriving(), {}, traces="pair"))
    mixed = pd.concat([arriving(), arriving().assign(capacity_label="40")])
    with pytest.raises(RecordError, match="more than one capacity_label"):
        load(mixed, {"load_1": 1.0, "load_4": 4.0})


def test_lines_connect_neighbours_of_one_machine():
    points = pd.DataFrame({"x": range(6), "machine": [1, 1, 2, 1, np.nan, 1]})
    assert [part["x"].tolist() for part in connected(points)] == [[0, 1], [2], [3], [4], [5]]
    left, middle, right = sensitivity(swept({"20": 1, "25": 2, "32": 3, "40": 3})).axes
    assert stretches(left, "djinn") == stretches(right, "djinn") == [1, 1, 2]
    assert stretches(middle, "djinn") == [4]  # bytes do not depend on the machine
    several = pd.concat([
        cell_rows("pytorch_pinned", "20").assign(machine=9, only_beside=True),
        swept({"20": 1, "25": 1}).assign(only_beside=False),
    ])  # fmt: skip
    assert stretches(sensitivity(several).axes[2], "pytorch_pinned") == [2]
    figure = sensitivity(swept({"20": 1, "25": 1}))
    assert stretches(figure.axes[0], "djinn") == [2]
    assert "machine" not in figure.get_supxlabel()


def test_a_rate_of_another_machine_is_not_connected():
    rows = arriving()
    rows["place"] = rows["trace"].map({"load_1": "GPU-1", "load_4": "GPU-2"})
    axes = load(rows, {"load_1": 1.0, "load_4": 4.0}).axes[0]
    assert stretches(axes, "djinn") == [1, 1]
    one = load(rows.assign(place="GPU-1"), {"load_1": 1.0, "load_4": 4.0}).axes[0]
    assert stretches(one, "djinn") == [2]


def test_hits_from_the_start_of_the_paper_are_drawn_hollow_beside_its_own(rows):
    sweep = rows[rows["system"].isin(["djinn", "pytorch_lru", "pytorch_pinned"])]
    figure = sensitivity(sweep, paper=PAPER, warm=from_warm())
    hollow = [line for line in figure.axes[1].lines if line.get_markerfacecolor() == "white"]
    assert [line.get_ydata().tolist() for line in hollow] == [[50.0], [50.0]]
    at_25 = 1
    diamonds = next(line for line in figure.axes[1].lines if line.get_marker() == "D")
    for line in (*hollow, diamonds):
        assert at_25 in np.round(line.get_xdata())
    assert "PyTorch LRU, from the paper's start" in texts(figure)
    assert "from the paper's start" not in texts(sensitivity(sweep, paper=PAPER))
    with pytest.raises(RecordError, match="more than one trace"):
        sensitivity(sweep, warm=from_warm().assign(trace="zipf"))


def test_the_shares_of_the_paper_hide_no_curve(figures: dict[str, Figure]):
    axes = figures["switches"].axes[0]
    shares = [text for text in axes.texts if "%" in text.get_text()]
    assert [text.get_text() for text in shares] == ["paper: 53%", "7%"]
    top = axes.get_window_extent().y1
    assert all(text.get_window_extent().y0 >= top for text in shares)


@pytest.mark.parametrize("name", ["decode_pace", "load", "sensitivity", "switches"])
def test_figures_say_how_many_requests_they_rest_on(figures: dict[str, Figure], name: str):
    assert re.search(r"n = 30 requests|n, requests of each system: 30", texts(figures[name]))


def test_decodes_beyond_the_scale_of_colours_are_counted():
    rows = cell_rows("djinn")
    assert "drawn as 4x" not in texts(decode_pace(rows.assign(decode_ms=100.0)))
    slow = rows.assign(decode_ms=np.where(rows["request"] < 2, 1000.0, 100.0))
    same = slow.assign(model=slow["model"].iloc[0])
    assert "2 slower than 4x are drawn as 4x." in texts(decode_pace(same))


def test_rows_of_several_machines_are_said_to_be(at_25: pd.DataFrame):
    def said(rows: pd.DataFrame) -> str:
        return latency_breakdown(rows).get_supxlabel()

    own = at_25["system"] == "djinn"
    apart = at_25.assign(place=own.map({True: "GPU-1", False: "GPU-2"}))
    assert "From 2 machines" in said(apart)
    assert all("machines" not in said(rows) for rows in (at_25, apart[own]))


def test_phases_add_up_to_the_total(at_25: pd.DataFrame):
    rows = at_25[at_25["ok"]]
    assert phases_ms(rows).sum(axis=1).tolist() == pytest.approx(rows["total_ms"].tolist())


def test_sensitivity_needs_its_baseline():
    with pytest.raises(RecordError, match="rows of the baseline 'pytorch_pinned'"):
        sensitivity(cell_rows("djinn"))


def test_residency_bars_add_up_to_the_reported_bytes():
    rows = cell_rows("djinn")
    held = residency_over_time(rows).axes[0]
    scale, _ = byte_scale(CAPACITIES["25"])
    drawn = sum(bar.get_height() for bar in held.patches)
    assert drawn * scale == pytest.approx(resident_bytes(rows).to_numpy().sum())
    assert max(b.get_y() + b.get_height() for b in held.patches) * scale <= CAPACITIES["25"]


def test_residency_hatches_exactly_the_partial_models():
    rows = cell_rows("djinn")
    held = residency_over_time(rows).axes[0]
    table = resident_bytes(rows)
    partial = sum(((table[m] > 0) & (table[m] < size)).sum() for m, size in SIZES.items())
    hatched = [bar for bar in held.patches if bar.get_hatch() and bar.get_height() > 0]
    assert len(hatched) == partial > 0


def test_saved_files_are_the_same_bytes_every_time(tmp_path):
    figure = trace_timeline(paper_trace())
    one, other = (save_figure(figure, tmp_path / name, "x") for name in "ab")
    assert [path.name for path in one] == ["x.pdf", "x.png"]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]
    assert len(list((tmp_path / "a").iterdir())) == 2
    pdf = one[0].read_bytes()
    assert b"/CreationDate" not in pdf
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf


def test_a_picture_without_a_chart_is_not_kept(tmp_path):
    nothing = residency_over_time(cell_rows("djinn"), "nobody")
    assert save_figure(nothing, tmp_path, "x") == () and list(tmp_path.iterdir()) == []
