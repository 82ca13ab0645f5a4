"""Models larger than the ring: the window's arithmetic, and the bytes that each layer sees."""

import time

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from naive_window import frames_by_prefix, merged, one_after_another, pages_of
from test_pager import CPU, PAGE
from tiny import CONFIGS, PROMPT, ordinary_tokens, saved, spec
from weights import FORMS, fill_with, in_form, layout_of, weights_of

import djinn_lib as dj
from djinn_lib.engine.memory.devices import base
from djinn_lib.engine.memory.masters import HostMasters
from djinn_lib.engine.memory.pager import Pager
from djinn_lib.engine.memory.window import Rotation, Window
from djinn_lib.engine.models.packing import pack
from djinn_lib.engine.models.sources import open_source
from djinn_lib.errors import CapacityError, ConfigError
from djinn_lib.units import format_bytes

PAGE_BYTES = 64
SIZES = st.lists(st.integers(1, 5 * PAGE_BYTES), min_size=1, max_size=12)


@st.composite
def units(draw):
    """Units that own bytes and read some of the shared parts before them; some read only those."""
    shared = [draw(st.integers(1, 3 * PAGE_BYTES)) for _ in range(draw(st.integers(0, 3)))]
    parts = [part for (part,) in one_after_another(shared)]
    own = [part for (part,) in one_after_another(draw(SIZES), sum(shared))]
    reads = st.sets(st.sampled_from(parts)) if parts else st.just(set())
    found = [merged([*sorted(draw(reads)), part]) for part in own]
    for part in parts:
        found.insert(draw(st.integers(0, len(found))), (part,))
    return found


def planned(units, n_frames):
    """A window, or None where what has to be there at once does not fit; looked for naively."""
    n_bytes = max(unit[-1][1] for unit in units)
    assume(n_frames < -(-n_bytes // PAGE_BYTES))
    needed = frames_by_prefix(units, PAGE_BYTES)
    possible = [n_prefix for n_prefix, n in needed.items() if n <= n_frames]
    try:
        window = Window.plan(n_bytes, units, n_frames, PAGE_BYTES)
    except CapacityError as error:
        assert not possible
        least = format_bytes(min(needed.values()) * PAGE_BYTES)
        assert f"share, {least}, got" in str(error)
        return None
    assert window.n_prefix == max(possible)
    return window


@given(units(), st.integers(1, 40))
def test_a_window_holds_two_units_in_a_row_and_what_units_share(units, n_frames):
    if (window := planned(units, n_frames)) is None:
        return
    assert window.n_frames == n_frames
    for unit in units:
        turn = window.turn(unit)
        beyond = {p - window.n_prefix for p in pages_of(unit, PAGE_BYTES) if p >= window.n_prefix}
        assert (turn is None) == (not beyond)
        if turn:
            assert beyond <= set(range(*turn)) <= set(range(window.n_tail))
            assert turn[1] - turn[0] <= window.n_slots


@given(units(), st.integers(1, 30), st.lists(st.integers(0, 14), min_size=1, max_size=60))
def test_every_unit_finds_its_pages_whatever_the_order(units, n_frames, order):
    """What is in each frame is simulated; a unit must see all of its pages at once."""
    if (window := planned(units, n_frames)) is None:
        return
    rotation, slots = Rotation(window.n_tail, window.n_slots), {}
    for index in order:
        unit = units[index % len(units)]
        if turn := window.turn(unit):
            rotation.need(*turn)
        while (position := rotation.take()) is not None:
            page = position % window.n_tail
            slots[page % window.n_slots] = page
        rotation.check()
        for page in pages_of(unit, PAGE_BYTES):
            rest = page - window.n_prefix
            assert rest < 0 or slots[rest % window.n_slots] == rest


def test_more_than_was_planned_for_is_refused():
    window = Window.plan(10 * PAGE_BYTES, one_after_another([PAGE_BYTES] * 10), 5, PAGE_BYTES)
    with pytest.raises(ConfigError, match="within 2 pages, as the window has, got 4"):
        window.turn(((4 * PAGE_BYTES, 8 * PAGE_BYTES),))
    assert window.turn(((0, 3 * PAGE_BYTES),)) is None


def test_what_layers_share_takes_its_place_beside_two_of_them():
    own = one_after_another([2 * PAGE_BYTES] * 5, 3 * PAGE_BYTES)
    units = [((0, 3 * PAGE_BYTES), *unit) for unit in own]
    window = Window.plan(13 * PAGE_BYTES, units, 8, PAGE_BYTES)
    assert (window.n_prefix, window.n_slots) == (4, 4)
    assert window.turn(units[2]) == (3, 5)  # its own pages; the shared ones stay
    with pytest.raises(CapacityError, match=r"what layers share, 448 B, got a ring of 384 B"):
        Window.plan(13 * PAGE_BYTES, units, 6, PAGE_BYTES)


def test_homes_of_slots():
    window = Window.plan(10 * PAGE_BYTES, one_after_another([PAGE_BYTES] * 10), 5, PAGE_BYTES)
    assert (window.n_slots, window.n_prefix, window.n_tail) == (2, 3, 7)
    assert window.homes(0, 2) == [(3, 2), (5, 2), (7, 2), (9, 1)]
    assert window.homes(1, 1) == [(4, 1), (6, 1), (8, 1)]


@pytest.fixture(params=FORMS)
def large(request):
    """A pager of 8 frames, a model of 20 pages in units of 2, and one of 4 pages."""
    sizes = {"large": 20 * PAGE - 5, "small": 4 * PAGE}
    pool = in_form(HostMasters(), request.param, PAGE)
    masters = {name: weights_of(n_bytes) for name, n_bytes in sizes.items()}
    for name, n_bytes in sizes.items():
        pool.add(name, layout_of(n_bytes), fill_with(masters[name]))
    pager = Pager(pool, 8 * PAGE, PAGE, CPU)
    units = one_after_another([2 * PAGE] * 9 + [2 * PAGE - 5])
    views = {"large": pager.add("large", sizes["large"], units)}
    views["small"] = pager.add("small", sizes["small"])
    yield pager, masters, views, units
    pager.close()


def forward(pager, masters, views, units):
    """Read every unit as it becomes ready, as a forward pass does."""
    for extents in units:
        pager.wait_for("large", extents)
        for begin, end in extents:
            assert torch.equal(views["large"][begin:end], masters["large"][begin:end])


def test_layers_take_turns_and_smaller_models_come_between(large):
    pager, masters, views, units = large
    assert pager.is_streamed("large") and not pager.is_streamed("small")
    for _ in range(3):
        with pager.lease("large") as lease:
            pager.block_until_loaded("large")
            for _ in range(3):
                forward(pager, masters, views, units)
        assert lease.stats.loaded_bytes >= 3 * 15 * PAGE  # 4 of 20 pages stay, and some come ahead
        assert pager.resident_bytes("large") == 4 * PAGE
        with pager.lease("small") as lease:
            pager.wait("small", 4 * PAGE)
            assert torch.equal(views["small"], masters["small"])
        pager.check()
        assert pager.resident_bytes("large") == 4 * PAGE  # only the window went
        pager.evict("small")


def test_a_pass_copies_only_what_does_not_stay(large):
    pager, masters, views, units = large
    with pager.lease("large") as lease:
        forward(pager, masters, views, units)
        first = lease.stats.loaded_bytes
        for _ in range(4):
            forward(pager, masters, views, units)
        assert lease.stats.loaded_bytes - first == 4 * (16 * PAGE - 5)


FAST = ("mistral-sliding", "qwen2-tied")


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS]
)
def test_tokens_of_a_model_larger_than_the_ring(name):
    n_bytes = pack(open_source(spec(name)).module, "host")[0].paged_bytes
    with dj.Djinn(int(n_bytes * 0.8), "cpu", "4KiB", decode="graph", max_model_len=64) as djinn:
        djinn.add("large", saved(name))
        assert djinn.set_decode("large", "graph") == "eager"
        for _ in range(2):
            g = djinn.generate("large", PROMPT, 12, ignore_eos=True)
            assert g.token_ids == ordinary_tokens(saved(name), 12)
            assert g.loaded_bytes > n_bytes
            assert djinn.generate("large", PROMPT, 12, ignore_eos=True).token_ids == g.token_ids
            djinn.check()
            djinn.evict("large")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zamba", "zamba2"])
