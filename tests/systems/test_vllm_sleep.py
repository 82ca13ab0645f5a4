"""`vllm_sleep` with engines that only note what is asked of them."""

import threading
import time
from concurrent.futures import Future

import pytest
from tiny import PROMPT, saved

from djinn_lib.errors import CapacityError, ConfigError, DjinnError
from djinn_lib.experiment.setup.weights import describe
from djinn_lib.fleet import environment
from djinn_lib.fleet.engines import EngineDied
from djinn_lib.systems import vllm_sleep
from djinn_lib.systems.vllm_sleep import VllmSleep

MODELS = ("llama", "mistral", "phi")
SOON_S = 20.0


class NotedEngine:
    """An engine in this process; `notes` holds what happened to all of them."""

    notes: list = []  # noqa: RUF012
    together: threading.Barrier | None = None
    fails: dict = {}  # noqa: RUF012

    def __init__(self, name, python, options, log, variables):
        self.name, self.asked, self.holds = name, [], False
        self.variables = variables
        self.note("start", **options)
        if NotedEngine.together:
            NotedEngine.together.wait(SOON_S)
        self.fail_if("start")
        self.note("started")

    def note(self, what, **more):
        NotedEngine.notes.append((self.name, what, more))

    def fail_if(self, what):
        if NotedEngine.fails.get(self.name) == what:
            raise EngineDied(f"{what} failed")

    def call(self, method, *arguments):
        self.note(method)
        self.fail_if(method)

    def submit(self, prompt, parameters):
        self.note("generate")
        pending = Future()
        if NotedEngine.fails.get(self.name) == "generate":
            pending.set_exception(EngineDied("generate failed"))
        else:
            now_s = time.perf_counter()
            ids = list(range(parameters["max_tokens"]))
            result = {"token_ids": ids, "first_s": now_s, "last_s": now_s}
            if self.holds:
                self.asked.append((pending, result))
            else:
                pending.set_result(result)
        return pending

    def ask_to_end(self):
        self.note("ask_to_end")

    def close(self):
        self.note("close")


@pytest.fixture(scope="module")
def models():
    return {name: describe(name, saved(name)) for name in MODELS}


@pytest.fixture(autouse=True)
def noted(monkeypatch):
    monkeypatch.setattr(vllm_sleep, "EngineClient", NotedEngine)
    monkeypatch.setattr(environment, "vllm_python", lambda: "python")
    monkeypatch.setattr(NotedEngine, "notes", [])
    monkeypatch.setattr(NotedEngine, "fails", {})
    monkeypatch.setattr(NotedEngine, "together", None)


def said(since=0):
    return [(name, what) for name, what, _ in NotedEngine.notes[since:]]


def room_for_two(models):
    sizes = sorted(files.n_bytes for files in models.values())
    return sizes[-1] + sizes[-2]


@pytest.fixture
def system(models, noted):
    system = VllmSleep(models, room_for_two(models), "cuda")
    system.start()
    yield system
    system.close()
    system.close()  # closing twice is harmless
    closed = [name for name, what in said() if what == "close"]
    assert set(closed) >= set(models)


def test_engines_start_together_and_sleep_as_soon_as_they_run(models, noted):
    NotedEngine.together = threading.Barrier(3)
    system = VllmSleep(models, room_for_two(models), "cuda")
    system.start()
    options = [more for _, what, more in NotedEngine.notes if what == "start"]
    assert all(one["kv_cache_memory_bytes"] == 2 << 30 for one in options)
    assert all(one["enable_sleep_mode"] and not one["enforce_eager"] for one in options)
    assert not any("naive" in one or "max_wait_s" in one for one in options)
    assert sorted(said(3)) == sorted((n, what) for n in MODELS for what in ("started", "sleep"))
    system.close()


def test_another_capacity_needs_no_new_engines(models, system):
    sizes = {name: files.n_bytes for name, files in models.items()}
    for name in MODELS:
        system.serve(name, PROMPT, 2)
    system.resize(sum(sizes.values()))
    assert not system.order.awake and system.capacity_bytes == sum(sizes.values())
    n = len(NotedEngine.notes)
    for name in (*MODELS, *MODELS):
        system.serve(name, PROMPT, 2)
    assert [what for _, what in said(n)].count("wake_up") == 3  # all fit
    assert not {"start", "sleep"} & {what for _, what in said(n)}
    with pytest.raises(CapacityError, match="raise the capacity"):
        system.resize(max(sizes.values()) - 1)
    assert system.capacity_bytes == sum(sizes.values())
    assert system.serve("llama", PROMPT, 2).loaded_bytes == 0  # as before


