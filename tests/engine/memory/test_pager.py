"""The pager on real mappings: bytes equal masters after anything that happens."""

import signal
import threading
import time

import pytest
import torch
from open_files import n_open
from weights import FORMS, fill_with, in_form, layout_of, weights_of

from djinn_lib.engine.memory.devices import base
from djinn_lib.engine.memory.masters import HostMasters
from djinn_lib.engine.memory.pager import Pager
from djinn_lib.engine.memory.policies import LRU, Lookahead
from djinn_lib.errors import ConfigError, DjinnError, LeaseError

PAGE = 16 << 10
COPY_PAGE = base.copy_page
CPU = torch.device("cpu")
SIZES = {"a": 10 * PAGE - 7, "b": 9 * PAGE, "c": 4 * PAGE + 1}


def make_pager(sizes, n_frames, eviction="pages", policy="lru", form="plain"):
    """A pager over models of random weights, and their bytes; `sizes` in bytes by name."""
    pool = in_form(HostMasters(), form, PAGE)
    masters = {name: weights_of(n_bytes, ord(name)) for name, n_bytes in sizes.items()}
    for name, n_bytes in sizes.items():
        pool.add(name, layout_of(n_bytes), fill_with(masters[name]))
    pager = Pager(pool, n_frames * PAGE, PAGE, CPU, policy, eviction)
    views = {name: pager.add(name, n_bytes) for name, n_bytes in sizes.items()}
    return pager, masters, views


@pytest.fixture(params=FORMS)
def three(request):
    pager, masters, views = make_pager(SIZES, n_frames=16, form=request.param)
    yield pager, masters, views
    pager.close()


class Flaky:
    """Copies pages, but fails at those it is told to."""

    def __init__(self, monkeypatch):
        self.fail_at, self.n_copied, self.gate = None, 0, threading.Event()
        self.gate.set()
        monkeypatch.setattr(base, "copy_page", self)

    def __call__(self, target, source):
        self.gate.wait(10)
        self.n_copied += 1
        if self.fail_at == self.n_copied:
            raise OSError(5, "Input/output error")
        COPY_PAGE(target, source)


def test_finish_blocks_until_everything_is_there(three, monkeypatch):
    pager, masters, views = three
    flaky = Flaky(monkeypatch)
    with pager.lease("b"):
        pager.block_until_loaded("b")
        assert flaky.n_copied == 9
        assert torch.equal(views["b"][: 9 * PAGE], masters["b"])
    with pytest.raises(LeaseError):
        pager.block_until_loaded("b")
    pager.evict("b")
    flaky.n_copied, flaky.fail_at = 0, 4
    with pager.lease("b"), pytest.raises(DjinnError, match="try the request again"):
        pager.block_until_loaded("b")


def test_a_victim_keeps_its_prefix(three):
    pager, _, _ = three
    for name, end in (("a", 10 * PAGE - 7), ("b", 9 * PAGE)):
        with pager.lease(name) as lease:
            pager.wait(name, end)
    assert lease.stats.evicted_bytes == 3 * PAGE - 7  # the last page of a is short of 7 bytes
    assert pager.resident_bytes("a") == 7 * PAGE
    with pager.lease("a") as lease:
        pager.wait("a", 7 * PAGE)  # at once: these bytes never left
        assert lease.stats.stall_s == 0.0
        assert lease.stats.loaded_bytes == 3 * PAGE - 7
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


