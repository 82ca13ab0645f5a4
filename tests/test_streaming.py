"""Models larger than the ring: the window's arithmetic, and the bytes that each layer sees."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pager import CPU, PAGE, Flaky
from tiny import CONFIGS, PROMPT, ordinary_tokens, spec

import djinn_lib as dj
from djinn_lib import copier
from djinn_lib.errors import CapacityError, DjinnError
from djinn_lib.models import pack
from djinn_lib.pager import Pager
from djinn_lib.sources import open_source
from djinn_lib.streaming import Rotation, Window
from djinn_lib.swap_pool import Layout, SwapPool

ENDS = st.lists(st.integers(1, 5 * 64), min_size=1, max_size=12).map(
    lambda sizes: [sum(sizes[: i + 1]) for i in range(len(sizes))]
)


@given(ENDS, st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_a_window_holds_two_units_in_a_row(ends, n_frames):
    page_bytes = 64
    try:
        window = Window.plan(ends, n_frames, page_bytes)
    except CapacityError:
        spans = [
            -(-after // page_bytes) - before // page_bytes
            for before, after in zip([0, *ends], [*ends[1:], ends[-1]], strict=False)
        ]
        assert max(spans) > n_frames
        return
    assert window.n_frames == n_frames
    for end in ends:
        first, last = window.pages_of(end)
        assert 0 <= first < last <= window.n_pages
        assert last - first <= window.n_slots


@given(ENDS, st.integers(1, 30), st.lists(st.integers(0, 11), min_size=1, max_size=60))
@settings(max_examples=200, deadline=None)
def test_every_unit_finds_its_pages_whatever_the_order(ends, n_frames, order):
    """What is in each slot is simulated; a unit must see its own pages, all at once."""
    try:
        window = Window.plan(ends, n_frames, 64)
    except CapacityError:
        return
    if window.n_tail < 1:
        return
    rotation, slots = Rotation(window.n_tail, window.n_slots), {}
    for index in order:
        first, last = window.pages_of(ends[index % len(ends)])
        needed = range(max(first - window.n_prefix, 0), max(last - window.n_prefix, 0))
        if needed:
            rotation.need(needed[0], needed[-1] + 1)
        while (position := rotation.take()) is not None:
            page = position % window.n_tail
            slots[page % window.n_slots] = page
        rotation.check()
        for page in needed:
            assert slots[page % window.n_slots] == page


def test_in_order_each_pass_copies_the_rest_once():
    rotation, copied = Rotation(n_tail=10, n_slots=4), []
    for _ in range(3):
        for first in range(0, 10, 2):
            rotation.need(first, first + 2)
            while (position := rotation.take()) is not None:
                copied.append(position % 10)
    assert copied[:30] == list(range(10)) * 3
    assert len(copied) <= 30 + 4


def test_homes_of_slots():
    window = Window.plan([64 * n for n in range(1, 11)], 5, 64)  # ten units of one page
    assert (window.n_slots, window.n_prefix, window.n_tail) == (2, 3, 7)
    assert window.homes(0, 2) == [(3, 2), (5, 2), (7, 2), (9, 1)]
    assert window.homes(1, 1) == [(4, 1), (6, 1), (8, 1)]


@pytest.fixture
def large():
    """A pager of 8 frames, a model of 20 pages in units of 2, and one of 4 pages."""
    pool, sizes = SwapPool(), {"large": 20 * PAGE - 5, "small": 4 * PAGE}
    generator = torch.Generator().manual_seed(0)
    for name, n_bytes in sizes.items():
        layout = Layout.pack([("w", (n_bytes,), torch.uint8)])
        pool.add(name, layout, lambda views: views["w"].random_(0, 256, generator=generator))
    pager = Pager(pool, 8 * PAGE, PAGE, CPU)
    ends = [min(2 * PAGE * i, sizes["large"]) for i in range(1, 11)]
    views = {"large": pager.add("large", sizes["large"], ends)}
    views["small"] = pager.add("small", sizes["small"])
    yield pager, pool, views, ends
    pager.close()


def forward(pager, pool, views, ends):
    """Read every unit as it becomes ready, as a forward pass does."""
    begin = 0
    for end in ends:
        pager.wait("large", end)
        assert torch.equal(views["large"][begin:end], pool.master("large")[begin:end])
        begin = end


def test_layers_take_turns_and_smaller_models_come_between(large):
    pager, pool, views, ends = large
    assert pager.is_streamed("large") and not pager.is_streamed("small")
    for _ in range(3):
        with pager.lease("large") as lease:
            pager.finish("large")
            for _ in range(3):
                forward(pager, pool, views, ends)
        assert lease.loaded_bytes >= 3 * 15 * PAGE  # 4 of 20 pages stay, and some come ahead
        assert pager.resident_bytes("large") == 4 * PAGE
        with pager.lease("small") as lease:
            pager.wait("small", 4 * PAGE)
            assert torch.equal(views["small"], pool.master("small"))
        pager.check()
        assert pager.resident_bytes("large") == 4 * PAGE  # only the window went
        pager.evict("small")


def test_a_pass_copies_only_what_does_not_stay(large):
    pager, pool, views, ends = large
    with pager.lease("large") as lease:
        forward(pager, pool, views, ends)
        first = lease.loaded_bytes
        for _ in range(4):
            forward(pager, pool, views, ends)
        assert lease.loaded_bytes - first == 4 * (16 * PAGE - 5)


def test_a_copy_that_fails_in_mid_pass_can_be_repeated(large, monkeypatch):
    pager, pool, views, ends = large
    flaky = Flaky(monkeypatch)
    with pager.lease("large"):
        forward(pager, pool, views, ends)
        flaky.n_copied, flaky.fail_at = 0, 7
        with pytest.raises(DjinnError, match="try the request again") as caught:
            forward(pager, pool, views, ends)
        assert isinstance(caught.value.__cause__, OSError)
        forward(pager, pool, views, ends)
    pager.check()


def test_two_layers_that_do_not_fit_are_refused(large):
    pager, *_ = large
    with pytest.raises(CapacityError, match="two largest layers in a row"):
        pager.add("huge", 30 * PAGE, [5 * PAGE, 14 * PAGE, 30 * PAGE])
    assert "huge" not in pager.ring.models


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_of_a_model_larger_than_the_ring(tmp_path, name):
    """Every architecture, tied weights included, beside one that fits."""
    for n in {name, "llama"}:
        spec(n).build().save_pretrained(tmp_path / n)
    n_bytes = pack(open_source(spec(name)).module, "host")[0].paged_bytes
    with dj.Djinn(int(n_bytes * 0.8), "cpu", "4KiB", decode="graph", max_model_len=64) as djinn:
        djinn.add("large", tmp_path / name)
        assert djinn.set_decode("large", "graph") == "eager"
        for _ in range(2):
            g = djinn.generate("large", PROMPT, 12, ignore_eos=True)
            assert g.token_ids == ordinary_tokens(tmp_path / name, 12)
            assert g.loaded_bytes > n_bytes
            assert djinn.generate("large", PROMPT, 12, ignore_eos=True).token_ids == g.token_ids
            djinn.check()
            djinn.evict("large")


def test_larger_and_smaller_models_in_turns(tmp_path):
    for n in ("llama", "phi"):
        spec(n).build().save_pretrained(tmp_path / n)
    expected = {n: ordinary_tokens(tmp_path / n, 8) for n in ("llama", "phi")}
    sizes = {n: sum(p.numel() * 4 for p in spec(n).build().parameters()) for n in expected}
    assert sizes["llama"] > sizes["phi"]
    with dj.Djinn((sizes["llama"] + sizes["phi"]) // 2, "cpu", "4KiB") as djinn:
        for n in expected:
            djinn.add(n, tmp_path / n)
        for n in ("llama", "phi", "llama", "llama", "phi", "phi", "llama"):
            assert djinn.generate(n, PROMPT, 8, ignore_eos=True).token_ids == expected[n]
            djinn.check()


def test_what_layers_wait_for_after_the_first_token_is_part_of_decoding(tmp_path, monkeypatch):
    """Every token waits for copies; a switch is what the first one waits for."""
    spec("llama").build().save_pretrained(tmp_path / "llama")
    real = copier.copy_page

    def slow(target, source):
        time.sleep(0.002)
        real(target, source)

    with dj.Djinn("280KiB", "cpu", "4KiB") as djinn:
        djinn.add("m", tmp_path / "llama")
        monkeypatch.setattr(copier, "copy_page", slow)
        g = djinn.generate("m", PROMPT, 4, ignore_eos=True)
        one = djinn.generate("m", PROMPT, 1, ignore_eos=True)
    assert 50 < g.switch_ms <= g.ttft_ms
    assert g.decode_ms > 50 and g.stall_ms > g.switch_ms + 50
    assert g.switch_ms + g.decode_ms <= g.total_ms
    assert one.stall_ms <= one.switch_ms <= one.total_ms
