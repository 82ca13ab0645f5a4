"""The pager against a naive model, with everything that can fail failing.

Models smaller and larger than the ring, with weights that units share and without; masters in
memory and on disk, compressed or not, any policy; requests that read every byte of a forward pass,
requests given up, models loaded ahead; copies, mappings and disk reads that fail. Whatever
happened, leased bytes are right and every frame is accounted for.
"""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from naive_window import frames_by_prefix, merged, one_after_another
from test_pager import CPU, PAGE, Flaky
from weights import FORMS, fill_with, in_form, layout_of, weights_of

from djinn_lib.engine.memory import disk_tier
from djinn_lib.engine.memory.devices import cpu
from djinn_lib.engine.memory.masters import HostMasters
from djinn_lib.engine.memory.pager import Pager
from djinn_lib.engine.memory.policies import POLICIES
from djinn_lib.errors import CapacityError, DjinnError, LeaseError, PlatformError

SHARED = st.integers(0, 3 * PAGE)
OWN = st.lists(st.tuples(st.integers(1, 2 * PAGE), st.booleans()), min_size=1, max_size=7)
MODEL = st.tuples(SHARED, OWN)  # bytes that units share, those of each, and whether it reads both


def units_of(shared, own):
    """The extents of the units of a drawn model."""
    alone = one_after_another([n_bytes for n_bytes, _ in own], shared)
    return [
        merged([(0, shared), *unit]) if shared and reads else unit
        for unit, (_, reads) in zip(alone, own, strict=True)
    ]


