"""Cost model, validation and the study of policies."""

import itertools
import json
import pickle
from dataclasses import replace

import pandas as pd
import pytest
from command import djinn

from djinn_lib.analysis import validation
from djinn_lib.analysis.plots import explore
from djinn_lib.analysis.plots import policies as plot_study
from djinn_lib.errors import ConfigError, DjinnError, RecordError
from djinn_lib.experiment import study
from djinn_lib.experiment.executors import Result
from djinn_lib.experiment.study import (
    KNOWN,
    QUEUED,
    SMALL,
    WHOLE_LRU,
    Grid,
    Point,
    run_point,
    run_study,
)
from djinn_lib.paths import REFERENCE, STUDY
from djinn_lib.rows import read_rows
from djinn_lib.simulator.cost_model import CostModel, fit


@pytest.fixture(scope="module")
def reference() -> pd.DataFrame:
    return pd.read_parquet(STUDY / "points.parquet")


POINTS = Grid((3,), alpha=(1.0,), share=(0.5, 0.97), n_requests=300).points()


@pytest.fixture(scope="module")
def small() -> pd.DataFrame:
    queued = [replace(p, n_requests=300) for p in QUEUED if p.load == 0.8]
    return run_study([*POINTS, *queued])


# -- the clock -----------------------------------------------------------------------------


def made_up_engine(link=50e9, start_s=0.002):
    sizes = {"small": 10**9, "large": 8 * 10**9}
    cases = []
    for i, (model, n) in enumerate(sizes.items()):
        load_ms = (start_s + n / link) * 1e3
        cases += [
            {"case": "hit", "model": model, "decode": "eager", "ttft_ms": 99.0, "switch_ms": 0.0,
             "ms_per_token": 99.0, "loaded_bytes": 0},
            {"case": "hit", "model": model, "decode": "graph", "ttft_ms": 10.0 + i,
             "switch_ms": 0.5, "ms_per_token": 3.0 + i, "loaded_bytes": 0},
            {"case": "load", "model": model, "load_ms": load_ms, "loaded_bytes": n},
        ]  # fmt: skip
    curve = [
        {"page_bytes": page, "full_loaded_bytes": 8 * 10**9, "full_plan_ms": 1 + 8 * slow,
         "partial_loaded_bytes": 10**9, "partial_plan_ms": 1 + slow,
         "partial_ms": (start_s + 10**9 / link) * 1e3}
        for page, slow in ((1, 9.0), (64, 0.5))
    ]  # fmt: skip
    return {"sizes": sizes, "cases": cases, "page_bytes": 64, "page_curve": curve}


def test_the_fit_finds_what_the_rows_were_made_from():
    costs = fit(made_up_engine(), n_tokens=7)
    assert costs.link_bytes_per_s == pytest.approx(50e9)
    assert costs.load_start_s == pytest.approx(0.002)
    assert costs.hit_s == pytest.approx(0.0005)
    assert costs.prefill_of("large", 0) == pytest.approx(0.0105)
    assert costs.decode_of("small", 0) == pytest.approx(6 * 0.003)
    assert costs.prefill_of("unknown", 8 * 10**9) == pytest.approx(0.0105)  # by its bytes
    assert costs.plan_line == pytest.approx((0.001, 0.5e-12))  # of pages of the same size
    assert costs.n_tokens == 7


def test_a_fit_needs_hits_and_misses():
    engine = made_up_engine()
    engine["cases"] = [c for c in engine["cases"] if c["case"] == "hit"]
    with pytest.raises(ConfigError, match="got 2 hits and 0 misses"):
        fit(engine)


@pytest.mark.parametrize(
    "wrong",
    [{"link_bytes_per_s": 0}, {"link_bytes_per_s": float("nan")}, {"load_start_s": -1},
     {"prefill_s": {"a": float("inf")}}, {"token_line": (0.0, -1.0)},
     {"plan_line": (-1.0, 0.0)}, {"n_tokens": 0}],
)  # fmt: skip
def test_a_clock_that_cannot_be(wrong):
    with pytest.raises(ConfigError, match="expected"):
        CostModel(**wrong)


# -- the check against measured rows -------------------------------------------------------


@pytest.fixture(scope="module")
def compared():
    return validation.compared()