@pytest.mark.parametrize(("chosen", "expected"), [({}, "0"), ({"core_process": True}, "1")])
def test_the_core_of_an_engine_runs_apart_if_asked(models, noted, chosen, expected):
    system = VllmSleep(models, room_for_two(models), "cuda", **chosen)
    system.start()
    variables = [engine.variables for engine in system.engines.values()]
    assert {one["VLLM_ENABLE_V1_MULTIPROCESSING"] for one in variables} == {expected}
    assert not any("core_process" in more for _, _, more in NotedEngine.notes)
    system.close()


def test_engines_stay_awake_while_they_fit_and_the_least_recent_sleeps_first(models, system):
    sizes, n = {name: files.n_bytes for name, files in models.items()}, len(NotedEngine.notes)
    first = system.serve("llama", PROMPT, 4)
    assert first.token_ids == (0, 1, 2, 3)
    assert (first.loaded_bytes, first.resident_before_bytes) == (sizes["llama"], 0)
    again = system.serve("llama", PROMPT, 4)
    assert (again.loaded_bytes, again.resident_before_bytes) == (0, sizes["llama"])
    assert system.serve("mistral", PROMPT, 4).evicted_bytes == 0
    third = system.serve("phi", PROMPT, 4)
    assert third.evicted_bytes == third.writeback_bytes == sizes["llama"]
    assert third.resident_bytes == {**sizes, "llama": 0}
    assert third.switch_ms <= third.ttft_ms <= third.total_ms
    assert said(n) == [
        ("llama", "wake_up"), ("llama", "generate"), ("llama", "generate"),
        ("mistral", "wake_up"), ("mistral", "generate"),
        ("llama", "sleep"), ("phi", "wake_up"), ("phi", "generate"),
    ]  # fmt: skip
    n = len(NotedEngine.notes)
    system.reset()
    assert sorted(said(n)) == [("mistral", "sleep"), ("phi", "sleep")]


def test_requests_for_an_awake_engine_are_handed_over_while_it_computes(models, system):
    system.engines["llama"].holds = True
    asked = [system.submit(None, "llama", PROMPT, 2) for _ in range(3)]
    asked.append(system.submit(None, "phi", PROMPT, 2))
    engine = system.engines["llama"]
    until_s = time.monotonic() + SOON_S
    while len(engine.asked) < 3:
        assert time.monotonic() < until_s
        time.sleep(0.01)
    assert asked[3].result(SOON_S).token_ids == (0, 1), "there is room for it beside llama"
    for pending, result in engine.asked:
        pending.set_result(result)
    served = [one.result(SOON_S) for one in asked[:3]]
    assert [one.loaded_bytes for one in served] == [models["llama"].n_bytes, 0, 0]


@pytest.mark.parametrize("fails", ["wake_up", "generate"])
def test_an_engine_that_fails_fails_its_request_and_is_started_anew(system, fails):
    system.serve("phi", PROMPT, 2)
    NotedEngine.fails = {"llama": fails}
    with pytest.raises(EngineDied, match=fails):
        system.serve("llama", PROMPT, 2)
    NotedEngine.fails, n = {}, len(NotedEngine.notes)
    served = system.serve("llama", PROMPT, 2)
    assert served.token_ids == (0, 1)
    assert [what for _, what in said(n)] == ["start", "started", "sleep", "wake_up", "generate"]
    assert served.resident_bytes["phi"] > 0


def test_a_victim_that_cannot_sleep_is_ended_for_its_memory(system):
    system.serve("llama", PROMPT, 1)
    NotedEngine.fails = {"llama": "sleep"}
    system.reset()
    assert said()[-1] == ("llama", "close")
    NotedEngine.fails = {}
    assert system.serve("llama", PROMPT, 1).resident_before_bytes == 0


def test_an_answer_that_would_be_cut_short_is_refused(models, noted):
    system = VllmSleep(models, room_for_two(models), "cuda", max_model_len=len(PROMPT) + 2)
    system.start()
    assert len(system.serve("llama", PROMPT, 2).token_ids) == 2
    with pytest.raises(ConfigError, match="raise the option max_model_len"):
        system.serve("llama", PROMPT, 3)
    assert ("llama", "close") not in said()
    system.close()


def test_engines_that_take_the_whole_gpu_start_one_by_one_and_all_end_when_one_fails(models, noted):
    two = {name: models[name] for name in ("llama", "mistral")}
    NotedEngine.fails = {"mistral": "start"}
    system = VllmSleep(two, room_for_two(models), "cuda", gpu_memory_utilization=0.8)
    try:
        with pytest.raises(DjinnError, match="start failed"):
            system.start()
    finally:
        system.close()
    assert said() == [
        ("llama", "start"), ("llama", "started"), ("llama", "sleep"), ("mistral", "start"),
        ("llama", "ask_to_end"), ("llama", "close"),
    ]  # fmt: skip


def test_a_model_larger_than_the_capacity_is_refused_before_anything_starts(models, noted):
    system = VllmSleep(models, 100, "cuda")
    with pytest.raises(CapacityError, match="raise the capacity"):
        system.start()
    system.close()
    assert not said()
