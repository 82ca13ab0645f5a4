"""Steps under leases: the worker's logic, over a worker that computes nothing, on a real ring."""

import os
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from ended_processes import until
from rings import Ring, forked

from djinn_lib.errors import ConfigError, PlatformError
from djinn_lib.fleet import vllm_hooks, vllm_processes, vllm_sleep_mode
from djinn_lib.fleet.vllm_worker import LeasedSteps


class Offloader:
    layers = ()

    def install(self):
        pass

    def begin(self, ring, ends, used):
        self.n_first_bytes = ring.n_bytes


class Worker:
    """What a worker of vLLM does, as far as it matters here; notes which steps held a lease."""

    def __init__(self, name, n_elements):
        parallel = SimpleNamespace(world_size=1)
        model = SimpleNamespace(served_model_name=[name], model=name)
        self.vllm_config = SimpleNamespace(
            parallel_config=parallel,
            model_config=model,
            compilation_config=SimpleNamespace(static_forward_context={}),
        )
        self.device, self.steps, self.fails = torch.device("cpu"), [], False
        self.model = torch.nn.Linear(n_elements, 1, bias=False)
        self.expected = self.model.weight.detach().clone()
        self.model_runner = SimpleNamespace(
            get_model=lambda: self.model, model_memory_usage=1 << 30
        )

    def init_device(self):
        self.steps.append("init_device")

    def load_model(self, **options):
        self.steps.append("load_model")

    def compute(self, what):
        if self.fails:
            raise RuntimeError("a step failed")
        assert self.ring._is_leased
        assert torch.equal(self.model.weight, self.expected)
        self.steps.append(what)

    def determine_available_memory(self):
        self.compute("profile")
        return 1

    def compile_or_warm_up_model(self):
        self.execute_model(tokens(1))  # as vLLM's second runner warms up
        self.execute_model(tokens(1))
        self.sample_tokens(None)
        self.compute("capture")
        return "times"

    def execute_dummy_batch(self):
        self.compute("dummy")

    def execute_model(self, scheduler_output):
        if scheduler_output.total_num_scheduled_tokens:
            self.compute("execute")
        return getattr(scheduler_output, "output", None)

    def sample_tokens(self, grammar):
        self.compute("sample")
        return "tokens"

    def shutdown(self):
        self.steps.append("shutdown")


class RingWorker(LeasedSteps, Worker):
    pass


def tokens(n, **more):
    return SimpleNamespace(total_num_scheduled_tokens=n, scheduled_new_reqs=[1], **more)


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    with Ring(tmp_path_factory.mktemp("ring"), forked) as ring:
        yield ring


@pytest.fixture
def make(ring, monkeypatch):
    monkeypatch.setenv("DJINN_RING", str(ring.socket))
    offloader = SimpleNamespace(RingOffloader=Offloader, UsedLayers=dict)
    monkeypatch.setitem(sys.modules, "djinn_lib.fleet.vllm_offloader", offloader)
    made = []

    def make(name, n_elements=1_500_000):  # of 10 frames: 6
        worker = RingWorker(name, n_elements)
        made.append(worker)
        worker.init_device()
        worker.load_model()
        return worker

    yield make
    for worker in made:
        worker.shutdown()
    until(lambda: not ring.status().models, "every worker left")


def state(ring, name):
    return next(one.state for one in ring.status().models if one.model == name)


def test_a_worker_starts_under_leases_and_rests_afterwards(ring, make):
    worker = make("a")
    assert worker.model_runner.model_memory_usage == (1 << 30) - 6_000_000
    worker.determine_available_memory()
    worker.compile_or_warm_up_model()
    assert worker.steps[2:] == ["profile", "execute", "execute", "sample", "capture"]
    until(lambda: state(ring, "a") == "idle", "others may have the lease")
    worker.execute_dummy_batch()


def test_a_step_ends_with_its_tokens_and_an_empty_one_gives_the_lease_back(ring, make):
    a, b = make("a"), make("b")
    a.execute_model(tokens(3))
    other = threading.Thread(target=lambda: (b.execute_model(tokens(1)), b.sample_tokens(None)))
    other.start()
    other.join(0.3)
    assert other.is_alive(), "a is between execute_model and sample_tokens"
    assert a.execute_model(tokens(1)) is None, "a second one before its tokens"
    a.sample_tokens(None)
    other.join(0.3)
    assert other.is_alive(), "the second one has no tokens yet"
    a.sample_tokens(None)
    other.join(20)
    assert not other.is_alive()
    b.execute_model(tokens(0))
    until(lambda: state(ring, "b") == "idle", "no request is left")


