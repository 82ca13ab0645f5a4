"""What every copier promises, on any device: `CONTRACT` by name, each to be called with a device.

A copy that fails is told to those who wait for its bytes, in the same words on each device; a
mapping that fails is an error of whoever asks for the pages, and leaves nothing mapped.
"""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import torch

from djinn_lib.engine.memory.devices import copier
from djinn_lib.engine.memory.devices.address_space import AddressSpace
from djinn_lib.engine.memory.devices.copier import open_copier
from djinn_lib.engine.memory.masters import Layout, SwapPool
from djinn_lib.engine.memory.pager import Pager
from djinn_lib.errors import DjinnError, PlatformError

PAGE, N_PAGES = 2 << 20, 7  # the smallest page of a GPU
COPY_PAGE = copier.copy_page


@contextmanager
def opened(device):
    made = open_copier(device)
    try:
        yield made
    finally:
        made.close()


def pages_of(device, n_bytes=N_PAGES * PAGE - 5):
    """Where pages go and where they come from; the last one is short."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(0, 256, (n_bytes,), generator=generator, dtype=torch.uint8)
    target = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    if device.type == "cuda":
        source = source.pin_memory()
    ends = [min(begin + PAGE, n_bytes) for begin in range(0, n_bytes, PAGE)]
    begins = range(0, n_bytes, PAGE)
    return target, source, [(target[a:b], source[a:b]) for a, b in zip(begins, ends, strict=True)]


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
        self._patch = mock.patch.object(copier, "copy_page", self)
        self._patch.start()
        return self

    def __exit__(self, *_):
        self._patch.stop()


def raised(call, *arguments):
    """The `DjinnError` of a call, which must raise one."""
    try:
        call(*arguments)
    except DjinnError as error:
        return error
    raise AssertionError("expected a DjinnError")


def pages_arrive_in_order(device):
    target, source, pages = pages_of(device)
    with opened(device) as copies:
        load = copies.begin(0, len(source))
        for batch in (pages[:1], pages[1:3], pages[3:]):
            load.copy(batch)
        for end in (1, PAGE, 3 * PAGE + 1, len(source), len(source) + PAGE):
            load.wait(end)
            assert torch.equal(target[:end].cpu(), source[:end])
        load.finish()
        assert load.ended and load.error is None and load.good_bytes == len(source)
        assert load.stalls.total_s >= 0


def a_load_may_begin_in_the_middle(device):
    target, source, pages = pages_of(device)
    with opened(device) as copies:
        load = copies.begin(2 * PAGE, len(source))
        load.copy(pages[2:])
        load.wait(PAGE)  # none of its bytes
        load.wait(2 * PAGE + 1)
        load.wait(len(source))
        assert torch.equal(target[2 * PAGE :].cpu(), source[2 * PAGE :])
        assert not target[: 2 * PAGE].any()


def a_page_that_fails_is_told_to_those_who_wait(device):
    target, source, pages = pages_of(device)
    with opened(device) as copies, Failing(4) as failing:
        load = copies.begin(0, len(source))
        load.copy(pages[:2])
        load.copy(pages[2:5])  # whoever queues it is told nothing
        load.copy(pages[5:])
        load.finish()
        assert load.ended and failing.n_copied == 4  # the pages after it are not copied
        assert load.good_bytes == 3 * PAGE
        load.wait(3 * PAGE)
        assert torch.equal(target[: 3 * PAGE].cpu(), source[: 3 * PAGE])
        error = raised(load.wait, 3 * PAGE + 1)
        assert type(error) is DjinnError and isinstance(error.__cause__, OSError)
        assert str(error) == (
            f"expected weights up to byte {3 * PAGE + 1}, got {3 * PAGE}: the copy failed "
            "([Errno 5] Input/output error); try the request again"
        )


def a_load_that_is_given_up_ends_with_what_is_queued(device):
    target, source, pages = pages_of(device)
    with opened(device) as copies:
        load = copies.begin(0, len(source))
        load.finish()
        load.copy(pages[:2])
        load.finish()
        assert torch.equal(target[: 2 * PAGE].cpu(), source[: 2 * PAGE])


def single_pages_arrive_or_are_told_to_fail(device):
    target, _, pages = pages_of(device)
    with opened(device) as copies, Failing(2):
        mark, stalls = copies.mark(), copier.Stalls()
        arrivals = [copies.submit(*page, mark) for page in pages[:3]]
        arrivals[0].wait(stalls)
        arrivals[2].wait(stalls)
        error = raised(arrivals[1].wait, stalls)
        for arrival in arrivals:
            arrival.finish()
        assert type(error) is DjinnError and isinstance(error.__cause__, OSError)
        assert str(error) == (
            "expected a page of weights, got none: the copy failed ([Errno 5] Input/output "
            "error); try the request again"
        )
        assert torch.equal(target[:PAGE].cpu(), pages[0][1])
        assert torch.equal(target[2 * PAGE : 3 * PAGE].cpu(), pages[2][1])
        copies.fence()()


@contextmanager
def paged(device):
    """A pager of one model, its bytes, and its view."""
    _, source, _ = pages_of(device)
    pool = SwapPool(pin=device.type == "cuda")
    pool.add(
        "m",
        Layout.pack([("w", (len(source),), torch.uint8)]),
        lambda views: views["w"].copy_(source),
    )
    pager = Pager(pool, N_PAGES * PAGE, PAGE, device)
    try:
        yield pager, source, pager.add("m", len(source))
    finally:
        pager.close()
        pool.close()


class Refusing:
    """Maps pages, but refuses from the call on whose turn is given."""

    def __init__(self, space: AddressSpace, turn):
        self._space, self._map, self.n_calls, self.turn = space, space.map, 0, turn

    def __call__(self, area, first_page, frames):
        self.n_calls += 1
        if self.n_calls >= self.turn:
            raise PlatformError("expected a mapping, got none: free memory")
        self._map(area, first_page, frames)


def a_mapping_that_fails_is_raised_and_leaves_nothing(device):
    for turn in (1, 2, 3):
        with paged(device) as (pager, source, view):
            with mock.patch.object(pager.space, "map", Refusing(pager.space, turn)):
                error = raised(pager.lease, "m")
            assert type(error) is PlatformError
            assert str(error) == "expected a mapping, got none: free memory"
            assert pager.resident_bytes("m") == 0 and not pager.ring.any_leased
            assert not pager._models["m"].loads
            with pager.lease("m"):
                pager.wait("m", len(source))
                assert torch.equal(view[: len(source)].cpu(), source)
            pager.check()


def a_copy_that_fails_fails_who_waits_and_can_be_repeated(device):
    for turn in (1, 3, N_PAGES):
        with paged(device) as (pager, source, view):
            with Failing(turn), pager.lease("m"):
                pager.wait("m", (turn - 1) * PAGE)
                error = raised(pager.wait, "m", len(source))
                assert type(error) is DjinnError and "the copy failed ([Errno 5]" in str(error)
            assert pager.resident_bytes("m") == (turn - 1) * PAGE
            with pager.lease("m") as lease:
                pager.wait("m", len(source))
                assert lease.loaded_bytes == len(source) - (turn - 1) * PAGE
                assert torch.equal(view[: len(source)].cpu(), source)
            pager.check()


CONTRACT = {
    f.__name__: f
    for f in (
        pages_arrive_in_order,
        a_load_may_begin_in_the_middle,
        a_page_that_fails_is_told_to_those_who_wait,
        a_load_that_is_given_up_ends_with_what_is_queued,
        single_pages_arrive_or_are_told_to_fail,
        a_mapping_that_fails_is_raised_and_leaves_nothing,
        a_copy_that_fails_fails_who_waits_and_can_be_repeated,
    )
}
