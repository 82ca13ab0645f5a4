"""Pictures and tables of a running ring."""

from __future__ import annotations

import matplotlib.colors as mcolors
import pytest
from matplotlib.patches import FancyBboxPatch

import djinn_lib as dj
from djinn_lib.analysis.plots.style import model_colors
from djinn_lib.analysis.ring_view import (
    contents_of,
    costs_table,
    moves_table,
    ring_moments,
    small_llama,
)
from djinn_lib.errors import RecordError

BEFORE = {"chat": (0, 1, 2), "code": ()}
AFTER = {"chat": (0,), "code": (3, 1, 2)}


def test_a_frame_holds_the_page_that_the_page_table_says():
    assert contents_of(AFTER, 5) == [("chat", 0), ("code", 1), ("code", 2), ("code", 0), None]


def test_a_frame_that_the_ring_lacks_is_refused():
    with pytest.raises(RecordError, match=r"page 2 of 'chat' is in frame 2, but the ring has 2"):
        contents_of(BEFORE, 2)
    with pytest.raises(RecordError, match="no moment to draw"):
        ring_moments({}, 5)


def test_frames_have_their_model_s_colour_and_what_changed_an_edge():
    left, right = ring_moments({"before": BEFORE, "after": AFTER}, 5).axes
    colors = model_colors(BEFORE)
    frames = [patch for patch in right.patches if isinstance(patch, FancyBboxPatch)]
    faces = [mcolors.to_hex(patch.get_facecolor()) for patch in frames]
    owners = ["chat", "code", "code", "code"]
    assert [face.lower() for face in faces[:4]] == [colors[name].lower() for name in owners]
    assert [bool(patch.get_edgecolor()[3]) for patch in frames] == [False, True, True, True, False]
    assert not any(p.get_edgecolor()[3] for p in left.patches)  # nothing was drawn before it
    assert [text.get_text() for text in right.texts] == ["0", "1", "2", "0"]
    assert [axes.get_title("left") for axes in (left, right)] == ["before", "after"]


def test_pages_that_moved_are_counted():
    table = moves_table(BEFORE, AFTER)
    assert table.loc["chat"].to_dict() == {"stayed": 1, "loaded": 0, "evicted": 2}
    assert table.loc["code"].to_dict() == {"stayed": 0, "loaded": 3, "evicted": 0}


def test_a_running_ring_can_be_drawn_and_its_costs_add_up():
    with dj.Djinn("12MiB", device="cpu", page="1MiB") as djinn:
        djinn.add("a", dj.ModelSpec(small_llama(n_layers=3), seed=1))
        djinn.add("b", dj.ModelSpec(small_llama(n_layers=2), seed=2))
        empty = djinn.stats().frames
        served = [(name, djinn.generate(name, [1, 2], max_new_tokens=1)) for name in "aab"]
        after = djinn.stats().frames
        costs, moves = costs_table(served), moves_table(empty, after)
        sizes = djinn.residency().set_index("model")["bytes"] / 2**20
    assert costs["loaded (MiB)"].tolist() == [sizes["a"].round(1), 0.0, sizes["b"].round(1)]
    assert costs["found (MiB)"].tolist() == [0.0, sizes["a"].round(1), 0.0]
    assert costs.loc[3, "evicted from others (MiB)"] > 0
    assert moves["loaded"].sum() == sum(map(len, after.values())) <= 12
    assert ring_moments({"now": after}, 12).axes
