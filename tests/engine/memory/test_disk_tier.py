"""Masters on disk: the bytes of pages, host memory that stays within its budget, broken disks."""

import errno
import fcntl
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from open_files import n_open
from tiny import PROMPT, ordinary_tokens, saved

import djinn_lib as dj
from djinn_lib.engine.memory import disk_tier
from djinn_lib.engine.memory.devices import host
from djinn_lib.engine.memory.disk_tier import DiskTier
from djinn_lib.engine.memory.layout import Layout
from djinn_lib.engine.memory.masters import HostMasters
from djinn_lib.engine.memory.opening import open_masters
from djinn_lib.engine.memory.swap_file import BLOCK_BYTES
from djinn_lib.errors import CapacityError, ConfigError, DjinnError, LeaseError

PAGE = 16 << 10
SIZES = {"a": 5 * PAGE - 7, "b": 4 * PAGE, "c": 3 * PAGE + 1}


def contents(name):
    generator = torch.Generator().manual_seed(ord(name))
    return torch.randint(0, 256, (SIZES[name],), generator=generator, dtype=torch.uint8)


@pytest.fixture
def tier(tmp_path):
    tier = DiskTier(8 * PAGE, PAGE, tmp_path)
    for name, n_bytes in SIZES.items():
        layout = Layout.pack([("w", (n_bytes,), torch.uint8)])
        tier.add(name, layout, lambda views, name=name: views["w"].copy_(contents(name)))
    yield tier
    tier.close()


def read_all(tier, name):
    begins = range(0, SIZES[name], PAGE)
    return torch.cat([tier.read(name, b, min(b + PAGE, SIZES[name])) for b in begins])


def test_pages_come_from_disk_when_they_are_needed(tier):
    assert tier.bytes_read == 0
    for name in "abcabca":
        tier.hold(name)
        assert torch.equal(read_all(tier, name), contents(name))
        tier.let_go(name)
        tier.ring.check()
    n_read = tier.bytes_read
    tier.hold("a")  # still there
    tier.let_go("a")
    assert tier.bytes_read == n_read
    assert tier.n_bytes == 8 * PAGE


def test_a_model_that_lost_its_tail_reads_only_that(tier):
    for name in "abc":
        tier.hold(name)
        tier.let_go(name)
    assert [tier.ring.n_resident(name) for name in "abc"] == [0, 4, 4]
    tier.hold("a")
    assert [tier.ring.n_resident(name) for name in "abc"] == [5, 0, 3]
    tier.let_go("a")
    before = tier.bytes_read
    tier.hold("c")
    assert tier.bytes_read - before == PAGE
    assert torch.equal(read_all(tier, "c"), contents("c"))
    tier.let_go("c")


def test_brief_holds_are_waited_for(tier):
    tier.hold("a")
    threading.Timer(0.05, tier.let_go, ["a"]).start()
    tier.hold("b")  # does not fit beside a
    assert torch.equal(read_all(tier, "b"), contents("b"))
    tier.let_go("b")


def test_copies_of_a_victim_end_before_its_frames_are_reused(tier):
    finished = []
    tier.when_reused(finished.append)
    for name in "ab":
        tier.hold(name)
        tier.let_go(name)
    assert finished == ["a"]