def test_blocks_that_several_layers_use(name):
    """Each waits for all of its pages, from the smallest window that is possible to the largest."""
    expected = ordinary_tokens(saved(name), 6)
    units = [unit.extents for unit in pack(spec(name).build(), "host")[1]]
    assert any(len(extents) > 1 for extents in units)
    frames = frames_by_prefix(units, 4096)
    for n_frames in (min(frames.values()), len(frames) - 1):
        with dj.Djinn(n_frames * 4096, "cpu", 4096, decode="eager") as djinn:
            djinn.add("m", saved(name))
            assert "m" in djinn.stats().streamed
            assert djinn.generate("m", PROMPT, 6, ignore_eos=True).token_ids == expected
            djinn.check()


def test_what_layers_wait_for_after_the_first_token_is_part_of_decoding(monkeypatch):
    """Every token waits for copies; a switch is what the first one waits for."""
    real = base.copy_page

    def slow(target, source):
        time.sleep(0.002)
        real(target, source)

    with dj.Djinn("280KiB", "cpu", "4KiB") as djinn:
        djinn.add("m", saved("llama"))
        monkeypatch.setattr(base, "copy_page", slow)
        g = djinn.generate("m", PROMPT, 4, ignore_eos=True)
        one = djinn.generate("m", PROMPT, 1, ignore_eos=True)
    assert 50 < g.switch_ms <= g.ttft_ms
    assert g.decode_ms > 50 and g.stall_ms > g.switch_ms + 50
    assert g.switch_ms + g.decode_ms <= g.total_ms
    assert one.stall_ms <= one.switch_ms <= one.total_ms