def test_simulated_and_measured_agree(compared):
    table = validation.errors(compared)
    assert table["bytes_equal"].all()
    for statistic, most in {"p50": 0.02, "mean": 0.02, "max": 0.05}.items():
        missed = table.index[table[f"{statistic}_error"].abs() > most]
        # There the first load of mistral-7b was slow in every repeat, or the machine was shared.
        slow = ["paper-25-djinn-20261127T1758", "paper-32-djinn-20261125T2256"]
        slow = (slow if statistic == "max" else []) + ["zipf-25-djinn-20261128T00104"]
        assert [name[:28] for name in sorted(missed)] == slow, statistic
    assert (table["n"] >= 6).all()
    assert any(name.startswith("paper-32-djinn-2") for name in table.index)  # measured again
    assert "zipf-25-djinn_adaptive" in table.index  # of which the bytes are not those of LRU


def test_disagreement_shows():
    requests = validation.compared()
    wrong = requests.assign(measured_bytes=requests["measured_bytes"] + 1,
                            measured_ms=requests["measured_ms"] * 2)  # fmt: skip
    table = validation.errors(wrong)
    assert not table["bytes_equal"].any()
    assert table["max_error"].abs().min() > 0.4


def test_without_measured_rows_there_is_nothing_to_compare(tmp_path):
    assert validation.compared(tmp_path).empty


def test_other_policies_are_predicted_for_a_measured_cell():
    table = validation.predicted_policies()
    measured = read_rows(REFERENCE / "requests" / "zipf-25-djinn.parquet")
    loaded = measured.groupby("repeat")["loaded_bytes"].sum() / 2**30
    assert set(loaded) == {table["loaded (GiB)"]["lru"]}  # the policy that was measured
    assert table["mean (ms)"]["lru"] == pytest.approx(measured["total_ms"].mean(), rel=0.05)
    to_optimum = table["bytes / optimum (x)"]
    assert to_optimum["oracle"] == 1 == to_optimum.min()
    assert to_optimum["adaptive"] < to_optimum["lru"]  # requests are independent
    adaptive = read_rows(REFERENCE / "requests" / "zipf-25-djinn_adaptive.parquet")
    loaded = adaptive.groupby("repeat")["loaded_bytes"].sum() / 2**30
    assert set(loaded) == {table["loaded (GiB)"]["adaptive"]}
    with pytest.raises(RecordError):
        validation.predicted_policies(cell="zipf-25-nobody")


# -- the study -----------------------------------------------------------------------------


def test_a_point_holds_together():
    best = run_point(Point(10, "sessions", 1.0, 0.5, "oracle", 400))
    assert best["ratio"] == 1.0 and best["loaded_bytes"] == best["optimal_bytes"]
    for policy in ("lru", "adaptive", WHOLE_LRU, KNOWN):
        point = run_point(Point(10, "sessions", 1.0, 0.5, policy, 400))
        assert point["ratio"] > 1 and point["optimal_bytes"] == best["optimal_bytes"]
        assert point["mean_switch_ms"] >= best["mean_switch_ms"]
        assert point["p99_ms"] >= point["p50_ms"] > 0
    with pytest.raises(ConfigError, match=r"a policy out of.*'fifo'"):
        run_point(Point(3, "sessions", 1.0, 0.5, "fifo", 10))


def test_grids_leave_out_capacities_that_come_out_the_same():
    shares = {p.share for p in Grid((3,), alpha=(0.0,), policy=("lru",)).points()}
    assert min(shares) == 0.05 and 0.1 not in shares  # both are the largest model
    assert len(SMALL.points()) == len(set(SMALL.points()))


def sequential(rows: pd.DataFrame) -> pd.DataFrame:
    own = rows[rows["mode"] == "sequential"]
    return own.sort_values(["traffic", "share", "policy"], ignore_index=True)


def test_the_study_on_a_cluster_is_the_same_in_whatever_order_jobs_end(monkeypatch):
    def backwards(jobs):
        for job in reversed(jobs):
            function, arguments = pickle.loads(pickle.dumps((job.function, job.arguments)))
            yield job, Result(function(*arguments))

    monkeypatch.setattr(study, "fan_out", backwards)
    monkeypatch.setattr(study, "CHUNK", 3)
    few = POINTS[::6]
    assert len(few) > 3
    pd.testing.assert_frame_equal(sequential(run_study(few, "ray")), sequential(run_study(few)))


def test_a_point_that_fails_on_ray_is_named(monkeypatch):
    def one_fails(jobs):
        for i, job in enumerate(jobs):
            yield job, Result(error="ConfigError: no such policy") if i else Result([{}])

    monkeypatch.setattr(study, "fan_out", one_fails)
    monkeypatch.setattr(study, "CHUNK", 1)
    with pytest.raises(DjinnError, match="points 1 to 1 of the study failed: ConfigError"):
        run_study([QUEUED[0], QUEUED[1]], "ray")


