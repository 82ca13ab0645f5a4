"""The pager on real mappings: bytes equal masters after anything that happens."""

import threading
import time

import psutil
import pytest
import torch

from djinn_lib.engine.memory.devices import copier as copier_module
from djinn_lib.engine.memory.masters import Layout, SwapPool
from djinn_lib.engine.memory.pager import Pager
from djinn_lib.engine.memory.policies import Lookahead
from djinn_lib.errors import CapacityError, ConfigError, DjinnError, LeaseError

PAGE = 16 << 10
CPU = torch.device("cpu")


def make_pager(sizes, n_frames, residency="partial"):
    """A pager over models of random bytes; `sizes` in bytes by name."""
    pool = SwapPool()
    generator = torch.Generator().manual_seed(0)
    for name, n_bytes in sizes.items():
        layout = Layout.pack([("w", (n_bytes,), torch.uint8)])
        pool.add(name, layout, lambda views: views["w"].random_(0, 256, generator=generator))
    pager = Pager(pool, n_frames * PAGE, PAGE, CPU, residency=residency)
    views = {name: pager.add(name, n_bytes) for name, n_bytes in sizes.items()}
    return pager, pool, views


@pytest.fixture
def three():
    sizes = {"a": 10 * PAGE - 7, "b": 9 * PAGE, "c": 4 * PAGE + 1}
    pager, pool, views = make_pager(sizes, n_frames=16)
    yield pager, pool, views
    pager.close()


class Flaky:
    """Copies pages, but fails at those it is told to."""

    def __init__(self, monkeypatch):
        self.fail_at, self.n_copied, self.gate = None, 0, threading.Event()
        self.gate.set()
        monkeypatch.setattr(copier_module, "copy_page", self)

    def __call__(self, target, source):
        self.gate.wait(10)
        self.n_copied += 1
        if self.fail_at == self.n_copied:
            raise OSError(5, "Input/output error")
        target.copy_(source)


def test_a_lease_brings_the_bytes(three):
    pager, pool, views = three
    with pager.lease("a") as lease:
        pager.wait("a", 10 * PAGE - 7)
        assert torch.equal(views["a"][: 10 * PAGE - 7], pool.master("a"))
    assert lease.loaded_bytes == 10 * PAGE - 7
    assert (lease.resident_before_bytes, lease.evicted_bytes) == (0, 0)


def test_finish_blocks_until_everything_is_there(three, monkeypatch):
    pager, pool, views = three
    flaky = Flaky(monkeypatch)
    with pager.lease("b"):
        pager.finish("b")
        assert flaky.n_copied == 9
        assert torch.equal(views["b"][: 9 * PAGE], pool.master("b"))
    with pytest.raises(LeaseError):
        pager.finish("b")
    pager.evict("b")
    flaky.n_copied, flaky.fail_at = 0, 4
    with pager.lease("b"), pytest.raises(DjinnError, match="try the request again"):
        pager.finish("b")


def test_a_hit_moves_nothing(three):
    pager, _, _ = three
    for _ in range(2):
        with pager.lease("a") as lease:
            pager.wait("a", 10 * PAGE - 7)
    assert (lease.loaded_bytes, lease.stall_s) == (0, 0.0)


def test_a_victim_keeps_its_prefix(three):
    pager, _, _ = three
    for name, end in (("a", 10 * PAGE - 7), ("b", 9 * PAGE)):
        with pager.lease(name) as lease:
            pager.wait(name, end)
    assert lease.evicted_bytes == 3 * PAGE - 7  # the last page of a is short of 7 bytes
    assert pager.resident_bytes("a") == 7 * PAGE
    with pager.lease("a") as lease:
        pager.wait("a", 7 * PAGE)  # at once: these bytes never left
        assert lease.stall_s == 0.0
        assert lease.loaded_bytes == 3 * PAGE - 7
    pager.check()


