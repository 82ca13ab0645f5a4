"""Many requests at once: the same tokens, no deadlock, nobody starved, nothing left behind."""

import asyncio
import random
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from contextlib import ExitStack

import pytest
from open_files import n_open
from tiny import PROMPT, ordinary_tokens, saved

import djinn_lib as dj
from djinn_lib.engine.decode.decoder import EagerDecoder
from djinn_lib.engine.memory.devices import base
from djinn_lib.errors import ConfigError, DjinnError, LeaseError, RequestCancelled

NAMES = ["llama", "phi", "opt", "qwen2-tied"]


@pytest.fixture(scope="module")
def expected():
    return {name: ordinary_tokens(saved(name), 6) for name in NAMES}


def made(names=NAMES, **options):
    """A `Djinn` that two of the four models fill."""
    djinn = dj.Djinn("1200KiB", "cpu", "16KiB", progress=False, **options)
    for name in names:
        djinn.add(name, saved(name))
    return djinn


@pytest.fixture(scope="module")
def shared():
    with made() as djinn:
        yield djinn


@pytest.fixture
def djinn(shared):
    """One for tests that leave its options as they are; nothing is resident."""
    shared.reset()
    yield shared
    shared.check()
    assert not shared.stats().leased


@pytest.fixture
def opened():
    """Opens one of other options."""
    with ExitStack() as stack:

        def open_djinn(**options):
            return stack.enter_context(made(**options))

        yield open_djinn


def until(condition):
    for _ in range(20_000):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("did not happen within 20 s")


@pytest.mark.parametrize(
    "options",
    [{}, {"order": "affinity", "eviction": "models"}, {"lookahead": False, "overlap": False}],
    ids=str,
)
def test_requests_from_many_threads(opened, expected, options):
    djinn, failures = opened(**options), []

    def client(seed):
        rng = random.Random(seed)
        for _ in range(8):
            name = rng.choice(NAMES)
            g = djinn.generate(name, PROMPT, 6, ignore_eos=True)
            if g.token_ids != expected[name] or g.total_ms < g.queue_ms:
                failures.append((name, g))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(client, range(4)))
    assert not failures


def test_two_threads_compute_at_most_whoever_asks(djinn, expected, monkeypatch):
    idents = []
    generate = EagerDecoder.generate

    def noting(*args, **options):
        idents.append(threading.get_ident())
        return generate(*args, **options)

    monkeypatch.setattr(EagerDecoder, "generate", noting)
    djinn.generate("phi", PROMPT, 6, ignore_eos=True)
    assert idents == [threading.get_ident()]  # who asks first is served in its own thread
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda _: djinn.generate("phi", PROMPT, 6), range(6)))
    djinn.submit("phi", PROMPT, 6).result(60)
    assert len(idents) == 8 and len(set(idents)) == 2


def test_what_is_called_when_a_request_ends_may_ask_again(djinn, expected):
    again = []
    djinn.generate("phi", PROMPT, 6)

    def ask(_):
        again.append(djinn.generate("opt", PROMPT, 6, ignore_eos=True).token_ids)

    pending = djinn.submit("llama", PROMPT, 6)
    pending.add_done_callback(ask)
    pending.result(60)
    djinn.submit("llama", PROMPT, 6).result(60)
    assert again == [expected["opt"]]


def test_the_traceback_of_an_interrupt_keeps_nothing_of_the_computation(djinn, expected):

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EagerDecoder, "generate", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            djinn.generate("llama", PROMPT, 6)
    assert [frame.name for frame in caught.traceback][-1] == "generate"
    assert "interrupted" not in [frame.name for frame in caught.traceback]
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert not djinn.stats().leased
    assert djinn.generate("llama", PROMPT, 6, ignore_eos=True).token_ids == expected["llama"]


def test_requests_from_asyncio(opened, expected):
    djinn = opened(order="affinity")
    models = random.Random(0).choices(NAMES, k=12)

    async def ask():
        return await asyncio.gather(
            *(djinn.agenerate(name, PROMPT, 6, ignore_eos=True) for name in models)
        )

    for name, g in zip(models, asyncio.run(ask()), strict=True):
        assert g.token_ids == expected[name]


