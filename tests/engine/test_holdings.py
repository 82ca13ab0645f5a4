"""The end of a `Djinn`: collected, closed, or looked at from another process."""

import asyncio
import copy
import gc
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import weakref
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from operator import attrgetter

import pytest
import torch
from forked import in_a_child
from tiny import PROMPT, spec

import djinn_lib as dj
from djinn_lib.errors import DjinnError, LeaseError, RequestCancelled
from djinn_lib.paths import REPO

PAGE = "16KiB"


def opened(**options):
    djinn = dj.Djinn("2MiB", "cpu", PAGE, max_model_len=64, progress=lambda step: None, **options)
    djinn.add("m", spec("phi"))
    return djinn


# -- collected -------------------------------------------------------------------------------


def ask(djinn):
    djinn.generate("m", PROMPT, 2)
    djinn.submit("m", PROMPT, 2).result(60)
    with pytest.raises(DjinnError):
        djinn.generate("m", [10**9])


def keep_the_model(djinn):
    with djinn.lease("m") as model:
        model(torch.tensor([PROMPT]))
    return model


def look_ahead(djinn):
    djinn.add("n", spec("llama"))
    with djinn.lease("m"):
        pending = [djinn.submit(name, PROMPT, 2) for name in "nm"]
    wait(pending, 60)


def refer_to_itself(djinn):
    djinn.friend = [djinn]


def leave_a_lease_open(djinn):
    lease = djinn.lease("m")
    lease.__enter__()


USES = [ask, keep_the_model, look_ahead, refer_to_itself, leave_a_lease_open]


@pytest.mark.parametrize("use", USES)
def test_a_collected_object_gives_everything_back(use, tmp_path, nothing_leaks):
    all_there_is = {"decode": "graph", "host_capacity": "2MiB", "swap_dir": tmp_path}
    options = {} if use in (keep_the_model, refer_to_itself) else all_there_is
    with nothing_leaks():
        djinn = opened(**options)
        kept, alive = use(djinn), weakref.ref(djinn)
        del djinn
        gc.collect()
        assert alive() is None
    if isinstance(kept, torch.nn.Module):
        with pytest.raises(LeaseError, match="its Djinn was closed"):
            repr(kept.lm_head.weight)


def test_nobody_but_the_user_refers_to_the_object():
    """So it needs no garbage collector to go."""
    djinn = opened()
    keep_the_model(djinn)
    djinn.submit("m", PROMPT, 2).result(60)
    alive = weakref.ref(djinn)
    gc.disable()
    try:
        del djinn
        assert alive() is None
    finally:
        gc.enable()


def test_the_last_reference_may_go_in_a_thread_of_the_objects_own(nothing_leaks):
    with nothing_leaks():
        djinn = opened()
        alive = weakref.ref(djinn)
        asked, pending = threading.Event(), djinn.submit("m", PROMPT, 2)
        pending.add_done_callback(lambda _, djinn=djinn: asked.wait(10))
        del djinn
        pending.result(60)
        assert alive() is not None
        asked.set()
        del pending


def test_requests_of_a_collected_object():
    djinn = opened()
    expected = djinn.generate("m", PROMPT, 30, ignore_eos=True).token_ids
    pending = [djinn.submit("m", PROMPT, 30, ignore_eos=True) for _ in range(3)]
    while not djinn.stats().leased:
        pass
    del djinn
    assert pending[0].result(0).token_ids == expected  # served to its end
    for future in pending[1:]:
        with pytest.raises(DjinnError, match="closed"):
            future.result(0)


def test_what_could_not_be_made_leaves_nothing(monkeypatch, nothing_leaks):
    def fail(*_):
        raise MemoryError("no stream")

    monkeypatch.setattr("djinn_lib.engine.serving.catalog.Recorder", fail)
    with nothing_leaks(), pytest.raises(MemoryError):
        dj.Djinn("2MiB", "cpu", PAGE)