def test_the_first_bytes_can_be_used_while_the_rest_loads(three, monkeypatch):
    pager, pool, views = three
    flaky = Flaky(monkeypatch)
    flaky.gate.clear()
    with pager.lease("b") as lease:
        assert lease.loaded_bytes == 9 * PAGE and flaky.n_copied < 9
        copied = threading.Thread(target=lambda: (time.sleep(0.05), flaky.gate.set()))
        copied.start()
        pager.wait("b", 1)
        assert torch.equal(views["b"][:PAGE], pool.master("b")[:PAGE])
        assert lease.stall_s >= 0.04
        copied.join()


def test_whole_residency_evicts_whole_models():
    pager, _, _ = make_pager({"a": 10 * PAGE, "b": 9 * PAGE}, 16, residency="whole")
    for name in "ab":
        with pager.lease(name):
            pager.wait(name, PAGE)
    assert pager.resident_bytes("a") == 0
    pager.close()


def test_leased_pages_are_never_evicted(three):
    pager, _, _ = three
    with pager.lease("a"), pytest.raises(CapacityError, match="leases hold"):
        pager.lease("b")
    with pager.lease("b"):
        pager.wait("b", 9 * PAGE)
    pager.check()


def test_use_without_a_lease_is_refused_instead_of_faulting(three):
    pager, _, _ = three
    with pytest.raises(LeaseError, match="inside `with"):
        pager.wait("a", 1)
    lease = pager.lease("a")
    lease.release()
    lease.release()  # giving back twice is harmless
    with pytest.raises(LeaseError):
        pager.wait("a", 1)


@pytest.mark.parametrize("fail_at", [1, 2, 9])
def test_a_copy_that_fails_is_rolled_back_and_can_be_repeated(three, monkeypatch, fail_at):
    pager, _, _ = three
    flaky = Flaky(monkeypatch)
    flaky.fail_at = fail_at
    with pager.lease("b"), pytest.raises(DjinnError, match="try the request again") as caught:
        pager.wait("b", 9 * PAGE)
    assert isinstance(caught.value.__cause__, OSError)
    assert pager.resident_bytes("b") == (fail_at - 1) * PAGE
    with pager.lease("b") as lease:
        pager.wait("b", 9 * PAGE)
        assert lease.loaded_bytes == (10 - fail_at) * PAGE
    pager.check()


def test_two_leases_share_one_load_and_its_failure(three, monkeypatch):
    pager, _, _ = three
    flaky = Flaky(monkeypatch)
    flaky.gate.clear()
    flaky.fail_at = 3
    first, second = pager.lease("b"), pager.lease("b")
    assert (first.loaded_bytes, second.loaded_bytes) == (9 * PAGE, 0)
    flaky.gate.set()
    for _ in range(2):
        with pytest.raises(DjinnError):
            pager.wait("b", 9 * PAGE)
    first.release()
    with pytest.raises(DjinnError):
        pager.wait("b", 9 * PAGE)  # still: the bytes are not there
    third = pager.lease("b")  # loads again, also for the one that is still waiting
    pager.wait("b", 9 * PAGE)
    second.release()
    third.release()
    pager.check()


def test_an_abandoned_load_ends_before_its_frames_go_to_another(three, monkeypatch):
    pager, pool, views = three
    flaky = Flaky(monkeypatch)
    flaky.gate.clear()
    pager.lease("a").release()  # given up while not one page is there
    threading.Timer(0.05, flaky.gate.set).start()
    with pager.lease("b"):
        pager.wait("b", 9 * PAGE)
        assert torch.equal(views["b"][: 9 * PAGE], pool.master("b"))
    pager.check()


def test_a_map_that_fails_leaves_the_ring_as_it_was(three, monkeypatch):
    pager, _, _ = three

    def refuse(*_):
        raise MemoryError("no mappings")

    monkeypatch.setattr(pager.space, "map", refuse)
    with pytest.raises(MemoryError):
        pager.lease("a")
    monkeypatch.undo()
    assert (pager.resident_bytes("a"), pager.ring.n_free) == (0, 16)
    assert not pager.ring.is_leased("a")
    with pager.lease("a"):
        pager.wait("a", PAGE)
    pager.check()


