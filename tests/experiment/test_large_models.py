"""Models larger than the ring, beside accelerate's offloading: the same tokens, honest accounts."""

import json
import re

import pandas as pd
import pytest
from profile_factory import tiny_profile
from row_factory import cell_rows
from tiny import CONFIGS, PROMPT, spec

from djinn_lib.analysis.plots import large_models as plot_large
from djinn_lib.analysis.plots import switches as plot_switches
from djinn_lib.engine.models.packing import pack
from djinn_lib.engine.models.sources import open_source
from djinn_lib.errors import ConfigError, RecordError
from djinn_lib.experiment import large_models
from djinn_lib.experiment.bench import set_up
from djinn_lib.experiment.large_models import LargeCase, measure
from djinn_lib.experiment.large_results import (
    COLUMNS,
    MANIFEST,
    ROWS,
    profile_of,
    read_large,
)

N_BYTES = pack(open_source(spec("llama")).module)[0].n_bytes


@pytest.fixture(scope="module")
def rows():
    cases = [
        LargeCase("llama", spec("llama"), "float32", int(N_BYTES * 0.7), resident=True),
        LargeCase("phi", spec("phi"), "float32", 250 << 10, resident=False),  # nothing stays
    ]
    measured = [measure(case, "cpu", "4KiB", PROMPT, 5, 2) for case in cases]
    return pd.concat(measured, ignore_index=True)


def test_all_systems_give_the_same_tokens(rows):
    assert rows.ok.all() and (rows.n_tokens == 5).all()
    assert (rows.groupby("model").token_sha.nunique() == 1).all()
    assert set(rows[rows.model == "llama"].system) == {"resident", "djinn", "accelerate"}


def test_what_does_not_stay_is_brought_in_for_every_token(rows):
    llama = rows[rows.model == "llama"].groupby("system").loaded_bytes_per_token.median()
    assert llama.resident == 0
    missing = N_BYTES - int(N_BYTES * 0.7)
    assert missing <= llama.djinn < N_BYTES
    assert missing <= llama.accelerate < N_BYTES


def test_a_system_that_fails_has_a_row_that_says_why(monkeypatch):
    def run_out(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr(large_models, "offload", run_out)
    case = LargeCase("llama", spec("llama"), "float32", int(N_BYTES * 0.7), resident=False)
    rows = measure(case, "cpu", "4KiB", PROMPT, 3, 1)
    failed = rows[rows.system == "accelerate"].iloc[0]
    assert (failed.ok, failed.error) == (False, "MemoryError: no room")
    assert rows[rows.system == "djinn"].ok.all()
    figure = plot_large.time_per_token(rows)
    assert "no room" in figure.get_supxlabel()


@pytest.mark.slow
def test_the_cases_of_a_profile_are_run_and_kept(tmp_path):
    own = {**CONFIGS["phi"].to_dict(), "model_type": "phi"}
    large = {
        "shared": {"model": "llama", "capacity": "80/100"},
        "own": {"config": own, "capacity": "60/100", "seed": 3},
    }
    profile = tiny_profile(large=large)
    bench = set_up(profile, tmp_path / "run", tmp_path / "models", progress=lambda step: None)
    rows = large_models.rows_of(bench, 3, 1)
    assert rows.ok.all(), rows.error.tolist()
    assert set(rows.model) == {"shared", "own"}
    pd.testing.assert_frame_equal(read_large(tmp_path / "run"), rows)
    again = large_models.rows_of(bench, 3, 1, False)
    pd.testing.assert_frame_equal(again, rows)
    manifest = json.loads((tmp_path / "run" / MANIFEST).read_text())
    assert profile_of(tmp_path / "run") == bench.profile.name
    assert (
        manifest["parameters"]["n_tokens"] == 3 and len(manifest["weights_sha256"]["llama"]) == 64
    )
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        large_models.rows_of(bench, 1, 1)


def test_rows_that_are_not_there_or_of_another_form_are_refused(rows, tmp_path):
    with pytest.raises(RecordError, match="run notebook 07_large_models first"):
        read_large(tmp_path)
    with pytest.raises(RecordError, match="run notebook 07_large_models again"):
        profile_of(tmp_path)
    rows.drop(columns=COLUMNS[-1]).to_parquet(tmp_path / ROWS)
    with pytest.raises(RecordError, match="got none named \\['error'\\]"):
        read_large(tmp_path)


def test_figures_of_large_models_and_of_waiting_requests(rows):
    figure = plot_large.time_per_token(rows)
    assert len(figure.axes) == 2
    assert re.match(r"n = \d+ requests of \d+ tokens for each bar", figure.get_supxlabel())
    with pytest.raises(RecordError, match="models larger than the ring"):
        plot_large.time_per_token(rows.iloc[:0])
    alone = cell_rows("djinn")
    waiting = alone.assign(mode="concurrent", queue_ms=5.0)
    left, right = plot_switches.switches_beside_waiting(waiting, alone).axes
    assert left.lines[0].get_ydata()[-1] == right.lines[0].get_ydata()[-1] == 100.0
    assert len(left.lines[0].get_ydata()) == 28  # three first touches are left out
    longer = plot_switches.switches_on_a_longer_trace(alone)
    assert [len(axes.lines[0].get_ydata()) for axes in longer.axes] == [28, 31]
    for empty in (
        plot_switches.switches_beside_waiting(waiting.iloc[:0], alone),
        plot_switches.switches_on_a_longer_trace(alone.iloc[:0]),
    ):
        (axes,) = empty.axes
        assert axes.texts and not axes.lines