@pytest.fixture
def interruptible():
    """A shell's background jobs ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("step", ["submit", "map", "unmap", "bytes_view"])
def test_an_interrupt_waits_until_pages_have_moved(three, monkeypatch, step):
    pager, _, _ = three
    owner = pager.copier if step == "submit" else pager.space
    real = getattr(owner, step)

    def interrupted(*args):
        result = real(*args)
        signal.raise_signal(signal.SIGINT)
        return result

    with pager.lease("a"):
        pass
    monkeypatch.setattr(owner, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        if step == "bytes_view":
            pager.add("d", PAGE)
        else:
            pager.lease("b")
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    pager.check()
    if step == "bytes_view":
        pager.remove("d")
    assert not pager.ring.any_leased
    with pager.lease("b") as lease:
        assert not lease.stats.mapped_bytes or step == "bytes_view"


def test_two_leases_share_one_load_and_its_failure(three, monkeypatch):
    pager, _, _ = three
    flaky = Flaky(monkeypatch)
    flaky.gate.clear()
    flaky.fail_at = 3
    first, second = pager.lease("b"), pager.lease("b")
    assert (first.stats.loaded_bytes, second.stats.loaded_bytes) == (9 * PAGE, 0)
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
    pager, masters, views = three
    flaky = Flaky(monkeypatch)
    flaky.gate.clear()
    pager.lease("a").release()  # given up while not one page is there
    threading.Timer(0.05, flaky.gate.set).start()
    with pager.lease("b"):
        pager.wait("b", 9 * PAGE)
        assert torch.equal(views["b"][: 9 * PAGE], masters["b"])
    pager.check()


class Watched(LRU):
    """Notes what it is told, and can refuse a model."""

    def __init__(self):
        super().__init__()
        self.told, self.refuses = [], False

    def admit(self, model, n_pages, n_frames):
        if self.refuses:
            raise MemoryError("no")
        self.told.append(("admit", model))

    def touch(self, model, now_s):
        super().touch(model, now_s)
        self.told.append(("touch", model))

    def forget(self, model):
        super().forget(model)
        self.told.append(("forget", model))


@pytest.mark.parametrize("step", ["reserve", "bytes_view", "admit"])
def test_a_model_that_cannot_be_added_leaves_nothing(monkeypatch, step):
    policy = Watched()
    pager, _, _ = make_pager({"a": PAGE}, 2, policy=policy)
    areas = []  # not all mappings: other threads of this process make some too
    reserve, release = pager.space.reserve, pager.space.release

    def refuse(*_):
        raise MemoryError("no")

    policy.refuses = step == "admit"
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(pager.space, "reserve", lambda n: areas.append(area := reserve(n)) or area)
        patch.setattr(pager.space, "release", lambda area: (release(area), areas.remove(area)))
        if step != "admit":
            patch.setattr(pager.space, step, refuse)
        pager.add("d", 2 * PAGE)
    policy.refuses = False
    assert "d" not in pager.ring and policy.told[-1] == ("forget", "d") and not areas
    pager.add("d", PAGE)
    pager.check()
    pager.close()


def test_nothing_changes_when_a_leased_model_is_to_go():
    policy = Watched()
    pager, masters, views = make_pager(SIZES, 16, policy=policy)
    with pager.lease("a") as lease:
        pager.block_until_loaded("a")
        known, frames = policy.told.copy(), pager.ring.frames("a")
        for refused in (pager.evict, pager.remove):
            with pytest.raises(LeaseError, match="release it first"):
                refused("a")
        assert policy.told == known and pager.ring.frames("a") == frames
        pager.wait("a", 10 * PAGE - 7)
        assert torch.equal(views["a"][: 10 * PAGE - 7], masters["a"])
    assert lease.stats.loaded_bytes == 10 * PAGE - 7
    pager.remove("a")
    for asked in (pager.resident_bytes, pager.wait, pager.block_until_loaded, pager.is_streamed):
        with pytest.raises(ConfigError, match="'a': add it first"):
            asked("a")
    assert not pager.is_resident("a")
    pager.close()


def test_a_device_that_fails_while_it_is_waited_for_keeps_all_in_step(three, monkeypatch):
    """As CUDA does, once a kernel has failed: then no call to wait for the device succeeds."""
    pager, masters, views = three
    broken = threading.Event()

    def synchronize():
        if broken.is_set():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(pager.copier, "fence", lambda: synchronize)
    with pager.lease("a"):
        pager.block_until_loaded("a")
    broken.set()
    for use in (lambda: pager.lease("b"), lambda: pager.evict("a"), lambda: pager.remove("a")):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            use()
        pager.ring.check()
    assert not pager.ring.is_leased("b")
    assert pager.resident_bytes("a") == 7 * PAGE  # what b was to have is gone, and no more
    broken.clear()
    pager.check()
    with pager.lease("b"):
        pager.block_until_loaded("b")
        assert torch.equal(views["b"][: 9 * PAGE], masters["b"])


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
    n_fds = n_open()

    def broken():
        raise RuntimeError("CUDA error")

    close, pager.copier.close = pager.copier.close, broken
    with pytest.raises(RuntimeError, match="CUDA error"):
        pager.close()
    assert n_open() == n_fds - 1
    close()


def test_a_lease_may_end_after_the_pager():
    pager, _, _ = make_pager({"a": PAGE}, 2)
    lease = pager.lease("a")
    pager.close()
    lease.release()
    pager.close()


def test_check_finds_a_changed_byte(three):
    pager, _, views = three
    with pager.lease("c"):
        pager.wait("c", 4 * PAGE + 1)
    views["c"][1234] ^= 1
    with pytest.raises(AssertionError, match="'c' differs from its master at byte 1234"):
        pager.check()


def test_ahead_only_what_nobody_else_needs_and_only_beside_a_lease(three):
    pager, masters, views = three
    assert pager.prefetch("a") == 0  # without a lease the frames are for the next one
    with pager.lease("c"):
        pager.wait("c", 4 * PAGE + 1)
        assert pager.prefetch("b") == 9 * PAGE
        assert pager.prefetch("a", spare=["b"]) == 2 * PAGE  # 16 frames: 5 leased, 9 spared
        assert pager.prefetch("a") == 8 * PAGE - 7  # now b loses what is missing
        assert pager.resident_bytes("b") == PAGE
    with pager.lease("a") as lease:
        pager.wait("a", 10 * PAGE - 7)
        assert torch.equal(views["a"][: 10 * PAGE - 7], masters["a"])
    assert (lease.stats.prefetched_bytes, lease.stats.resident_before_bytes) == (10 * PAGE - 7, 0)
    assert lease.stats.loaded_bytes == 10 * PAGE - 7
    assert lease.stats.evicted_bytes == 8 * PAGE
    with pager.lease("a") as lease:
        pass
    assert (lease.stats.prefetched_bytes, lease.stats.loaded_bytes) == (0, 0)
    pager.check()


def test_a_copy_ahead_that_failed_is_made_good_by_the_lease(three, monkeypatch):
    pager, masters, views = three
    flaky = Flaky(monkeypatch)
    with pager.lease("c"):
        pager.block_until_loaded("c")
        flaky.n_copied, flaky.fail_at = 0, 3
        flaky.gate.clear()
        assert pager.prefetch("b") == 9 * PAGE
        flaky.gate.set()
        while flaky.n_copied < 9:
            time.sleep(0.001)
    with pager.lease("b") as lease:
        pager.wait("b", 9 * PAGE)
        assert torch.equal(views["b"][: 9 * PAGE], masters["b"])
        assert (lease.stats.prefetched_bytes, lease.stats.loaded_bytes) == (2 * PAGE, 9 * PAGE)
    pager.check()


def test_what_waits_is_spared_by_a_policy_that_listens():
    pager, _, _ = make_pager(SIZES, 16, policy=Lookahead())
    for name in ("c", "a"):
        with pager.lease(name):
            pass
    pager.expect(["c"])
    with pager.lease("b") as lease:
        assert lease.stats.evicted_bytes == 8 * PAGE - 7  # of a, although c is older
    assert pager.resident_bytes("c") == 4 * PAGE + 1
    pager.close()