@pytest.mark.slow
def test_the_end_of_the_process():
    """Requests that wait then are refused in words; whoever holds a lease is not waited for."""
    code = """
        import threading, time
        import djinn_lib as dj
        from tiny import PROMPT, spec
        djinn = dj.Djinn("2MiB", "cpu", "16KiB")
        djinn.add("m", spec("phi"))
        threading.Thread(target=lambda: djinn.lease("m").__enter__() and time.sleep(99),
                         daemon=True).start()
        other = dj.Djinn("2MiB", "cpu", "16KiB")
        other.add("m", spec("phi"))
        for _ in range(2):
            pending = other.submit("m", PROMPT, 20, True)
        pending.add_done_callback(lambda pending: print("said:", pending.exception(), flush=True))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=120, cwd=REPO / "tests" / "support",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "said: a request for 'm' cannot be served any more" in done.stdout
    assert "Traceback" not in done.stderr


# -- closed ----------------------------------------------------------------------------------

METHODS = {
    "add": lambda djinn: djinn.add("n", spec("phi")),
    "generate": lambda djinn: djinn.generate("m", PROMPT),
    "submit": lambda djinn: djinn.submit("m", PROMPT),
    "agenerate": lambda djinn: asyncio.run(djinn.agenerate("m", PROMPT)),
    "lease": lambda djinn: djinn.lease("m").__enter__(),
    "wait": lambda djinn: djinn.wait("m"),
    "evict": lambda djinn: djinn.evict("m"),
    "remove": lambda djinn: djinn.remove("m"),
    "reset": lambda djinn: djinn.reset(),
    "set_decode": lambda djinn: djinn.set_decode("m", "graph"),
    "tokenize": lambda djinn: djinn.tokenize("m", "text"),
    "sha256": lambda djinn: djinn.sha256("m"),
    "residency": lambda djinn: djinn.residency(),
    "check": lambda djinn: djinn.check(),
    "overlap": lambda djinn: djinn.overlap,
    "overlap=": lambda djinn: setattr(djinn, "overlap", False),
    "pool": lambda djinn: djinn.masters,
    "kv_cache_bytes": lambda djinn: djinn.kv_cache_bytes,
    "capacity_bytes": lambda djinn: djinn.capacity_bytes,
}


@pytest.fixture(scope="module")
def closed():
    djinn = opened()
    djinn.generate("m", PROMPT, 2)
    djinn.close()
    djinn.close()
    return djinn


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_nothing_can_be_done_with_a_closed_one(closed, method):
    with pytest.raises(DjinnError, match=r"was closed: make a new one"):
        method(closed)


def test_threads_that_close_at_once(nothing_leaks):
    with nothing_leaks():
        djinn, failures = opened(), []
        pending = djinn.submit("m", PROMPT, 20, ignore_eos=True)

        def close():
            try:
                djinn.close()
                assert djinn._holdings._is_released
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=close) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures and pending.done()


def test_a_part_that_fails_to_close_leaves_no_other_open(monkeypatch, nothing_leaks):
    with nothing_leaks():
        djinn = opened()
        decoder = djinn._models["m"].decoder

        def fail():
            raise RuntimeError("graph in use")

        monkeypatch.setattr(decoder, "close", fail, raising=False)
        with pytest.raises(RuntimeError, match="graph in use"):
            djinn.close()
        monkeypatch.undo()
        djinn.close()


def test_an_interrupted_close_frees_nothing_that_somebody_uses(monkeypatch, nothing_leaks):
    def interrupted(*_):
        raise KeyboardInterrupt

    for part, method in (("scheduler", "close"), ("pager.copier", "close")):
        with nothing_leaks():
            djinn = opened()
            with djinn.lease("m") as model:
                with monkeypatch.context() as patch:
                    holder = attrgetter(part)(djinn._holdings)
                    patch.setattr(holder, method, interrupted)
                    patch.setattr(djinn._scheduler, "ensure_no_turn", lambda action: None)
                    with pytest.raises(KeyboardInterrupt):
                        djinn.close()
                if part == "scheduler":
                    assert model(torch.tensor([PROMPT])).logits.isfinite().all()
                else:
                    assert djinn._holdings.pager.space._areas, "copies may be in flight"
            assert djinn.closed
            djinn.close()
            assert not djinn._holdings.pager.space._areas


def test_what_is_added_while_it_closes_is_not_kept(monkeypatch, tmp_path, nothing_leaks):
    for closes_at in ("_pager.add", "_make_decoder"):
        with nothing_leaks():
            djinn = opened(decode="eager", host_capacity="2MiB", swap_dir=tmp_path)
            owner, _, method = f"_models.{closes_at}".rpartition(".")
            holder = attrgetter(owner)(djinn)
            used = getattr(holder, method)

            def close_first(*arguments, used=used, djinn=djinn, **options):
                if used.__name__ == "add":
                    djinn.close()
                    return used(*arguments, **options)
                made = used(*arguments, **options)
                djinn.close()
                return made

            monkeypatch.setattr(holder, method, close_first)
            holdings = djinn._holdings
            with pytest.raises(DjinnError, match="this Djinn was closed"):
                djinn.add("late", spec("llama"))
            assert not list(holdings.models) and not holdings.masters.sizes()
            assert not holdings.pager.space._areas
            del djinn, holder, used, close_first, holdings
            monkeypatch.undo()


def test_what_can_be_done_inside_a_lease():
    with opened() as djinn:
        djinn.add("n", spec("llama"))
        with djinn.lease("m") as model:
            with pytest.raises(LeaseError, match=r"close\(\) cannot be called inside a lease"):
                djinn.close()
            for forbidden in (djinn.evict, djinn.remove):
                with pytest.raises(LeaseError, match="'m'"):
                    forbidden("m")
            with pytest.raises(LeaseError, match="'m'"):
                djinn.reset()
            djinn.remove("n")
            djinn.add("n", spec("llama"))
            assert djinn.set_decode("n", "graph") == djinn.set_decode("m", "graph") == "graph"
            assert len(djinn.generate("n", PROMPT, 2, ignore_eos=True).token_ids) == 2
            assert model.lm_head.weight.isfinite().all()
        djinn.check()


# -- other processes -------------------------------------------------------------------------


@pytest.mark.parametrize("send", [pickle.dumps, copy.copy, copy.deepcopy])
def test_an_object_cannot_be_sent_or_copied(closed, send):
    with pytest.raises(DjinnError, match="make one in each process"):
        send(closed)


@pytest.fixture(scope="module")
def parents():
    with opened() as djinn:
        yield djinn


def test_a_forked_child_is_told_so(parents):
    parents.submit("m", PROMPT, 2).result(60)  # there are threads, which a child does not have

    def try_all():
        for name, method in {**METHODS, "close": dj.Djinn.close}.items():
            with pytest.raises(DjinnError, match=f"belongs to process {os.getppid()}"):
                method(parents)
            tried.append(name)
        return len(tried)

    tried = []
    assert in_a_child(try_all) == (str(len(METHODS) + 1), 0)


def test_a_child_forked_inside_a_lease(parents):
    expected = parents.generate("m", PROMPT, 6, ignore_eos=True).token_ids

    def unwind(model):
        try:
            return model(torch.tensor([PROMPT]))
        finally:
            leases.pop().__exit__(None, None, None)  # as sys.exit() would do

    leases = [parents.lease("m")]
    model = leases[0].__enter__()
    alias = model.lm_head.weight.detach()
    waiting = parents.submit("m", PROMPT, 2)
    for use in (
        lambda: model.lm_head.weight.sum(),
        alias.sum,
        lambda: unwind(model),
        lambda: waiting.result(),
        lambda: waiting.exception(),
    ):
        assert "this is a forked child" in in_a_child(use)[0]
    assert in_a_child(waiting.cancel)[0] == "False"
    assert alias.isfinite().all() and model(torch.tensor([PROMPT])).logits.isfinite().all()
    leases.pop().__exit__(None, None, None)
    assert len(waiting.result(60).token_ids) == 2
    assert parents.generate("m", PROMPT, 6, ignore_eos=True).token_ids == expected
    parents.check()


def test_what_a_child_does_not_need_stays_its_parents(parents):
    def end():
        parents.__exit__(None, None, None)
        parents._holdings.collect()
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork: torch would crash
        own = opened()
        tokens = own.generate("m", PROMPT, 6, ignore_eos=True).token_ids
        own.close()
        return tokens

    expected = parents.generate("m", PROMPT, 6, ignore_eos=True).token_ids
    assert in_a_child(end) == (str(expected), 0)
    assert parents.generate("m", PROMPT, 6, ignore_eos=True).token_ids == expected
    parents.check()


# -- interrupts ------------------------------------------------------------------------------


def interrupt(monkeypatch, pending, method):
    """Ctrl-C while a request is waited for."""

    def interrupted(self, timeout=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Future, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            getattr(pending, method)()


@pytest.mark.parametrize("method", ["result", "exception"])
def test_an_interrupt_gives_a_request_up(parents, monkeypatch, method):
    with parents.lease("m"):
        waiting = parents.submit("m", PROMPT, 2)
        other = threading.Thread(target=interrupt, args=(monkeypatch, waiting, method))
        other.start()
        other.join(60)
    with pytest.raises(CancelledError):
        waiting.result(60)
    served = parents.submit("m", PROMPT, 400, ignore_eos=True)
    while "m" not in parents.stats().leased:
        pass
    interrupt(monkeypatch, served, method)
    assert "m" not in parents.stats().leased  # it waited until nothing was computed any more
    with pytest.raises(RequestCancelled):
        served.result(0)


def test_a_timeout_gives_nothing_up(parents):
    with parents.lease("m"), ThreadPoolExecutor(1) as other:
        pending = parents.submit("m", PROMPT, 2)
        assert isinstance(other.submit(pending.result, 0.01).exception(60), TimeoutError)
    assert len(pending.result(60).token_ids) == 2
