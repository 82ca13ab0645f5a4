"""What every device promises: `CONTRACT` by name, each to be called with a device.

Promises about copies are kept for plain pages and for compressed ones, which the device decodes.

A copy that fails is told to those that wait for its bytes; a mapping that fails is an error of the
caller that asks for the pages. Both come in the same words on every device, and both are rolled
back completely.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import cache, partial
from unittest import mock

import torch
from weights import FORMS, fill_with, in_form, layout_of, weights_of

from djinn_lib.engine.memory.devices import base, open_address_space, open_copier
from djinn_lib.engine.memory.devices.base import Refused, Stalls
from djinn_lib.engine.memory.load import Load
from djinn_lib.engine.memory.masters import HostMasters
from djinn_lib.engine.memory.pager import Pager
from djinn_lib.errors import DjinnError, PlatformError

PAGE, N_PAGES = 2 << 20, 7  # the smallest page of a GPU
N_BYTES = N_PAGES * PAGE - 5  # the last page is short
COPY_PAGE = base.copy_page
REFUSED = (
    "expected {} pages of 2.0 MiB to be mapped, got none (no mappings left): free memory, or use "
    "fewer, larger pages"
)
FAILED = "expected {}: the copy failed ([Errno 5] Input/output error); try the request again"


@contextmanager
def opened(device):
    made = open_copier(device)
    try:
        yield made
    finally:
        made.close()


@cache
def masters_of(device_type, form):
    """Masters of one model, and its bytes; all promises read the same."""
    source, is_cuda = weights_of(N_BYTES), device_type == "cuda"
    masters = in_form(HostMasters(pin=is_cuda), form, PAGE)
    masters.add("m", layout_of(N_BYTES), fill_with(source))
    return masters, source


def pages_of(device, form):
    """Where pages go, the bytes that they get, and the place and the source of each page.

    Every other one stays plain, and so does the last one, which has an odd number of bytes.
    """
    masters, source = masters_of(device.type, form)
    plain, _ = masters_of(device.type, "plain")
    target = torch.zeros(N_BYTES, dtype=torch.uint8, device=device)
    places = [(begin, min(begin + PAGE, N_BYTES)) for begin in range(0, N_BYTES, PAGE)]
    sources = [(masters, plain)[i % 2].read("m", *place) for i, place in enumerate(places)]
    return target, source, [(target[slice(*p)], s) for p, s in zip(places, sources, strict=True)]


class Failing:
    """Copies pages, but fails at those whose turns are given, counted from 1."""

    def __init__(self, *turns):
        self.turns, self.n_copied = turns, 0

    def __call__(self, target, source):
        self.n_copied += 1
        if self.n_copied in self.turns:
            raise OSError(5, "Input/output error")
        COPY_PAGE(target, source)

    def __enter__(self):
        self._patch = mock.patch.object(base, "copy_page", self)
        self._patch.start()
        return self

    def __exit__(self, *_):
        self._patch.stop()


@contextmanager
def refusing(space, turn):
    """From its call number `turn` on, the system maps one page of those asked for and no more."""
    real, calls = space._map, []

    def refuse(area, first_page, frames):
        calls.append(frames)
        if len(calls) < turn:
            return real(area, first_page, frames)
        real(area, first_page, frames[:1])
        raise Refused("no mappings left")

    with mock.patch.object(space, "_map", refuse):
        yield


def raised(call, *arguments):
    """The `DjinnError` of a call, which must raise one."""
    try:
        call(*arguments)
    except DjinnError as error:
        return error
    raise AssertionError("expected a DjinnError")


# -- a device by itself --------------------------------------------------------------------------


def bytes_follow_frames_and_addresses_stay(device):
    space = open_address_space(device, 8, PAGE)
    try:
        a, b = space.reserve(4), space.reserve(4)
        views = [space.bytes_view(area) for area in (a, b)]
        assert [view.data_ptr() for view in views] == [a.address, b.address]
        space.map(a, 0, [5, 2, 3, 7])
        for page, value in enumerate([50, 20, 30, 70]):
            views[0][page * PAGE : (page + 1) * PAGE] = value
        fence_of(device)
        space.unmap(a, 0, 4)
        space.map(b, 0, [7, 5])
        space.map(b, 2, [3, 2])
        assert [int(views[1][page * PAGE + 17]) for page in range(4)] == [70, 50, 30, 20]
        again = space.bytes_view(b)  # while its pages are mapped, which they stay
        assert again.data_ptr() == b.address and int(again[17]) == 70
        assert (space.mapped_pages(a), space.mapped_pages(b)) == (set(), {0, 1, 2, 3})
    finally:
        space.close()
        space.close()


def fence_of(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def frames_can_be_lent_to_another_address_space(device):
    """As another process has one; a frame lives until the last of them lets it go."""
    owner = open_address_space(device, 4, PAGE, shared=True)
    descriptors = owner.export()
    other = open_address_space(device, 4, PAGE, frames=descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    try:
        areas = [space.reserve(2) for space in (owner, other)]
        views = [s.bytes_view(area) for s, area in zip((owner, other), areas, strict=True)]
        owner.map(areas[0], 0, [3, 1])
        views[0][:PAGE], views[0][PAGE:] = 33, 11
        fence_of(device)
        other.map(areas[1], 0, [1, 3])
        owner.close()
        assert [int(views[1][page * PAGE + 5]) for page in range(2)] == [11, 33]
    finally:
        owner.close()
        other.close()


def a_mapping_that_is_refused_leaves_none_of_its_pages(device):
    space = open_address_space(device, 8, PAGE)
    try:
        area = space.reserve(6)
        space.map(area, 0, [1, 2])
        with refusing(space, 1):
            error = raised(space.map, area, 2, [5, 3, 7])
        assert type(error) is PlatformError and str(error) == REFUSED.format(3)
        assert space.mapped_pages(area) == {0, 1}
        space.map(area, 2, [5, 3, 7])  # as if nothing had been
        assert space.mapped_pages(area) == {0, 1, 2, 3, 4}
    finally:
        space.close()


def pages_arrive_in_order(device, form):
    target, source, pages = pages_of(device, form)
    with opened(device) as copier:
        load = Load(copier, 0)
        for batch in (pages[:1], pages[1:3], pages[3:]):
            load.copy(batch)
        for end in (1, PAGE, 3 * PAGE + 1, N_BYTES, N_BYTES + PAGE):
            load.wait(end)
            assert torch.equal(target[:end].cpu(), source[:end])
        load.block_until_ended()
        assert load.arrived and load.error is None and load.good_bytes == N_BYTES
        assert load.stalls.total_s >= 0


def a_load_may_begin_in_the_middle(device, form):
    target, source, pages = pages_of(device, form)
    with opened(device) as copier:
        load = Load(copier, 2 * PAGE)
        load.copy(pages[2:])
        load.wait(PAGE)  # none of its bytes
        load.wait(2 * PAGE + 1)
        load.wait(N_BYTES)
        assert torch.equal(target[2 * PAGE :].cpu(), source[2 * PAGE :])
        assert not target[: 2 * PAGE].any()


def a_copy_that_fails_is_told_to_those_that_wait(device, form):
    target, source, pages = pages_of(device, form)
    with opened(device) as copier, Failing(4) as failing:
        load = Load(copier, 0)
        load.copy(pages[:2])
        load.copy(pages[2:5])  # whoever queues it is told nothing
        load.block_until_ended()
        load.copy(pages[5:])
        load.block_until_ended()
        assert not load.arrived and failing.n_copied <= 5  # what comes later is not copied
        assert load.good_bytes == 3 * PAGE
        load.wait(3 * PAGE)
        assert torch.equal(target[: 3 * PAGE].cpu(), source[: 3 * PAGE])
        error = raised(load.wait, 3 * PAGE + 1)
        assert type(error) is DjinnError and isinstance(error.__cause__, OSError)
        got = f"weights up to byte {3 * PAGE + 1}, got {3 * PAGE}"
        assert str(error) == FAILED.format(got)


def a_load_that_is_given_up_ends_with_what_is_queued(device, form):
    target, source, pages = pages_of(device, form)
    with opened(device) as copier:
        load = Load(copier, 0)
        load.block_until_ended()
        load.copy(pages[:2])
        load.block_until_ended()
        assert torch.equal(target[: 2 * PAGE].cpu(), source[: 2 * PAGE])


def single_pages_arrive_or_are_told_to_fail(device, form):
    target, source, pages = pages_of(device, form)
    with opened(device) as copier, Failing(2):
        mark, stalls = copier.mark(), Stalls()
        copies = [copier.submit(*page, mark) for page in pages[:3]]
        for page_copy in copies:
            page_copy.wait(stalls)  # which raises nothing
        assert [type(page_copy.error) for page_copy in copies] == [type(None), OSError, type(None)]
        for page_copy in copies:
            page_copy.block_until_ended()
            assert page_copy.ended
        for place in (slice(0, PAGE), slice(2 * PAGE, 3 * PAGE)):
            assert torch.equal(target[place].cpu(), source[place])
        copier.fence()()


# -- a pager over it -----------------------------------------------------------------------------


@contextmanager
def paged(device, form, n_frames=N_PAGES):
    """A pager of one model, in units of a page, its bytes, and its view."""
    masters, source = masters_of(device.type, form)
    pager = Pager(masters, n_frames * PAGE, PAGE, device)
    try:
        yield pager, source, pager.add("m", N_BYTES, UNITS)
    finally:
        pager.close()


UNITS = [((begin, min(begin + PAGE, N_BYTES)),) for begin in range(0, N_BYTES, PAGE)]


def forward(pager, source, view):
    """Read every unit as it becomes ready, as a forward pass does."""
    for extents in UNITS:
        pager.wait_for("m", extents)
        for begin, end in extents:
            assert torch.equal(view[begin:end].cpu(), source[begin:end])


def a_lease_whose_mapping_is_refused_leaves_nothing(device, form):
    for turn, n_pages in ((1, 1), (2, 2), (3, 4)):  # batches of a load
        with paged(device, form) as (pager, source, view):
            before = pager.stats()
            with refusing(pager.space, turn):
                error = raised(pager.lease, "m")
            assert type(error) is PlatformError and str(error) == REFUSED.format(n_pages)
            assert pager.stats() == before
            pager.check()
            with pager.lease("m"):
                forward(pager, source, view)
            pager.check()


def a_copy_that_fails_fails_who_waits_and_is_rolled_back(device, form):
    for turn in (1, 3, N_PAGES):
        good_bytes = (turn - 1) * PAGE
        with paged(device, form) as (pager, source, view):
            with Failing(turn), pager.lease("m"):
                pager.wait("m", good_bytes)
                error = raised(pager.wait, "m")
                assert type(error) is DjinnError and isinstance(error.__cause__, OSError)
                got = f"weights up to byte {N_BYTES}, got {good_bytes}"
                assert str(error) == FAILED.format(got)
            stats = pager.stats()
            assert stats.resident_bytes == {"m": good_bytes}
            assert (stats.n_free, stats.leased, stats.loading) == (N_PAGES - turn + 1, set(), set())
            pager.check()
            with pager.lease("m") as lease:
                forward(pager, source, view)
                assert lease.stats.loaded_bytes == N_BYTES - good_bytes
            pager.check()


def a_model_larger_than_the_ring_fails_and_goes_on_likewise(device, form):
    with paged(device, form, n_frames=4) as (pager, source, view):
        before = pager.stats()
        with refusing(pager.space, 2):
            error = raised(pager.lease, "m")
        assert type(error) is PlatformError and "got none (no mappings left)" in str(error)
        assert pager.stats() == before
        with pager.lease("m"):
            forward(pager, source, view)
            with Failing(3):
                error = raised(forward, pager, source, view)
            assert type(error) is DjinnError and isinstance(error.__cause__, OSError)
            assert str(error) == FAILED.format("a page of weights, got none")
            forward(pager, source, view)
        pager.check()
        assert pager.evict("m") == 2 * PAGE and pager.stats() == before


ADDRESSES = (
    bytes_follow_frames_and_addresses_stay,
    frames_can_be_lent_to_another_address_space,
    a_mapping_that_is_refused_leaves_none_of_its_pages,
)
COPIES = (
    pages_arrive_in_order,
    a_load_may_begin_in_the_middle,
    a_copy_that_fails_is_told_to_those_that_wait,
    a_load_that_is_given_up_ends_with_what_is_queued,
    single_pages_arrive_or_are_told_to_fail,
    a_lease_whose_mapping_is_refused_leaves_nothing,
    a_copy_that_fails_fails_who_waits_and_is_rolled_back,
    a_model_larger_than_the_ring_fails_and_goes_on_likewise,
)
CONTRACT = {f.__name__: f for f in ADDRESSES} | {
    f"{f.__name__}, {form}": partial(f, form=form) for f in COPIES for form in FORMS
}
