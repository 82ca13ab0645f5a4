import gc

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from djinn_lib.engine.memory.devices import host
from djinn_lib.engine.memory.layout import ALIGNMENT_BYTES, Layout
from djinn_lib.engine.memory.masters import HostMasters
from djinn_lib.errors import CapacityError, ConfigError

TENSORS = st.lists(
    st.tuples(
        st.lists(st.integers(1, 9), max_size=3).map(tuple),
        st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    ),
    min_size=1,
    max_size=12,
)


@given(TENSORS, TENSORS)
def test_slots_are_aligned_in_order_and_tables_lie_behind_what_is_paged(tensors, tables):
    named = [(f"t{i}", *tensor) for i, tensor in enumerate(tensors)]
    behind = [(f"table{i}", *tensor) for i, tensor in enumerate(tables)]
    layout, paged = Layout.pack(named, behind), Layout.pack(named)
    end = 0
    for slot in layout.slots:
        assert slot.offset % ALIGNMENT_BYTES == 0
        assert end <= slot.offset < end + ALIGNMENT_BYTES
        end = slot.end
    assert layout.n_bytes == end
    assert layout.paged_bytes == paged.n_bytes == paged.paged_bytes < layout.n_bytes
    packed = torch.zeros(layout.n_bytes, dtype=torch.uint8)
    views = layout.views(packed)
    for i, view in enumerate(views.values(), start=1):
        view.fill_(i)
    for i, (name, shape, dtype) in enumerate(named + behind, start=1):
        assert (views[name].shape, views[name].dtype) == (torch.Size(shape), dtype)
        assert bool((views[name] == i).all())
    assert (layout.paged_views(packed) | layout.table_views(packed)).keys() == views.keys()
    assert [*layout.table_views(packed)] == [name for name, *_ in behind]


def test_tables_are_those_of_the_master():
    pool = HostMasters()
    layout = Layout.pack([("w", (10,), torch.uint8)], [("t", (3, 4), torch.float32)])
    pool.add("m", layout, lambda views: (views["w"].fill_(1), views["t"].fill_(2.0)))
    (table,) = pool.tables("m", torch.device("cpu")).values()
    assert table.tolist() == [[2.0] * 4] * 3
    assert table.data_ptr() == pool.master("m").data_ptr() + ALIGNMENT_BYTES
    pool.add("none", layout_of(10), lambda views: None)
    assert pool.tables("none", torch.device("cpu")) == {}


def layout_of(n_bytes):
    return Layout.pack([("w", (n_bytes,), torch.uint8)])


def test_host_memory_is_given_back():
    process, pool = psutil.Process(), HostMasters()
    before = process.memory_info().rss
    for i in range(4):
        pool.add(f"m{i}", layout_of(32 << 20), lambda views: views["w"].fill_(1))
    assert process.memory_info().rss - before > 100 << 20
    for i in range(4):
        pool.discard(f"m{i}")
    gc.collect()
    assert process.memory_info().rss - before < 20 << 20


def test_a_fill_that_fails_leaves_nothing_behind():
    pool = HostMasters()

    def broken(views):
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        pool.add("a", layout_of(10), broken)
    assert pool.n_bytes == 0
    pool.add("a", layout_of(10), lambda views: views["w"].fill_(3))
    assert pool.master("a").tolist() == [3] * 10


def test_hash_tells_two_masters_apart():
    pool = HostMasters()
    for name, value in (("a", 1), ("b", 1), ("c", 2)):
        pool.add(name, layout_of(100), lambda views, value=value: views["w"].fill_(value))
    assert pool.sha256("a") == pool.sha256("b") != pool.sha256("c")
    assert pool.n_bytes == 300


def test_bad_input_is_refused():
    pool = HostMasters()
    pool.add("a", layout_of(10), lambda views: None)
    with pytest.raises(ConfigError, match="added before"):
        pool.add("a", layout_of(10), lambda views: None)
    with pytest.raises(ConfigError, match="with weights"):
        pool.add("b", Layout(()), lambda views: None)
    with pytest.raises(CapacityError, match="host memory"):
        pool.add("c", layout_of(1 << 60), lambda views: None)
    pool.discard("nobody")
    assert pool.layout("a").n_bytes == 10


def test_memory_that_cannot_be_pinned_is_an_error_and_nothing_stays(monkeypatch):
    class Runtime:
        def cudaHostRegister(self, address, n_bytes, flags):
            return 2

    monkeypatch.setattr(host, "_cudart", Runtime)
    pool = HostMasters(pin=True)
    with pytest.raises(CapacityError, match=r"host memory that can be pinned, got CUDA error 2"):
        pool.add("m", Layout.pack([("w", (10,), torch.float32)]), lambda views: None)
    assert pool.n_bytes == 0
    pool.close()


def test_more_than_the_host_has_is_refused_before_it_is_touched(monkeypatch):
    monkeypatch.setattr(host, "host_bytes_available", lambda: 100)
    filled = []
    pool = HostMasters()
    with pytest.raises(CapacityError, match=r"expected 400 B of host memory.*got 100 B available"):
        pool.add("m", Layout.pack([("w", (100,), torch.float32)]), filled.append)
    assert not filled and pool.n_bytes == 0