def test_a_request_that_waits_can_be_cancelled(djinn, expected):
    with djinn.lease("llama"):
        first, second = (djinn.submit(name, PROMPT, 6, True) for name in ("phi", "opt"))
        assert first.cancel() and first.cancelled()
        assert first.cancel()  # twice is harmless
        assert wait([first], 10).done == {first}
    with pytest.raises(CancelledError):
        first.result(60)
    assert second.result(60).token_ids == expected["opt"]
    assert not second.cancel()


def test_a_request_that_is_served_ends_and_gives_its_lease_back(djinn, expected):
    pending = djinn.submit("llama", PROMPT, 400, ignore_eos=True)
    until(lambda: "llama" in djinn.stats().leased)
    assert not pending.cancel()
    with pytest.raises(RequestCancelled, match="cancelled"):
        pending.result(60)
    assert "llama" not in djinn.stats().leased
    assert djinn.generate("llama", PROMPT, 6, ignore_eos=True).token_ids == expected["llama"]


def test_cancelling_a_task_frees_its_lease(djinn):
    async def give_up(after_s):
        task = asyncio.create_task(djinn.agenerate("llama", PROMPT, 400, ignore_eos=True))
        await asyncio.sleep(after_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await djinn.agenerate("llama", PROMPT, 2, ignore_eos=True)

    for after_s in (0.0, 0.05):
        assert len(asyncio.run(give_up(after_s)).token_ids) == 2


def test_an_old_request_is_overtaken_only_so_often(opened):
    djinn = opened(order="affinity", max_overtaken=3, lookahead=False)
    done = []
    djinn.reset()
    djinn.generate("llama", PROMPT, 1)
    with djinn.lease("llama"):
        old = djinn.submit("phi", PROMPT, 2)
        hits = [djinn.submit("llama", PROMPT, 2) for _ in range(8)]
        for i, future in enumerate([old, *hits]):
            future.add_done_callback(lambda _, i=i: done.append(i))
    wait([old, *hits], 60)
    assert done == [1, 2, 3, 0, 4, 5, 6, 7, 8]


def test_what_waits_is_loaded_behind_what_computes(djinn, expected):
    n_bytes = djinn.residency().set_index("model").bytes["phi"]
    with djinn.lease("opt"):
        pending = djinn.submit("phi", PROMPT, 6, ignore_eos=True)
        until(lambda: djinn["phi"].resident_bytes == n_bytes)
    g = pending.result(60)
    assert g.token_ids == expected["phi"]
    assert (g.prefetched_bytes, g.loaded_bytes, g.resident_before_bytes) == (n_bytes, n_bytes, 0)
    assert djinn.generate("phi", PROMPT, 2).loaded_bytes == 0


def test_without_lookahead_nothing_is_loaded_ahead(opened):
    djinn = opened(lookahead=False)
    djinn.reset()
    with djinn.lease("opt"):
        pending = djinn.submit("phi", PROMPT, 2)
        time.sleep(0.05)
        assert djinn.residency().set_index("model").resident_bytes["phi"] == 0
    assert pending.result(60).prefetched_bytes == 0


def test_a_copy_ahead_that_fails_costs_nobody_a_request(djinn, expected, monkeypatch):
    real = base.copy_page
    failing = threading.Event()

    def copy_page(target, source):
        if failing.is_set():
            raise OSError(5, "Input/output error")
        real(target, source)

    monkeypatch.setattr(base, "copy_page", copy_page)
    with djinn.lease("opt"):
        djinn.wait("opt")
        failing.set()
        pending = djinn.submit("phi", PROMPT, 6, ignore_eos=True)
        until(lambda: "phi" in djinn.stats().loading)
        time.sleep(0.05)  # for the copy to fail; the request is served either way
        failing.clear()
    assert pending.result(60).token_ids == expected["phi"]


def test_who_holds_a_lease_cannot_wait_for_a_request(djinn, expected):
    done = []
    with djinn.lease("llama"):
        pending = djinn.submit("phi", PROMPT, 6, ignore_eos=True)
        pending.add_done_callback(done.append)  # which may be left
        for ask in (pending.result, pending.exception):
            with pytest.raises(LeaseError, match="would wait for the lease"):
                ask()
        assert djinn.generate("opt", PROMPT, 6, ignore_eos=True).token_ids == expected["opt"]
    assert pending.exception(60) is None and done == [pending]
    assert pending.result(60).token_ids == expected["phi"]


async def through_a_future(djinn):
    return await asyncio.wrap_future(djinn.submit("phi", PROMPT, 6))


async def through_a_task(djinn):
    return await asyncio.wait_for(djinn.agenerate("phi", PROMPT, 6), 60)


async def with_others(djinn):
    return await asyncio.gather(*(djinn.agenerate(name, PROMPT, 6) for name in NAMES))


async def in_a_thread(djinn):
    return await asyncio.to_thread(djinn.generate, "phi", PROMPT, 6)


async def by_a_lease_in_a_thread(djinn):
    return await asyncio.to_thread(djinn.lease("phi").__enter__)


ASKS = [lambda djinn: djinn.agenerate("phi", PROMPT, 6), through_a_future, through_a_task,
        with_others, in_a_thread, by_a_lease_in_a_thread]  # fmt: skip


@pytest.mark.parametrize("leased_in_the_loop", [True, False])
def test_a_coroutine_that_would_wait_for_its_own_lease(djinn, expected, leased_in_the_loop):

    async def hold(ask):
        with djinn.lease("llama"):
            await ask(djinn)

    for ask in ASKS:
        with pytest.raises(LeaseError, match="would wait for the lease"):
            if leased_in_the_loop:
                asyncio.run(hold(ask))
            else:
                with djinn.lease("llama"):
                    asyncio.run(ask(djinn))
        assert djinn.generate("opt", PROMPT, 6, ignore_eos=True).token_ids == expected["opt"]


def test_close_serves_what_is_being_served_and_fails_the_rest(expected):
    def held():
        names = [t.name for t in threading.enumerate() if t.name.startswith("djinn")]
        return n_open(), sorted(names)

    def cycle():
        djinn = made(["llama", "phi"])
        pending = [djinn.submit(name, PROMPT, 6, True) for name in ("llama", "phi", "phi")]
        until(lambda: djinn.stats().leased or pending[0].done())
        djinn.close()
        assert pending[0].result(60).token_ids == expected["llama"]
        for future in pending[1:]:
            if future.exception(60):
                with pytest.raises(DjinnError, match="closed"):
                    future.result(0)
        with pytest.raises(DjinnError):
            djinn.generate("llama", PROMPT, 2)

    cycle()
    before = held()
    cycle()
    assert held() == before


def test_models_that_come_and_go_while_others_are_asked(expected, caplog):
    """Nobody hangs, and whoever gets tokens gets those of the model that was asked."""
    failures, stop = [], threading.Event()
    with made(["llama", "phi"], order="affinity", decode="eager") as djinn:

        def ask(seed):
            rng = random.Random(seed)
            while not stop.is_set():
                name = rng.choice(["llama", "phi", "guest"])
                try:
                    g = djinn.generate(name, PROMPT, 6, ignore_eos=True)
                except ConfigError as error:  # a guest who has left, or is another one by now
                    if name != "guest":
                        failures.append((name, error))
                    continue
                except BaseException as error:
                    failures.append((name, error))
                    return
                if g.token_ids not in (
                    [expected[n] for n in ("opt", "qwen2-tied")]
                    if name == "guest"
                    else [expected[name]]
                ):
                    failures.append((name, g))

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for i in range(4):
            djinn.add("guest", saved(("opt", "qwen2-tied")[i % 2]))
            time.sleep(0.05)
            while True:
                try:
                    djinn.remove("guest")
                    break
                except LeaseError:  # it is being asked
                    time.sleep(0.001)
        stop.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        djinn.check()
    assert not failures, failures[:3]
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]


def test_a_request_is_not_served_by_another_model_of_the_same_name(expected):
    with made(["llama", "phi"], decode="eager") as djinn:
        with djinn.lease("llama"):
            pending = djinn.submit("phi", PROMPT, 6, ignore_eos=True)
            djinn.remove("phi")
            djinn.add("phi", saved("opt"))
        with pytest.raises(ConfigError, match="another model of that name"):
            pending.result(60)
        g = djinn.generate("phi", PROMPT, 6, ignore_eos=True)
        assert g.token_ids == expected["opt"]
