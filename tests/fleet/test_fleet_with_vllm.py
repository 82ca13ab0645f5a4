"""The fleet with a real vLLM on the CPU; skipped where there is none (`make vllm`)."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ended_processes import assert_nothing_is_left, descendants, until
from fleet_models import (
    CONFIGS,
    OPTIONS,
    VOCAB,
    WITH_TOKENIZER,
    n_bytes_of,
    plain_tokens,
    save_models,
)

from djinn_lib.errors import CapacityError, ConfigError, DjinnError
from djinn_lib.fleet import environment
from djinn_lib.fleet.engines import EngineDied
from djinn_lib.fleet.fleet import Fleet
from djinn_lib.paths import REPO

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]
N_NEW = 12
PROMPTS = [[seed + i for i in range(3 + seed % 5)] for seed in range(2, VOCAB - 20, 37)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def expected(folders, tmp_path_factory):
    logs = tmp_path_factory.mktemp("plain")
    with ThreadPoolExecutor(2) as threads:
        said = threads.map(
            lambda name: plain_tokens(name, folders[name], PROMPTS, N_NEW, logs / f"{name}.log"),
            folders,
        )
        return dict(zip(folders, said, strict=True))


@pytest.fixture(scope="module")
def fleet(folders):
    capacity = int(0.6 * sum(map(n_bytes_of, folders.values())))
    with Fleet(
        capacity, "cpu", page="256KiB", quantum_s=0.02, max_wait_s=0.5, progress=lambda step: None
    ) as fleet:
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda name: fleet.add(name, folders[name], **OPTIONS), folders))
        yield fleet
        processes = descendants()
        folder = fleet.socket.parent
    assert_nothing_is_left(processes, folder)


def ask(fleet, name, i):
    return fleet.generate(name, PROMPTS[i], N_NEW, ignore_eos=True).token_ids


def test_the_architectures_do_not_fit_together_and_say_what_they_say_alone(fleet, expected):
    for _ in range(2):
        for name in CONFIGS:
            generations = fleet.generate(name, PROMPTS, N_NEW, ignore_eos=True)
            assert [one.token_ids for one in generations] == expected[name]
    stats = fleet.stats().set_index("model")
    assert (stats.switches > 1).all() and stats.evicted_bytes.sum() > 0
    residency = fleet.residency().set_index("model")
    assert residency.resident_bytes.sum() < 0.7 * residency.bytes.sum()


def test_eight_threads_and_300_requests_to_all_models(fleet, expected):
    names = list(CONFIGS)
    tasks = [(names[i % len(names)], i % len(PROMPTS)) for i in range(300)]
    with ThreadPoolExecutor(8) as threads:
        said = list(threads.map(lambda task: ask(fleet, *task), tasks))
    wrong = [
        task for task, ids in zip(tasks, said, strict=True) if ids != expected[task[0]][task[1]]
    ]
    assert not wrong
    stats = fleet.stats().set_index("model")
    assert (stats.revoked > 0).any(), "leases changed hands in the middle of requests"
    assert stats.longest_wait_s.max() < 10


def test_requests_cost_what_the_ring_loaded(fleet):
    fleet.generate("llama", PROMPTS[0], 2)
    again = fleet.generate("llama", PROMPTS[0], N_NEW, ignore_eos=True)
    assert again.loaded_bytes == 0 and again.evicted_bytes == 0
    assert again.resident_before_bytes > 0
    assert 0 <= again.queue_ms <= again.ttft_ms <= again.total_ms
    assert again.switch_ms < again.ttft_ms
    for name in ("qwen3", "gpt2", "mixtral"):
        fleet.generate(name, PROMPTS[0], 2)
    cold = fleet.generate("llama", PROMPTS[0], 2)
    assert cold.loaded_bytes > 0 and cold.evicted_bytes > 0 and cold.switch_ms > 0


def test_an_engine_that_sleeps_frees_its_frames_and_wakes_up_whole(fleet, expected):
    engine = fleet.engine("qwen3")
    resident = lambda: fleet.status().resident_bytes()["qwen3"]  # noqa: E731
    engine.call("sleep", 1)
    until(lambda: resident() == 0, "no page is left")
    engine.call("wake_up")
    assert resident() == fleet.residency().set_index("model").bytes["qwen3"]
    assert ask(fleet, "qwen3", 2) == expected["qwen3"][2]


def test_text_in_and_text_out_and_as_it_comes(fleet):
    whole = fleet.generate(WITH_TOKENIZER, "Hello", 8, ignore_eos=True)
    assert len(whole.token_ids) == 8 and whole.text
    assert "".join(fleet.stream(WITH_TOKENIZER, "Hello", 8, ignore_eos=True)) == whole.text
    parts = list(fleet.stream("gpt2", PROMPTS[0], 4, ignore_eos=True))
    assert len([one for part in parts for one in part]) == 4
    sampled = [
        fleet.generate("gpt2", PROMPTS[0], 8, ignore_eos=True, temperature=1.0, seed=seed).token_ids
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_model_that_cannot_be_added_is_one_message_and_leaves_nothing(fleet, folders, tmp_path):
    n_processes = len(descendants())
    for name, source, options, kind, says in [
        ("llama", folders["llama"], {}, ConfigError, "choose another name"),
        ("x", tmp_path, {}, ConfigError, "config.json"),
        ("x", folders["llama"], {"tensor_parallel_size": 2}, ConfigError, "one device"),
        ("x", folders["llama"], {"worker_cls": "y"}, ConfigError, "leave it out"),
        ("x", folders["llama"], {"no_such_option": 1}, EngineDied, "no_such_option"),
        ("x", folders["llama"], {**OPTIONS, "max_model_len": 10**6}, EngineDied, "max_model_len"),
    ]:
        with pytest.raises(kind, match=says):
            fleet.add(name, source, **options)
    until(lambda: len(descendants()) == n_processes, "its process is gone")
    assert fleet.models == list(CONFIGS) or set(fleet.models) == set(CONFIGS)
    assert len(fleet.status().models) == len(CONFIGS)


def test_a_model_larger_than_the_ring(folders):
    before = descendants()
    with Fleet("1MiB", "cpu", progress=lambda step: None) as small:
        with pytest.raises(CapacityError, match=r"'gpt2' did not start.*raise the capacity"):
            small.add("gpt2", folders["gpt2"], **OPTIONS)
        processes, folder = set(descendants()) - set(before), small.socket.parent
    assert_nothing_is_left(processes, folder)


def test_an_engine_killed_in_mid_step_fails_its_own_requests_only(fleet, folders, expected):
    stop, failed = threading.Event(), []

    def go_on(name):
        while not stop.is_set():
            if ask(fleet, name, 2) != expected[name][2]:
                failed.append(name)

    others = [threading.Thread(target=go_on, args=(name,)) for name in ("llama", "gpt2")]
    for one in others:
        one.start()
    victim = fleet.engine("mixtral")
    asked = fleet.submit("mixtral", PROMPTS, 50, ignore_eos=True)
    until(lambda: any(m.model == "mixtral" and m.state == "holding" for m in fleet.status().models),
          "mixtral computes")  # fmt: skip
    os.kill(victim.pid, signal.SIGKILL)
    try:
        for one in asked:
            with pytest.raises(EngineDied, match=r"exit status -9.*add it again"):
                one.result(60)
        until(lambda: len(fleet.status().models) == 3, "its frames are free")
        with pytest.raises(EngineDied):
            ask(fleet, "mixtral", 0)
        time.sleep(0.5)
    finally:
        stop.set()
        for one in others:
            one.join(60)
    assert not failed
    fleet.remove("mixtral")
    fleet.add("mixtral", folders["mixtral"], **OPTIONS)
    assert ask(fleet, "mixtral", 3) == expected["mixtral"][3]


def test_a_broker_that_dies_ends_everything_with_one_message(folders):
    before = descendants()
    fleet = Fleet("20MiB", "cpu", progress=lambda step: None)
    try:
        fleet.add("llama", folders["llama"], **OPTIONS)
        processes = set(descendants()) - set(before)
        asked = fleet.submit("llama", PROMPTS, 50, ignore_eos=True)
        fleet._ring.process.kill()
        with pytest.raises(EngineDied, match=r"\): the broker of the ring ended.*start it again"):
            for one in asked:
                one.result(60)
        with pytest.raises(DjinnError):
            fleet.generate("llama", PROMPTS[0], 5)
        until(lambda: not fleet.engine("llama").is_alive, "its engine ended")
    finally:
        folder = fleet.socket.parent
        fleet.close()
    assert_nothing_is_left(processes, folder)
    with pytest.raises(DjinnError, match="was closed"):
        fleet.generate("llama", PROMPTS[0], 5)


def test_layers_compute_while_later_ones_load(folders):
    script = Path(__file__).parents[1] / "support" / "vllm_overlap.py"
    with Fleet("20MiB", "cpu", page="256KiB", progress=lambda step: None) as fleet:
        variables = {
            "DJINN_RING": str(fleet.socket), "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
        }  # fmt: skip
        done = subprocess.run(
            [environment.vllm_python(), script, folders["llama"]],
            env=os.environ | variables, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["cold"] == said["hit"]
    assert len(said["waits"]) == 4 and min(said["waits"]) > 0.02, "each waits for its own pages"


def test_a_pass_waits_at_the_attention_of_each_layer_for_the_next_one():
    script = Path(__file__).parents[1] / "support" / "vllm_waits.py"
    done = subprocess.run(
        [environment.vllm_python(), script],
        env=os.environ | {"PYTHONPATH": str(REPO)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said == {
        "order unknown": [35, 20, 30, 35],
        "order known": [10, 20, 30, 35],
        "without graphs": [None, 20, 20, 30, 35],
        "captured as one graph": [10, None],
        "one graph": [10, None],
        "outside of a pass": [],
        "after a layer was left out": [35, 20, 30, 35],
        "attention within the graphs": [35],
        "no whole pass": [35],
        "two stacks, layers without attention": [30, 50, 65],
        "no attention": [25],
    }


PROGRAM = """
import sys, time
from djinn_lib.fleet.fleet import Fleet
fleet = Fleet("20MiB", "cpu")
fleet.add("llama", sys.argv[1], dtype="float32", max_model_len=64)
print(fleet.socket.parent, flush=True)
while True: fleet.generate("llama", [5, 6, 7], 20, ignore_eos=True)
"""


def test_a_kernel_that_is_killed_leaves_nothing(folders):
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, folders["llama"]], stdout=subprocess.PIPE, text=True
    )
    with program:
        assert "starting" in program.stdout.readline()
        folder = Path(program.stdout.readline().strip())
        processes = descendants(program.pid)
        assert len(processes) == 2 and folder.exists()
        time.sleep(0.5)
        program.kill()
    assert_nothing_is_left(processes, folder)
