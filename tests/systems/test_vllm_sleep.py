"""Which engines are awake, with engines that only note what is asked of them."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from tiny import CONFIGS, PROMPT

from djinn_lib.engine.models.spec import ModelSpec
from djinn_lib.errors import CapacityError, DjinnError
from djinn_lib.experiment.weights import describe
from djinn_lib.systems import vllm_sleep
from djinn_lib.systems.engine_process import EngineDied
from djinn_lib.systems.vllm_sleep import VllmSleep

MODELS = ("llama", "mistral", "phi")
OTHERS_BEGIN_WITHIN_S = (
    60.0  # a process begins by importing torch, which takes long on a busy machine
)


class NotedEngine:
    """Starts when all have begun to, and appends what happens to a file beside the models."""

    def __init__(self, files, options):
        self.name, self.notes = files.name, files.folder.parent / "notes.jsonl"
        self.note("start", **options)
        deadline_s = time.monotonic() + OTHERS_BEGIN_WITHIN_S
        while self.n_begun() < len(MODELS) and time.monotonic() < deadline_s:
            time.sleep(0.02)
        if (files.folder / "broken").exists():
            raise RuntimeError("no kernel for this device")
        self.note("started")

    def n_begun(self):
        return self.notes.read_text().count('"what": "start"')

    def note(self, what, **more):
        with self.notes.open("a") as notes:
            notes.write(json.dumps({"model": self.name, "what": what, **more}) + "\n")

    def sleep(self):
        self.note("sleep")

    def wake_up(self):
        self.note("wake_up")

    def generate(self, prompt_ids, n):
        if (self.notes.parent / self.name / "dies").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        self.note("generate")
        return tuple(range(n)), time.perf_counter(), time.perf_counter()

    def close(self):
        self.note("close")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, files = tmp_path_factory.mktemp("sleep"), {}
    for name in MODELS:
        ModelSpec(CONFIGS[name], "float32", seed=5).build().save_pretrained(folder / name)
        files[name] = describe(name, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_sleep, "ENGINE", f"{__name__}:NotedEngine")
        yield files
    assert not [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]


def notes(models):
    path = Path(models["llama"].folder.parent, "notes.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def since(models, n):
    return [(note["model"], note["what"]) for note in notes(models)[n:]]


def room_for_two(models):
    sizes = sorted(files.n_bytes for files in models.values())
    return sizes[-1] + sizes[-2]


@pytest.fixture(scope="module")
def system(models):
    system = VllmSleep(models, room_for_two(models), "cuda")
    system.start()
    yield system
    before = len(notes(models))
    system.close()
    assert sorted(since(models, before)) == [(name, "close") for name in sorted(models)]
    system.close()  # closing twice is harmless


@pytest.fixture
def asleep(system):
    system.reset()
    return system


def test_engines_start_together(models, system):
    begun = notes(models)
    assert [note["what"] for note in begun[:3]] == ["start"] * 3, "one waited for another"
    assert all(note["kv_cache_memory_bytes"] == 2 << 30 for note in begun[:3])
    assert not any(note["enforce_eager"] for note in begun[:3])
    assert sorted(since(models, 3)[:6]) == sorted(
        (name, what) for name in models for what in ("started", "sleep")
    )


def test_engines_stay_awake_while_they_fit_and_the_least_recent_sleeps_first(models, asleep):
    sizes = {name: files.n_bytes for name, files in models.items()}
    n = len(notes(models))
    first = asleep.serve("llama", PROMPT, 4)
    assert first.token_ids == (0, 1, 2, 3)
    assert (first.loaded_bytes, first.resident_before_bytes) == (sizes["llama"], 0)
    again = asleep.serve("llama", PROMPT, 4)
    assert (again.loaded_bytes, again.resident_before_bytes) == (0, sizes["llama"])
    assert asleep.serve("mistral", PROMPT, 4).evicted_bytes == 0
    third = asleep.serve("phi", PROMPT, 4)
    assert third.evicted_bytes == third.writeback_bytes == sizes["llama"]
    assert third.resident_bytes == {**sizes, "llama": 0}
    assert third.switch_ms <= third.ttft_ms <= third.total_ms
    assert since(models, n) == [
        ("llama", "wake_up"), ("llama", "generate"), ("llama", "generate"),
        ("mistral", "wake_up"), ("mistral", "generate"),
        ("llama", "sleep"), ("phi", "wake_up"), ("phi", "generate"),
    ]  # fmt: skip
    n = len(notes(models))
    asleep.reset()
    assert sorted(since(models, n)) == [("mistral", "sleep"), ("phi", "sleep")]


def test_the_naive_form_lets_all_others_sleep_at_every_change(models, asleep, monkeypatch):
    monkeypatch.setitem(asleep.options, "naive", True)
    monkeypatch.setattr(asleep, "capacity_bytes", 10 * room_for_two(models))
    n = len(notes(models))
    for name in ("llama", "llama", "phi", "llama"):
        asleep.serve(name, PROMPT, 1)
    slept = [note for note in since(models, n) if note[1] == "sleep"]
    assert slept == [("llama", "sleep"), ("phi", "sleep")]


def test_an_engine_that_died_fails_one_request_and_starts_anew(models, asleep):
    asleep.serve("phi", PROMPT, 2)
    dies = models["llama"].folder / "dies"
    dies.touch()
    with pytest.raises(EngineDied):
        asleep.serve("llama", PROMPT, 2)
    dies.unlink()
    served = asleep.serve("llama", PROMPT, 2)
    assert served.token_ids == (0, 1)
    assert served.resident_bytes["phi"] == models["phi"].n_bytes


def test_engines_that_take_the_whole_gpu_start_one_by_one_and_all_end_when_one_fails(models):
    two = {name: models[name] for name in ("llama", "mistral")}
    broken, n = models["mistral"].folder / "broken", len(notes(models))
    broken.touch()
    system = VllmSleep(two, room_for_two(models), "cuda", gpu_memory_utilization=0.8)
    try:
        with pytest.raises(DjinnError, match="no kernel for this device"):
            system.start()
    finally:
        system.close()
        broken.unlink()
    assert since(models, n) == [
        ("llama", "start"), ("llama", "started"), ("llama", "sleep"), ("mistral", "start"),
        ("llama", "close"),
    ]  # fmt: skip


def test_a_model_larger_than_the_capacity_is_refused_before_anything_starts(models):
    n = len(notes(models))
    system = VllmSleep(models, 100, "cuda")
    with pytest.raises(CapacityError, match="raise the capacity"):
        system.start()
    system.close()
    assert len(notes(models)) == n
