"""`djinn serve` with a real vLLM on the CPU; skipped where there is none."""

import json
import signal
import subprocess
import time
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from ended_processes import until
from fleet_models import save_models
from tokenizer_factory import save_tokenizer

from djinn_lib.fleet import environment
from djinn_lib.paths import REPO

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]
PORT = 18123
URL = f"http://127.0.0.1:{PORT}"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    folders = save_models(folder, ("llama", "qwen3"))
    for one in folders.values():
        save_tokenizer(one)
    options = {"dtype": "float32", "max_model_len": 2048, "enforce_eager": True,
               "kv_cache_memory_bytes": 64 << 20,
               "hf_overrides": {"max_position_embeddings": 2048}}  # fmt: skip
    file = folder / "fleet.yml"
    models = {name: {"model": str(path), **options} for name, path in folders.items()}
    said = {"capacity": "16MiB", "device": "cpu", "page": "256KiB", "quantum_s": 0.02,
            "port": PORT, "models": models}  # fmt: skip
    file.write_text(yaml.safe_dump(said))
    log = (folder / "log").open("w+")
    process = subprocess.Popen(
        [environment.vllm_python(), "-m", "djinn_lib.fleet.commands", "serve", str(file)],
        cwd=REPO, stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    until_s = time.monotonic() + 600
    while True:
        try:
            if httpx.get(f"{URL}/health").status_code == 200:
                break
        except httpx.HTTPError:
            pass
        assert process.poll() is None and time.monotonic() < until_s, Path(log.name).read_text()
        time.sleep(0.5)
    children = psutil.Process(process.pid).children(recursive=True)
    yield process
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    log.close()


def upstream_of(served, model):
    """The address of a model's own server."""
    for one in psutil.Process(served.pid).children():
        words = one.cmdline()
        if "djinn_lib.fleet.vllm_server" in words and model in words:
            return f"http://127.0.0.1:{words[words.index('--port') + 1]}"
    raise AssertionError(f"no server of {model}")


def vllm_metric(upstream, name):
    lines = httpx.get(f"{upstream}/metrics").text.splitlines()
    return sum(float(one.split()[-1]) for one in lines if one.startswith(f"vllm:{name}{{"))


def ask(model, **body):
    body = {"model": model, "prompt": "Hello", "max_tokens": 8, "temperature": 0, **body}
    return httpx.post(f"{URL}/v1/completions", json=body, timeout=120)


def test_models_are_served_from_one_address_and_take_turns(served):
    listed = httpx.get(f"{URL}/v1/models").json()["data"]
    assert [one["id"] for one in listed] == ["llama", "qwen3"]
    said = {model: ask(model).json()["choices"][0]["text"] for model in ("llama", "qwen3")}
    for _ in range(3):
        for model, text in said.items():
            assert ask(model).json()["choices"][0]["text"] == text
    metrics = httpx.get(f"{URL}/metrics").text
    switches = [line for line in metrics.splitlines() if line.startswith("djinn_switches_total")]
    assert len(switches) == 2 and all(float(line.split()[-1]) > 1 for line in switches)


def test_openais_own_client(served):
    """Run where vLLM is, which brings it."""
    script = Path(__file__).parents[1] / "support" / "openai_client.py"
    done = subprocess.run(
        [environment.vllm_python(), script, f"{URL}/v1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    assert said["models"] == ["llama", "qwen3"] and said["retrieved"] == "qwen3"
    assert said["chat"] and said["streamed"] == said["chat"]
    assert said["n_of_list"] == 4, "two prompts, two answers each"
    assert said["errors"] == {
        "unknown model": ["NotFoundError", "models ['llama', 'qwen3'], got 'none'"],
        "too long": ["BadRequestError", "maximum context length"],
        "wrong value": ["BadRequestError", "temperature"],
        "wrong role": ["BadRequestError", "unknown role alien"],
        "not served": ["NotFoundError", "404"],
    }


def test_a_caller_that_hangs_up_is_aborted_in_vllm(served):
    upstream = upstream_of(served, "llama")
    before = vllm_metric(upstream, "generation_tokens_total")
    body = {"model": "llama", "prompt": "Hello", "max_tokens": 2000, "ignore_eos": True}
    with httpx.stream(
        "POST", f"{URL}/v1/completions", json={**body, "stream": True}, timeout=60
    ) as answer:
        next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{URL}/v1/completions", json=body, timeout=0.3)
    until(lambda: not vllm_metric(upstream, "num_requests_running"), "nothing runs any more")
    assert vllm_metric(upstream, "generation_tokens_total") - before < 3000


def test_what_is_not_asked_well_is_one_message(served):
    for answer, status, says in [
        (httpx.post(f"{URL}/v1/completions", content=b"{"), 400, "names no model"),
        (httpx.post(f"{URL}/v1/audio/transcriptions", files={"file": b"x"}), 400, "names no model"),
        (httpx.get(f"{URL}/v1/none"), 405, "GET /v1/none"),
    ]:
        assert answer.status_code == status and says in answer.json()["error"]["message"]
    counted = httpx.post(f"{URL}/tokenize", json={"model": "llama", "prompt": "Hi"}).json()
    assert counted["count"] > 1, "paths of vLLM's own are passed on"


def test_a_server_that_is_killed_is_reported_and_the_other_goes_on(served):
    servers = [
        one
        for one in psutil.Process(served.pid).children()
        if "djinn_lib.fleet.vllm_server" in one.cmdline() and "qwen3" in one.cmdline()
    ]
    engines = servers[0].children(recursive=True)
    servers[0].kill()
    answer = ask("qwen3")
    assert answer.status_code == 503 and "'qwen3'" in answer.json()["error"]["message"]
    assert ask("llama").status_code == 200
    assert httpx.get(f"{URL}/health").json() == {"llama": "ok", "qwen3": "down", "ring": "ok"}
    _, alive = psutil.wait_procs(engines, timeout=30)
    assert not alive, "its engine ended with it"