def test_a_reservation_that_fails_forgets_the_model(three, monkeypatch):
    pager, _, _ = three

    def refuse(*_):
        raise MemoryError("no addresses")

    monkeypatch.setattr(pager.space, "reserve", refuse)
    with pytest.raises(MemoryError):
        pager.add("d", PAGE)
    assert "d" not in pager.ring.models


@pytest.mark.parametrize("step", ["bytes_view", "admit"])
def test_a_model_that_cannot_be_added_leaves_nothing(three, monkeypatch, step):
    pager, _, _ = three

    def refuse(*_):
        raise MemoryError("no")

    n_areas = len(pager.space._areas)
    monkeypatch.setattr(pager.space if step == "bytes_view" else pager.policy, step, refuse)
    with pytest.raises(MemoryError):
        pager.add("d", PAGE)
    monkeypatch.undo()
    assert "d" not in pager.ring and len(pager.space._areas) == n_areas
    pager.add("d", PAGE)
    pager.check()


def test_nothing_changes_when_a_leased_model_is_to_go(three):
    pager, pool, views = three
    with pager.lease("a") as lease:
        pager.finish("a")
        known, frames = vars(pager.policy).copy(), pager.ring.frames("a")
        for refused in (pager.evict, pager.remove):
            with pytest.raises(LeaseError, match="release it first"):
                refused("a")
        assert vars(pager.policy) == known and pager.ring.frames("a") == frames
        pager.wait("a", 10 * PAGE - 7)
        assert torch.equal(views["a"][: 10 * PAGE - 7], pool.master("a"))
    assert lease.loaded_bytes == 10 * PAGE - 7
    pager.remove("a")
    for asked in (pager.resident_bytes, pager.wait_whole, pager.finish, pager.is_streamed):
        with pytest.raises(ConfigError, match="'a': add it first"):
            asked("a")
    with pytest.raises(ConfigError, match="'a': add it first"):
        pager.wait_for("a", ((0, 1),))
    assert not pager.is_resident("a")


def test_a_device_that_fails_while_it_is_waited_for_keeps_ring_and_mappings_in_step(three):
    """As CUDA does, once a kernel has failed: then no call to wait for the device succeeds."""
    pager, pool, views = three

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pager.lease("a"):
        pager.finish("a")
    paged = pager._models["a"]
    paged.note_use(broken)
    for use in (lambda: pager.lease("b"), lambda: pager.evict("a"), lambda: pager.remove("a")):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            use()
        pager.ring.check()
    assert not pager.ring.is_leased("b")
    assert pager.resident_bytes("a") == 7 * PAGE  # what b was to have is gone, and no more
    paged.note_use(lambda: None)
    pager.check()
    with pager.lease("b"):
        pager.finish("b")
        assert torch.equal(views["b"][: 9 * PAGE], pool.master("b"))


def test_a_lease_ends_whatever_marking_its_end_raises(three, monkeypatch):
    pager, _, _ = three
    lease = pager.lease("a")

    def broken():
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(pager.copier, "fence", broken)
    with pytest.raises(RuntimeError, match="CUDA error"):
        lease.release()
    assert not pager.ring.is_leased("a")


def test_device_memory_is_released_whatever_the_copier_raises():
    pager, _, _ = make_pager({"a": PAGE}, 2)
    n_fds = psutil.Process().num_fds()

    def broken():
        raise RuntimeError("CUDA error")

    close, pager.copier.close = pager.copier.close, broken
    with pytest.raises(RuntimeError, match="CUDA error"):
        pager.close()
    assert psutil.Process().num_fds() == n_fds - 1
    close()


def test_a_lease_may_end_after_the_pager():
    pager, _, _ = make_pager({"a": PAGE}, 2)
    lease = pager.lease("a")
    pager.close()
    lease.release()
    pager.close()