class PagerMachine(RuleBasedStateMachine):
    @initialize(
        n_frames=st.integers(5, 14),
        models=st.lists(MODEL, min_size=2, max_size=5),
        eviction=st.sampled_from(["pages", "models"]),
        policy=st.sampled_from(sorted(POLICIES)),
        on_disk=st.booleans(),
        form=st.sampled_from(FORMS),
    )
    def start(self, n_frames, models, eviction, policy, on_disk, form):
        self.patch = pytest.MonkeyPatch()
        self.flaky = Flaky(self.patch)
        self.folder = tempfile.TemporaryDirectory()
        self.tier = None
        if on_disk:  # room for the largest model and a little more
            self.tier = disk_tier.DiskTier(20 * PAGE, PAGE, Path(self.folder.name))
        self.pool = in_form(self.tier or HostMasters(), form, PAGE)
        self.pager = Pager(self.pool, n_frames * PAGE, PAGE, CPU, policy, eviction)
        self.units, self.masters, self.views = {}, {}, {}
        self.held = []
        self.add("small", 0, [(PAGE, False)])  # one at least that fits, whatever is drawn
        for i, drawn in enumerate(models):
            self.add(f"m{i}", *drawn)

    def add(self, model, shared, own):
        units = units_of(shared, own)
        n_bytes = units[-1][-1][1]
        master = weights_of(n_bytes, n_bytes)
        try:
            view = self.pager.add(model, n_bytes, units)
        except CapacityError:  # what units share and two in a row are larger than the ring
            assert -(-n_bytes // PAGE) > self.pager.ring.n_frames
            assert min(frames_by_prefix(units, PAGE).values()) > self.pager.ring.n_frames
            return
        self.pool.add(model, layout_of(n_bytes), fill_with(master))
        self.units[model], self.masters[model], self.views[model] = units, master, view

    def draw(self, data):
        return data.draw(st.sampled_from(sorted(self.units)))

    def acquire(self, model):
        try:
            return self.pager.lease(model)
        except CapacityError:  # leases hold too many frames, of the device or of the host
            assert not self.pager.ring.can_load(model) or self.held
            return None

    def forward(self, model):
        """Read all bytes, each unit as soon as it may run."""
        for extents in self.units[model]:
            self.pager.wait_for(model, extents)
            for begin, end in extents:
                assert torch.equal(self.views[model][begin:end], self.masters[model][begin:end])

    @rule(data=st.data(), hold=st.booleans(), n_passes=st.integers(1, 3))
    def request(self, data, hold, n_passes):
        model = self.draw(data)
        if (lease := self.acquire(model)) is None:
            return
        for _ in range(n_passes):
            self.forward(model)
        if not self.pager.is_streamed(model):
            assert self.pager.resident_bytes(model) == len(self.masters[model])
            assert lease.stats.loaded_bytes + lease.stats.resident_before_bytes >= len(
                self.masters[model]
            )
        self.held.append(lease) if hold else lease.release()

    @rule(data=st.data(), fail_at=st.integers(1, 8))
    def request_whose_copy_fails(self, data, fail_at):
        model = self.draw(data)
        self.pager.check()  # blocks until no copy is in flight
        self.flaky.n_copied, self.flaky.fail_at = 0, fail_at
        try:
            if lease := self.acquire(model):
                try:
                    self.forward(model)
                except DjinnError as error:
                    assert isinstance(error.__cause__, OSError)
                finally:
                    lease.release()
                self.pager.check()
        finally:
            self.flaky.fail_at = None

    @rule(data=st.data(), ahead=st.booleans())
    def mapping_fails(self, data, ahead):
        model = self.draw(data)
        missing = self.pager.ring.n_missing(model)

        def refuse(*_):
            raise PlatformError("no mappings")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu.CpuAddressSpace, "map", refuse)
            try:
                if ahead:
                    self.pager.prefetch(model)
                elif lease := self.acquire(model):
                    lease.release()
                    assert not missing
            except PlatformError:
                assert missing

    @precondition(lambda self: self.tier)
    @rule(data=st.data())
    def disk_fails(self, data):
        model = self.draw(data)

        def broken(*_):
            raise OSError(5, "Input/output error")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(disk_tier.SwapFile, "read", broken)
            try:
                if lease := self.acquire(model):
                    self.forward(model)
                    lease.release()
            except DjinnError as error:
                assert "Input/output error" in str(error)

    @rule(data=st.data())
    def abandon(self, data):
        if lease := self.acquire(self.draw(data)):
            lease.release()

    @rule(data=st.data(), spare=st.sets(st.integers(0, 4)))
    def load_ahead(self, data, spare):
        model, spared = self.draw(data), {f"m{i}" for i in spare}
        others = {
            name: self.pager.resident_bytes(name)
            for name in self.units
            if name != model and (name in spared or self.pager.ring.is_leased(name))
        }
        before = self.pager.resident_bytes(model)
        try:
            n_bytes = self.pager.prefetch(model, spared)
        except CapacityError:  # of the host memory
            assert self.held
            return
        assert n_bytes == self.pager.resident_bytes(model) - before
        assert not n_bytes or self.pager.ring.any_leased
        assert all(self.pager.resident_bytes(name) == n for name, n in others.items())

    @rule(data=st.data())
    def expect(self, data):
        self.pager.expect(data.draw(st.lists(st.sampled_from(sorted(self.units)), max_size=4)))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        self.held.pop(data.draw(st.integers(0, len(self.held) - 1))).release()

    @rule(data=st.data(), forget=st.booleans(), drawn=MODEL)
    def evict_or_replace(self, data, forget, drawn):
        model = self.draw(data)
        if self.pager.ring.is_leased(model):
            with pytest.raises(LeaseError):
                self.pager.remove(model) if forget else self.pager.evict(model)
        elif forget and len(self.units) > 1:
            self.pager.remove(model)
            self.pool.discard(model)
            del self.units[model], self.masters[model], self.views[model]
            self.add(model, *drawn)
        else:
            self.pager.evict(model)
            assert self.pager.resident_bytes(model) == 0

    @rule()
    def reset(self):
        resident = [self.pager.resident_bytes(model) for model in self.units]
        if self.held:
            with pytest.raises(LeaseError):
                self.pager.reset()
            assert resident == [self.pager.resident_bytes(model) for model in self.units]
        else:
            self.pager.reset()
            assert not any(self.pager.resident_bytes(model) for model in self.units)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def use_what_is_leased(self, data):
        try:
            self.forward(self.held[data.draw(st.integers(0, len(self.held) - 1))].model)
        except DjinnError as error:  # a copy failed after the lease was granted
            assert "try the request again" in str(error)

    @invariant()
    def audit(self):
        if hasattr(self, "pager"):
            self.pager.ring.check()
            if self.tier:
                self.tier.ring.check()

    def teardown(self):
        if hasattr(self, "pager"):
            for lease in self.held:
                lease.release()
            self.pager.check()
            self.patch.undo()
            self.pager.close()
            self.pool.close()
            self.folder.cleanup()


PagerMachine.TestCase.settings = settings(
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
TestPager = PagerMachine.TestCase