def test_an_interrupt_in_a_conditions_own_code_keeps_no_lock(tier, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt  # before the lock is released

    with monkeypatch.context() as patch:
        patch.setattr(threading.Condition, "__exit__", interrupted)
        with pytest.raises(ConfigError, match="nobody"):
            tier.hold("nobody")


@pytest.fixture
def gate(monkeypatch):
    """Reads wait until it is set."""
    real, gate = disk_tier.SwapFile.read, threading.Event()
    monkeypatch.setattr(
        disk_tier.SwapFile, "read", lambda *arguments: gate.wait(10) and real(*arguments)
    )
    return gate


def test_two_that_need_the_same_model_read_it_once(tier, gate):
    threads = [threading.Thread(target=tier.hold, args=("a",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    gate.set()
    for thread in threads:
        thread.join(10)
    assert tier.bytes_read == 5 * PAGE
    assert torch.equal(read_all(tier, "a"), contents("a"))
    tier.let_go("a")
    tier.let_go("a")


def test_one_can_be_used_while_another_is_read(tier, gate):
    gate.set()
    tier.hold("c")
    gate.clear()
    thread = threading.Thread(target=tier.hold, args=("b",))
    thread.start()
    tier.hold("c")
    assert torch.equal(read_all(tier, "c"), contents("c"))
    gate.set()
    thread.join(10)
    for name in "ccb":
        tier.let_go(name)


def test_hash_is_that_of_the_packed_bytes(tier):
    pool = HostMasters()
    for name, n_bytes in SIZES.items():
        layout = Layout.pack([("w", (n_bytes,), torch.uint8)])
        pool.add(name, layout, lambda views, name=name: views["w"].copy_(contents(name)))
        assert tier.sha256(name) == pool.sha256(name)
        assert tier.layout(name) == layout


def test_files_have_no_names_and_go_with_the_tier(tier, tmp_path):
    assert list(tmp_path.iterdir()) == []
    n_fds = n_open(tmp_path)
    tier.discard("a")
    tier.discard("a")
    assert n_open(tmp_path) == n_fds - 1
    tier.close()
    tier.close()
    assert n_open(tmp_path) == n_fds - len(SIZES)


def flip(tier, name, byte):
    """Change one byte of a swap file behind the back of the tier."""
    path = f"/proc/self/fd/{tier._files[name]._fd}"
    with Path(path).open("r+b") as file:
        file.seek(byte)
        old = file.read(1)
        file.seek(byte)
        file.write(bytes([old[0] ^ 4]))
        os.fsync(file.fileno())


def test_a_flipped_bit_on_disk_is_noticed_and_nobody_else_suffers(tier):
    flip(tier, "b", 2 * PAGE + 5)
    with pytest.raises(DjinnError, match="page 2 has changed on disk"):
        tier.hold("b")
    assert tier.ring.n_resident("b") == 0
    assert not tier.ring.is_leased("b")
    flip(tier, "b", 2 * PAGE + 5)
    for name in "ab":
        tier.hold(name)
        assert torch.equal(read_all(tier, name), contents(name))
        tier.let_go(name)


@pytest.mark.parametrize("at_most", [None, 1000])  # also by a read that goes on
def test_a_swap_file_that_is_cut_short_is_noticed(tier, monkeypatch, at_most):
    with Path(f"/proc/self/fd/{tier._files['a']._fd}").open("r+b") as file:
        file.truncate(2 * PAGE + 100)
    if at_most:
        monkeypatch.setattr(os, "preadv", ShortReads(at_most))
    with pytest.raises(DjinnError, match=f"expected {5 * PAGE} bytes, got {2 * PAGE + 100}: "):
        tier.hold("a")
    assert not tier.ring.is_leased("a") and tier.ring.n_resident("a") == 0


def test_more_pages_than_one_call_may_read(tmp_path):
    page_bytes = 4096
    n_pages = os.sysconf("SC_IOV_MAX") + 200
    assert n_pages * page_bytes < disk_tier.READ_BYTES  # all of them at a time
    content = torch.arange(n_pages * page_bytes // 4, dtype=torch.int32)
    tier = DiskTier(n_pages * page_bytes, page_bytes, tmp_path)
    layout = Layout.pack([("w", content.shape, torch.int32)])
    tier.add("m", layout, lambda views: views["w"].copy_(content))
    tier.hold("m")
    frames = tier.ring.frames("m")
    got = torch.cat([tier._frame(frame) for frame in frames]).view(torch.int32)
    assert torch.equal(got, content)
    tier.let_go("m")
    tier.close()


class ShortReads:
    """Reads at most so many bytes at a time; where O_DIRECT is on, from whole blocks on only."""

    def __init__(self, at_most):
        self.at_most, self.n_calls = at_most, 0

    def __call__(self, fd, buffers, offset):
        self.n_calls += 1
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT and offset % BLOCK_BYTES:
            raise OSError(errno.EINVAL, "Invalid argument")
        with Path(f"/proc/self/fd/{fd}").open("rb") as file:
            file.seek(offset)
            got = data = file.read(min(self.at_most, sum(map(len, buffers))))
        for buffer in buffers:
            n_bytes = min(len(buffer), len(data))
            buffer[:n_bytes], data = data[:n_bytes], data[n_bytes:]
        return len(got)


@pytest.mark.parametrize("at_most", [700, BLOCK_BYTES + 1, 3 * PAGE - 100])
def test_reads_that_give_less_go_on(tier, monkeypatch, at_most, tmp_path):
    n_fds = n_open(tmp_path)
    reads = ShortReads(at_most)
    monkeypatch.setattr(os, "preadv", reads)
    for name in "ab":
        tier.hold(name)
        assert torch.equal(read_all(tier, name), contents(name))
        tier.let_go(name)
    assert reads.n_calls >= 9 * PAGE // at_most
    assert n_open(tmp_path) == n_fds


def test_a_master_in_use_is_not_discarded_and_nothing_changes(tier, tmp_path):
    n_fds = n_open(tmp_path)
    tier.hold("a", lasting=True)
    with pytest.raises(LeaseError, match="'a': release it first"):
        tier.discard("a")
    with pytest.raises(CapacityError, match="leases hold"):
        tier.hold("b")
    assert n_open(tmp_path) == n_fds
    assert torch.equal(read_all(tier, "a"), contents("a"))
    with pytest.raises(ConfigError, match="a new model name"):
        tier.add("a", tier.layout("a"), lambda views: None)
    tier.let_go("a", lasting=True)
    tier.ring.check()
    tier.discard("a")
    assert n_open(tmp_path) == n_fds - 1
    with pytest.raises(ConfigError, match="add it first"):
        tier.hold("a")


def test_a_master_in_use_goes_with_the_tier(tier, tmp_path):
    n_fds = n_open(tmp_path)
    tier.hold("a", lasting=True)
    tier.close()
    assert n_open(tmp_path) == n_fds - len(SIZES) and tier.n_bytes == 0
    tier.let_go("a", lasting=True)  # late, and harmless
    with pytest.raises(ConfigError, match="add it first"):
        tier.hold("a")


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=str)
def test_frames_are_given_back_when_nobody_reads_into_them(tier, monkeypatch, error):
    """One read fails while another one is still going on: its frames must not be another's yet."""
    monkeypatch.setattr(disk_tier, "READ_BYTES", PAGE)
    real, ended = disk_tier.SwapFile.read, []

    def first_fails(self, first_page, frames):
        if first_page == 0:
            raise error
        time.sleep(0.05)
        real(self, first_page, frames)
        ended.append((first_page, tier.ring.n_resident("a")))

    monkeypatch.setattr(disk_tier.SwapFile, "read", first_fails)
    with pytest.raises(DjinnError if isinstance(error, OSError) else KeyboardInterrupt):
        tier.hold("a")
    n_ended = len(ended)
    assert n_ended and all(n_resident == 5 for _, n_resident in ended)
    time.sleep(0.1)
    assert len(ended) == n_ended  # and none began later
    assert tier.ring.n_resident("a") == 0 and tier.bytes_read == 0
    monkeypatch.undo()
    tier.hold("a")
    assert torch.equal(read_all(tier, "a"), contents("a"))
    tier.let_go("a")


@pytest.mark.parametrize("step", ["posix_fallocate", "fsync", "fill"])
def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, step):
    """A full disk, one that keeps nothing, and weights that cannot be read."""

    def broken(*_):
        raise OSError(28, "No space left on device")

    tier = DiskTier(2 * PAGE, PAGE, tmp_path)
    n_fds = n_open(tmp_path)
    if step != "fill":
        monkeypatch.setattr(os, step, broken)
    with pytest.raises(OSError if step == "fill" else CapacityError, match="No space left"):
        fill = broken if step == "fill" else lambda views: None
        tier.add("a", Layout.pack([("w", (PAGE,), torch.uint8)]), fill)
    assert list(tmp_path.iterdir()) == [] and n_open(tmp_path) == n_fds
    tier.close()


def test_no_table_stays_in_host_memory(tier):
    assert tier.tables("a", torch.device("cpu")) == {}
    layout = Layout.pack([("w", (9,), torch.uint8)], [("t", (9,), torch.uint8)])
    tier.add("with a table", layout, lambda views: None)
    with pytest.raises(ConfigError, match="embeddings='ring'"):
        tier.tables("with a table", torch.device("cpu"))


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="multiple of 4096"):
        DiskTier(8 * PAGE, 1000, tmp_path)
    with pytest.raises(CapacityError, match="at least one page"):
        DiskTier(PAGE - 1, PAGE, tmp_path)
    monkeypatch.setattr(host, "host_bytes_available", lambda: 100)
    with pytest.raises(CapacityError, match="of host memory"):
        DiskTier(PAGE, PAGE, tmp_path)
    monkeypatch.undo()
    blocked = tmp_path / "file"
    blocked.write_text("")
    tier = DiskTier(2 * PAGE, PAGE, blocked / "below")
    layout = Layout.pack([("w", (PAGE,), torch.uint8)])
    with pytest.raises(ConfigError, match="swap_dir="):
        tier.add("a", layout, lambda views: None)
    with pytest.raises(CapacityError, match="host_capacity of at least"):
        tier.add("large", Layout.pack([("w", (3 * PAGE,), torch.uint8)]), lambda views: None)
    with pytest.raises(ConfigError, match="a model with weights"):
        tier.add("empty", Layout.pack([]), lambda views: None)
    tier.close()


def test_without_a_budget_masters_are_in_memory(tmp_path, monkeypatch):
    assert isinstance(open_masters(None, PAGE), HostMasters)
    monkeypatch.setenv("DJINN_SWAP_DIR", str(tmp_path / "swap"))
    tier = open_masters("32KiB", PAGE)
    assert isinstance(tier, DiskTier)
    tier.add("a", Layout.pack([("w", (PAGE,), torch.uint8)]), lambda views: views["w"].fill_(7))
    assert (tmp_path / "swap").is_dir()
    tier.close()


NAMES = ["llama", "phi", "opt", "qwen2-tied"]


def test_tokens_are_the_same_whatever_is_in_host_memory(tmp_path):
    """Models larger than the host memory together, one of them larger than the ring."""
    expected = {name: ordinary_tokens(saved(name), 6) for name in NAMES}
    options = {"host_capacity": "800KiB", "swap_dir": tmp_path / "swap"}
    with dj.Djinn("560KiB", "cpu", "16KiB", **options) as djinn:
        for name in NAMES:
            djinn.add(name, saved(name))
        assert djinn.masters.n_bytes == 800 << 10 < djinn.residency().bytes.sum()
        assert any((name in djinn.stats().streamed) for name in NAMES)
        pending = [djinn.submit(name, PROMPT, 6, True) for name in NAMES * 2]
        for name, future in zip(NAMES * 2, pending, strict=True):
            assert future.result(60).token_ids == expected[name]
        djinn.check()
        djinn.masters.ring.check()
        djinn.remove("phi")


def test_a_ring_that_does_not_fit_gives_the_host_memory_back(tmp_path, monkeypatch):
    def threads():
        return sorted(t.name for t in threading.enumerate() if t.name.startswith("djinn"))

    before = threads()
    for _ in range(3):
        with pytest.raises(CapacityError):
            dj.Djinn("1TiB", "cpu", "64MiB", host_capacity="64MiB", swap_dir=tmp_path)
    assert threads() == before