def test_evict_and_remove(three):
    pager, _, _ = three
    with pager.lease("a"):
        pager.wait("a", PAGE)
        with pytest.raises(LeaseError):
            pager.evict("a")
    assert pager.evict("a") == 10 * PAGE - 7
    assert pager.evict("a") == 0
    pager.remove("a")
    with pytest.raises(ConfigError, match="add it first"):
        pager.lease("a")
    pager.check()


def test_check_finds_a_changed_byte(three):
    pager, _, views = three
    with pager.lease("c"):
        pager.wait("c", 4 * PAGE + 1)
    views["c"][1234] ^= 1
    with pytest.raises(AssertionError, match="'c' differs from its master at byte 1234"):
        pager.check()


def test_capacity_and_page_limits():
    pool = SwapPool()
    with pytest.raises(CapacityError, match="at least one page"):
        Pager(pool, PAGE - 1, PAGE, CPU)
    with pytest.raises(ConfigError, match="at least 1 byte"):
        Pager(pool, PAGE, 0, CPU)
    pager = Pager(pool, 2 * PAGE, PAGE, CPU)
    with pytest.raises(CapacityError, match="two largest layers in a row"):
        pager.add("large", 2 * PAGE + 1)
    pager.close()


def test_nothing_leaks():
    process = psutil.Process()

    def held():
        copiers = [t for t in threading.enumerate() if t.name.startswith("djinn-copier")]
        return process.num_fds(), len(copiers)

    def cycle():
        pager, _, _ = make_pager({"a": 8 * PAGE, "b": 8 * PAGE}, 12)
        for name in "abab":
            with pager.lease(name):
                pager.wait(name, 8 * PAGE)
        pager.close()

    cycle()
    before = held()
    for _ in range(10):
        cycle()
    assert held() == before


def test_ahead_only_what_nobody_else_needs_and_only_beside_a_lease(three):
    pager, pool, views = three
    assert pager.prefetch("a") == 0  # without a lease the frames are for the next one
    with pager.lease("c"):
        pager.wait("c", 4 * PAGE + 1)
        assert pager.prefetch("b") == 9 * PAGE
        assert pager.prefetch("a", spare=["b"]) == 2 * PAGE  # 16 frames: 5 leased, 9 spared
        assert pager.prefetch("a") == 8 * PAGE - 7  # now b loses what is missing
        assert pager.resident_bytes("b") == PAGE
    with pager.lease("a") as lease:
        pager.wait("a", 10 * PAGE - 7)
        assert torch.equal(views["a"][: 10 * PAGE - 7], pool.master("a"))
    assert (lease.prefetched_bytes, lease.resident_before_bytes) == (10 * PAGE - 7, 0)
    assert lease.loaded_bytes == 10 * PAGE - 7
    assert lease.evicted_bytes == 8 * PAGE
    with pager.lease("a") as lease:
        pass
    assert (lease.prefetched_bytes, lease.loaded_bytes) == (0, 0)
    pager.check()


def test_a_copy_ahead_that_failed_is_made_good_by_the_lease(three, monkeypatch):
    pager, pool, views = three
    flaky = Flaky(monkeypatch)
    with pager.lease("c"):
        pager.finish("c")
        flaky.n_copied, flaky.fail_at = 0, 3
        assert pager.prefetch("b") == 9 * PAGE
        pager._models["b"].finish_copies()
    with pager.lease("b") as lease:
        pager.wait("b", 9 * PAGE)
        assert torch.equal(views["b"][: 9 * PAGE], pool.master("b"))
        assert (lease.prefetched_bytes, lease.loaded_bytes) == (2 * PAGE, 9 * PAGE)
    pager.check()


def test_what_waits_is_spared_by_a_policy_that_listens(three):
    pager, _, _ = three
    pager.policy = Lookahead()
    for name in ("c", "a"):
        with pager.lease(name):
            pass
    pager.expect(["c"])
    with pager.lease("b") as lease:
        assert lease.evicted_bytes == 8 * PAGE - 7  # of a, although c is older
    assert pager.resident_bytes("c") == 4 * PAGE + 1
