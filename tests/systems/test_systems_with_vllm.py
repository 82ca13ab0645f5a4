"""The systems that need vLLM, with a real one on the CPU; skipped where there is none."""

from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from fleet_models import WITH_VLLM, plain_tokens, save_models

from djinn_lib.errors import CapacityError, ConfigError
from djinn_lib.experiment.setup.weights import describe
from djinn_lib.systems import system_class

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]
MODELS = ("llama", "qwen3")
PROMPT, N_NEW = [5, 6, 7, 8], 6
OPTIONS = {"page": "256KiB", "max_model_len": 64, "kv_cache_memory_bytes": 64 << 20}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folders = save_models(tmp_path_factory.mktemp("models"), MODELS)
    return {name: describe(name, folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def expected(models, tmp_path_factory):
    logs = tmp_path_factory.mktemp("plain")
    with ThreadPoolExecutor(2) as threads:
        said = threads.map(
            lambda one: plain_tokens(one.name, one.folder, [PROMPT], N_NEW, logs / one.name),
            models.values(),
        )
        return {name: tokens for name, (tokens,) in zip(models, said, strict=True)}


@pytest.fixture(scope="module", params=WITH_VLLM)
def system(request, models):
    sizes = sorted(files.n_bytes for files in models.values())
    before = set(psutil.Process().children(recursive=True))
    options = OPTIONS if request.param == "djinn_vllm" else {**OPTIONS, "enforce_eager": True}
    system = system_class(request.param)(models, sizes[-1] + sizes[0] // 2, "cpu", **options)
    system.name = request.param
    system.start()
    yield system
    system.close()
    system.close()  # closing twice is harmless
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [one for one in left if "djinn_lib" in " ".join(one.cmdline())]


def test_tokens_and_bytes_one_by_one(system, models, expected):
    system.reset()
    for name in ("llama", "llama", "qwen3", "llama"):
        served = system.serve(name, PROMPT, N_NEW)
        assert served.token_ids == expected[name]
        assert served.writeback_bytes == 0
        assert 0 <= served.switch_ms <= served.ttft_ms <= served.total_ms
        assert served.resident_bytes[name] > 0
        if name == "qwen3":
            assert served.loaded_bytes >= models[name].n_bytes * 0.9
    again = system.serve("llama", PROMPT, N_NEW)
    assert (again.loaded_bytes, again.evicted_bytes) == (0, 0)
    system.reset()
    assert system.serve("llama", PROMPT, N_NEW).resident_before_bytes == 0


def test_requests_that_come_together_are_batched_and_say_the_same(system, models, expected):
    system.reset()
    names = [MODELS[i % 2] for i in range(18)]
    asked = [system.submit(None, name, PROMPT, N_NEW) for name in names]
    served = [one.result(300) for one in asked]
    assert [one.token_ids for one in served] == [expected[name] for name in names]
    loads = [one for one in served if one.loaded_bytes]
    assert len(loads) < len(names), "a load serves several"


def test_what_cannot_be_served_is_refused(system):
    with pytest.raises(ConfigError, match="none"):
        system.serve("none", PROMPT, 1)
    with pytest.raises(ConfigError):
        system.serve("llama", PROMPT, 1000)


def test_a_ring_smaller_than_a_model(models):
    system = system_class("vllm_sleep_readonly")(models, 1 << 20, "cpu")
    with pytest.raises(CapacityError):
        system.start()
    system.close()