def test_the_kept_study_can_be_computed_again(reference):
    chosen = reference.iloc[:: len(reference) // 8]
    for row in chosen.to_dict("records"):
        if row["n_models"] == 1000:
            continue
        point = Point(**{name: row[name] for name in Point.__dataclass_fields__})
        assert run_point(point)["loaded_bytes"] == row["loaded_bytes"]


def test_figures(small, reference, compared):
    scale = json.loads((STUDY / "scale.json").read_text())
    for figure in (
        plot_study.distance_to_optimum(small),
        plot_study.latencies_under_load(small),
        plot_study.capacity_that_suffices(reference),
        plot_study.measured_and_simulated(compared),
        plot_study.growth(scale),
    ):
        assert all(axes.has_data() for axes in figure.axes)
    said = plot_study.measured_and_simulated(compared).get_supxlabel()
    assert f"n = {len(compared):,} requests of {compared['source'].nunique()} cells" in said
    sequential = small[small["mode"] == "sequential"]
    with pytest.raises(RecordError, match="latencies under load"):
        plot_study.latencies_under_load(sequential)


def test_the_command_keeps_points_and_manifest(tmp_path, monkeypatch, capsys):
    tiny = Grid((3,), alpha=(1.0,), share=(0.5,), policy=("lru",), n_requests=50)
    monkeypatch.setattr(study, "GRIDS", {"small": tiny, "full": tiny})
    monkeypatch.setattr(study, "QUEUED", ())
    assert djinn("study", "--grid", "small", "--out", tmp_path / "out") == 0
    assert len(pd.read_parquet(tmp_path / "out" / "points.parquet")) == 2
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["grid"]["n_requests"] == 50 and manifest["versions"]["python"]
    (tmp_path / "file").write_text("")
    assert djinn("study", "--grid", "small", "--out", tmp_path / "file") == 2
    assert "error: expected a folder" in capsys.readouterr().err


# -- the explorer --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "traffic"), zip(explore.CHOICES, itertools.cycle(explore.TRAFFIC), strict=False)
)
def test_every_choice_of_the_explorer_has_a_picture(policy, traffic):
    figure = explore.picture(14.0, 3, 1.0, 54.0, policy, traffic)
    assert all(axes.has_data() for axes in figure.axes)
    assert any("of the optimum" in axes.get_title("left") for axes in figure.axes)
    (line,) = figure.axes[0].lines
    assert set(line.get_ydata()) == {14.0}  # the ring is as large as was chosen


def test_what_cannot_be_drawn_is_refused_with_what_to_choose():
    with pytest.raises(ConfigError, match=r"ring of 6 GiB is smaller than .* at least 13\.5 GiB"):
        explore.picture(6.0)
    with pytest.raises(ConfigError, match="for 3 models, and 5 were chosen"):
        explore.picture(25.0, 5)
    with pytest.raises(ConfigError, match="expected traffic out of"):
        explore.picture(traffic="none")


def sliders_of(box) -> dict:
    """The controls by their description."""
    *rows, _keep, _canvas = box.children
    return {control.description: control for row in rows for control in row.children}


@pytest.mark.slow
def test_the_explorer_redraws_and_keeps(tmp_path, monkeypatch):
    drawn, real = [], explore.picture
    monkeypatch.setattr(explore, "picture", lambda **how: drawn.append(how) or real(**how))
    box = explore.explorer(tmp_path / "kept")
    sliders, (keep, kept), canvas = sliders_of(box), box.children[-2].children, box.children[-1]
    assert len(sliders) == 6
    assert drawn == [{"capacity_gib": 25, "n_models": 3, "alpha": 1.0, "link_gb_per_s": 54,
                      "policy": "lru", "traffic": explore.TRAFFIC[0]}]  # fmt: skip
    rows = box.children[:-2]
    assert {row.layout.flex_flow for row in rows} == {"row wrap"}  # narrow windows show them all
    first = bytes(canvas.value)
    assert first.startswith(b"\x89PNG")
    sliders["capacity (GiB)"].value = 30
    assert bytes(canvas.value).startswith(b"\x89PNG") and bytes(canvas.value) != first
    assert [how["capacity_gib"] for how in drawn[1:]] == [30]
    assert not (tmp_path / "kept").exists()
    keep.click()
    assert (tmp_path / "kept" / "explore.png").stat().st_size > 10_000
    assert str(tmp_path / "kept" / "explore.png") in kept.value


def test_the_explorer_can_be_executed_without_a_screen(tmp_path):
    """To an Output widget the executing client answers, and may then miss the kernel's reply."""
    box = explore.explorer(tmp_path)
    waiting, kinds = [box], set()
    while waiting:
        widget = waiting.pop()
        kinds.add(type(widget).__name__)
        waiting += getattr(widget, "children", ())
    assert "Image" in kinds and "Output" not in kinds
