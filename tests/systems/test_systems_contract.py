"""One contract for every system under test, on tiny models."""

import json
import math
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from fleet_models import WITH_VLLM
from tiny import CONFIGS, PROMPT, VOCAB, ordinary_tokens
from transformers import AutoModelForCausalLM

from djinn_lib.engine.memory.layout import ALIGNMENT_BYTES
from djinn_lib.engine.models.spec import ModelSpec
from djinn_lib.errors import CapacityError, ConfigError, DjinnError
from djinn_lib.experiment.cells.arrivals import send
from djinn_lib.experiment.setup.weights import describe
from djinn_lib.fleet import environment
from djinn_lib.paths import REPO
from djinn_lib.rows import classify_error
from djinn_lib.systems import SYSTEMS, resizes, system_class
from djinn_lib.systems.serverless import drop_page_cache
from djinn_lib.trace import Request

N_NEW = 5
ACTORS = ("ray_actors", {})
VARIANTS = [
    ("djinn", {"page": "16KiB"}),
    ("djinn", {"page": "16KiB", "overlap": False, "embeddings": "ring"}),
    ("djinn", {"page": "16KiB", "eviction": "models", "order": "affinity"}),
    ("pytorch_pinned", {}),
    ("pytorch_pinned_readonly", {}),
    ("pytorch_lru", {}),
    ("pytorch_lru", {"decode": "eager"}),
    ("pytorch_lru", {"decode": "graph"}),
    ("pytorch_pageable", {}),
    ("serverless", {"page_cache": "warm"}),
    ("serverless", {"page_cache": "cold"}),
    ("serverless", {"device_map": True}),
    ACTORS,
    ("vllm_recreate", {}),
    ("vllm_sleep", {}),
]  # WITH_VLLM has the others, for test_systems_with_vllm.py
WRITES_BACK = {"pytorch_pinned", "pytorch_pageable"}
KEEPS_TO_CAPACITY = {"djinn", "pytorch_lru", "ray_actors"}
# vLLM has no attention kernel on the CPU for heads as narrow as those of tiny.py.
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}


def ids_of(variant):
    name, options = variant
    return "-".join([name, *(str(v) for k, v in options.items() if k != "page")])


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    root, files = tmp_path_factory.mktemp("systems"), {}
    for name in ("llama", "mistral", "phi"):
        config = {**CONFIGS[name].to_dict(), **HEADS}
        ModelSpec(config, "float32", seed=5).build().save_pretrained(root / name)
        files[name] = describe(name, root / name)
    return files


@pytest.fixture(scope="session")
def expected(models):
    """Tokens of each model loaded the ordinary way."""
    tokens = {name: ordinary_tokens(files.folder, N_NEW) for name, files in models.items()}
    assert len({len(set(t)) for t in tokens.values()} - {1}) > 0
    return tokens


@pytest.fixture(scope="session")
def capacity_bytes(models):
    """Room for any one model and a half of another: the two largest do not fit together."""
    sizes = sorted(files.n_bytes for files in models.values())
    return sizes[-1] + sizes[-2] // 2


def marked(variant):
    """Ray's actors take a minute to start again and again."""
    return pytest.param(variant, marks=[pytest.mark.slow] if variant[0] == "ray_actors" else [])


@pytest.fixture(scope="module")
def not_our_cluster():
    """The address of one that must not be used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
        yield


@pytest.fixture(params=map(marked, VARIANTS), ids=ids_of, scope="module")
def system(request, models, capacity_bytes, not_our_cluster):
    name, options = request.param
    cls = system_class(name)
    if reason := cls.unavailable("cpu"):
        pytest.skip(reason)
    system = cls(models, capacity_bytes, "cpu", **options)
    system.name = name
    system.start()
    yield system
    system.close()
    system.close()  # closing twice is harmless
    if name == "ray_actors":
        left = [p for p in psutil.Process().children(recursive=True) if "ray" in p.name()]
        assert [p for p in left if p.status() != psutil.STATUS_ZOMBIE] == []


def sequence(system, models):
    """Requests with hits, misses, and partial hits; few where each starts a process or reads."""
    a, b, c = sorted(models)
    few = [a, a, b]
    return few if system.name in ("ray_actors", "serverless") else [*few, c, b, c, a, c]


def test_tokens_never_depend_on_what_was_served_before(system, models, expected):
    for name in sequence(system, models):
        assert system.serve(name, PROMPT, N_NEW).token_ids == expected[name]


def test_how_far_its_logits_are_from_those_of_transformers_is_told(system, models):
    """Where Djinn's decoders decode; other systems say nothing of it."""
    told, decodes = system.decoding(), system.name == "djinn" or "decode" in system.options
    assert told.keys() == (models.keys() if decodes else set())
    usual = system.options.get("decode", "eager")
    assert {facts["mode"] for facts in told.values()} <= {usual}
    for facts in told.values():
        assert 0 <= facts["logits_distance"] < 1e-3  # in single precision
        assert (facts["logits_distance"] == 0) == (facts["mode"] == "eager")


