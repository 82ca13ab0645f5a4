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
from fleet_models import save_models
from tokenizer_factory import save_tokenizer

from djinn_lib.fleet import environment
from djinn_lib.paths import REPO

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        environment.unavailable() is not None, reason=str(environment.unavailable())
    ),
]
PORT = 18123
URL = f"http://127.0.0.1:{PORT}"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    folders = save_models(folder, ("llama", "qwen3"))
    save_tokenizer(folders["qwen3"])
    options = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True,
               "kv_cache_memory_bytes": 64 << 20}  # fmt: skip
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


def test_streams_and_errors_are_passed_through(served):
    whole = ask("llama", ignore_eos=True).json()["choices"][0]["text"]
    body = {"model": "llama", "prompt": "Hello", "max_tokens": 8, "temperature": 0,
            "ignore_eos": True, "stream": True}  # fmt: skip
    with httpx.stream("POST", f"{URL}/v1/completions", json=body, timeout=120) as answer:
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
    parts = [json.loads(line)["choices"][0]["text"] for line in lines]
    assert len(parts) > 2 and "".join(parts) == whole
    assert ask("llama", max_tokens=-1).status_code == 400
    assert ask("none").status_code == 404


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