@pytest.mark.parametrize("when", ["execute_model", "sample_tokens"])
def test_a_step_that_fails_keeps_nobody_waiting(make, when):
    a, b = make("a"), make("b")
    a.fails = when == "execute_model"
    if when == "sample_tokens":
        a.execute_model(tokens(1))
        a.fails = True
    with pytest.raises(RuntimeError, match="a step failed"):
        a.execute_model(tokens(1)) if when == "execute_model" else a.sample_tokens(None)
    b.execute_model(tokens(1, output="done"))


def test_sleep_mode_frees_the_frames(ring, make):
    worker = make("a")
    worker.execute_model(tokens(1, output="done"))
    mode = worker.sleep_mode_backend
    mode.suspend(1)
    assert mode.state() == "SUSPENDED" and mode is worker.sleep_mode_backend
    until(lambda: ring.status().models[0].n_resident == 0, "no page is left")
    mode.resume(["kv_cache"])
    assert ring.status().models[0].n_resident == 0
    mode.resume()
    assert mode.state() == "RUNNING" and ring.status().models[0].n_resident == 6


def test_a_vllm_with_a_list_of_ways_to_sleep_finds_this_one(monkeypatch):
    known = {}

    class Factory:
        @staticmethod
        def register_backend(name, module, cls):
            if name in known:
                raise ValueError("already registered")
            known[name] = getattr(sys.modules[module], cls)

    listed = SimpleNamespace(SleepModeBackendFactory=Factory)
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.sleep_mode_backend", listed)
    vllm_sleep_mode.register()
    vllm_sleep_mode.register()  # vLLM loads plugins once a process, and says that it may be twice
    with pytest.raises(ConfigError, match="sleep_mode_backend='ring' needs the ring's worker"):
        known["ring"]()
    monkeypatch.setattr(vllm_hooks, "find", lambda hook: None)
    vllm_sleep_mode.register()  # an older one has no list


def test_what_cannot_be_on_a_ring_is_refused_first(make, monkeypatch):
    worker = RingWorker("split", 10)
    worker.vllm_config.parallel_config.world_size = 2
    with pytest.raises(ConfigError, match="split over 2"):
        worker.init_device()
    assert not worker.steps
    worker = RingWorker("zipped", 10)
    with monkeypatch.context() as patch:
        patch.setenv("DJINN_MASTERS", "zip")
        for step in (worker.init_device, worker.load_model):
            with pytest.raises(ConfigError, match=r"variable DJINN_MASTERS: .*'compressed'.*'zip'"):
                step()
    assert not worker.steps
    monkeypatch.delenv("DJINN_RING")
    with pytest.raises(ConfigError, match="DJINN_RING names no ring"):
        RingWorker("alone", 10).load_model()
    monkeypatch.setenv("DJINN_RING", "/nonexistent")
    with pytest.raises(ConfigError, match="no ring listens"):
        RingWorker("alone", 10).load_model()


def test_an_engine_whose_ring_is_gone_ends(monkeypatch, capsys):
    signals, ended = [], threading.Event()
    monkeypatch.setattr(vllm_processes, "_LAST_STEP_S", 0.01)
    monkeypatch.setattr(os, "kill", lambda pid, number: signals.append((pid, number)))
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    vllm_processes.end_process(ConfigError("the ring is gone"))
    assert signals and signals[0][0] == os.getpid() and ended.is_set()
    assert capsys.readouterr().err == "djinn: the ring is gone\n"


def test_a_hook_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(vllm_hooks, "version", lambda: "0.9.0")
    hooks = ("os.path:join", "os.path:no_such_hook")
    with pytest.raises(PlatformError, match=r"vLLM 0\.9\.0 has no os\.path\.no_such_hook"):
        vllm_hooks.require(hooks)
    with pytest.raises(PlatformError, match="no_such_module"):
        vllm_hooks.require(("no_such_module:x",))
    vllm_hooks.require(hooks[:1])


def test_a_vllm_that_is_broken_is_not_taken_for_an_old_one(monkeypatch, tmp_path):
    (tmp_path / "of_vllm.py").write_text("import no_such_library")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PlatformError, match=r"cannot be imported \(No module named 'no_such_lib"):
        vllm_hooks.require(("of_vllm:x",))