def test_requests_that_arrive_together_give_the_same_tokens(system, models, expected):
    names = sequence(system, models)[::-1]  # what the last test has left there comes first
    requests = [Request(i, 0.0, name) for i, name in enumerate(names)]
    with ThreadPoolExecutor(1) as worker:
        arrived = list(
            send(requests, math.inf, lambda r: system.submit(worker, r.model, PROMPT, N_NEW))
        )
    assert sorted(a.request.request for a in arrived) == list(range(len(names)))
    for a in arrived:
        assert a.error is None
        assert a.served.token_ids == expected[a.request.model]
        assert a.served.switch_ms + a.served.decode_ms <= a.served.total_ms + 0.5
        assert a.served.total_ms <= a.total_s * 1e3 + 0.5


def test_accounting_from_a_cold_start(system, models, capacity_bytes):
    system.serve(min(models), PROMPT, 1)
    system.reset()
    resident = dict.fromkeys(models, 0)
    for name in sequence(system, models):
        served, n_bytes = system.serve(name, PROMPT, N_NEW), system.device_bytes()[name]
        assert len(served.token_ids) == N_NEW
        assert 0 <= served.switch_ms <= served.total_ms
        assert 0 < served.decode_ms < served.total_ms
        assert 0 < served.ttft_ms < served.total_ms
        assert served.switch_ms + served.decode_ms <= served.total_ms + 0.5
        assert served.resident_before_bytes == resident[name]
        assert served.resident_before_bytes + served.loaded_bytes == n_bytes
        writes = served.evicted_bytes if system.name in WRITES_BACK else 0
        assert served.writeback_bytes == writes
        if system.name in KEEPS_TO_CAPACITY:
            assert sum(served.resident_bytes.values()) <= capacity_bytes
            assert served.resident_bytes[name] == n_bytes
        balance = sum(resident.values()) + served.loaded_bytes - served.evicted_bytes
        assert sum(served.resident_bytes.values()) == balance
        resident = served.resident_bytes


def test_a_capacity_that_can_change_holds_from_then_on(system, models, expected, capacity_bytes):
    if not resizes(system.name, system.options):
        return
    a, b, _ = sorted(models, key=lambda name: models[name].n_bytes)
    system.serve(a, PROMPT, N_NEW)
    system.resize(sum(files.n_bytes for files in models.values()))
    first = [system.serve(name, PROMPT, N_NEW) for name in (a, b)]
    again = system.serve(a, PROMPT, N_NEW)
    assert all(served.loaded_bytes > 0 for served in first)  # nothing had stayed
    keeps = system.name in KEEPS_TO_CAPACITY
    assert (again.loaded_bytes == 0) == keeps and again.token_ids == expected[a]
    system.resize(capacity_bytes)
    assert system.capacity_bytes == capacity_bytes


def test_all_weights_are_on_the_device_but_tables_that_may_stay_behind(system, models):
    table_bytes = VOCAB * 64 * 4
    in_host = system.name == "djinn" and system.options.get("embeddings") != "ring"
    for name, files in models.items():
        less = files.n_bytes - system.device_bytes()[name]
        expected = table_bytes if in_host else 0
        assert expected <= less < expected + ALIGNMENT_BYTES


def test_a_bad_request_fails_alone(system, expected):
    for model, prompt in (("nobody", PROMPT), ("phi", [VOCAB]), ("phi", [])):
        with pytest.raises(DjinnError, match="expected"):
            system.serve(model, prompt, N_NEW)
    assert system.serve("phi", PROMPT, N_NEW).token_ids == expected["phi"]


def test_unknown_options_and_systems_are_refused(models):
    for name in SYSTEMS:
        with pytest.raises(ConfigError, match="nonsense"):
            system_class(name)(models, 1 << 20, "cpu", nonsense=1)
    with pytest.raises(ConfigError, match="expected a system out of"):
        system_class("djinn2")


@pytest.mark.parametrize("system", [("pytorch_lru", {}), marked(ACTORS)], indirect=True)
def test_a_model_larger_than_the_capacity_is_refused(system, monkeypatch):
    system.reset()
    monkeypatch.setattr(system, "capacity_bytes", 1000)
    with pytest.raises(CapacityError, match="raise the capacity"):
        system.serve("llama", PROMPT, 1)


def test_sleep_mode_says_why_it_cannot_run_here():
    assert "needs a CUDA device" in system_class("vllm_sleep").unavailable("cpu")


@pytest.mark.parametrize("system", [marked(ACTORS)], indirect=True)
def test_a_killed_actor_fails_one_request(system, expected):
    system.serve("phi", PROMPT, 1)
    killed = psutil.Process(system.pids["phi"])
    killed.kill()
    with pytest.raises(Exception, match="died") as caught:
        system.serve("phi", PROMPT, 1)
    assert classify_error(caught.value) == "engine_died"
    assert "phi" not in {**system.actors, **system.pids} and not killed.is_running()
    served = system.serve("phi", PROMPT, N_NEW)
    assert (served.token_ids, served.resident_before_bytes) == (expected["phi"], 0)
    again = psutil.Process(system.pids["phi"])
    assert again != killed
    system.reset()
    assert not again.is_running()  # its room can be given away


def test_cold_really_drops_the_page_cache(models):
    path = next(models["llama"].folder.glob("*.safetensors"))
    path.read_bytes()
    assert cached_pages(path) > 0
    drop_page_cache(models["llama"])
    assert cached_pages(path) == 0


def cached_pages(path):
    """Pages of a file in the page cache, by mincore(2)."""
    import ctypes
    import mmap

    n_bytes = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), n_bytes, mmap.MAP_PRIVATE) as area:
        vector = (ctypes.c_ubyte * -(-n_bytes // mmap.PAGESIZE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(n_bytes), vector) == 0
        return sum(page & 1 for page in vector)


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_in_its_own_environment_gives_the_same_tokens(models, expected, tmp_path):
    """The engine is rebuilt at each change of the model, and kept while it stays the same."""
    names = ["llama", "llama", "phi"]
    described = {
        name: {"name": name, "folder": str(f.folder), "n_bytes": f.n_bytes, "dtype": f.dtype}
        for name, f in models.items()
    }
    task = {"models": described, "names": names, "prompt": PROMPT, "n": N_NEW}
    (tmp_path / "task.json").write_text(json.dumps(task))
    done = subprocess.run(
        [environment.vllm_python(), REPO / "tests/support/serve_vllm.py", tmp_path],
        env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    served = json.loads((tmp_path / "served.json").read_text())
    assert [tuple(one["token_ids"]) for one in served] == [expected[name] for name in names]
    sizes = [models[name].n_bytes for name in names]
    assert [one["loaded_bytes"] for one in served] == [sizes[0], 0, sizes[2]]
    assert [one["resident_before_bytes"] for one in served] == [0, sizes[1], 0]


def test_every_system_is_in_the_contract():
    assert {*(name for name, _ in VARIANTS), *WITH_VLLM} == set(SYSTEMS)


def test_bytes_are_what_a_model_weighs(models):
    """All systems count a model as it is packed: its parameters and a little alignment."""
    for name, files in models.items():
        model = AutoModelForCausalLM.from_pretrained(files.folder)
        plain = sum(p.numel() * p.element_size() for p in model.parameters())
        assert plain <= files.n_bytes < plain * 1.02, name
