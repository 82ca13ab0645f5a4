"""Ray Serve's LLM application over two rings; skipped where vLLM's environment has no Ray Serve."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from fleet_models import save_models
from tokenizer_factory import save_tokenizer

from djinn_lib.fleet import environment
from djinn_lib.paths import REPO

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1200)]
SCRIPT = Path(__file__).parents[1] / "support" / "ray_serve_llm.py"


@pytest.fixture
def python():
    """vLLM's, if Ray Serve is there as well."""
    found = environment.vllm_python()
    asked = subprocess.run([found, "-c", "import ray.serve.llm"], capture_output=True, text=True)
    if asked.returncode:
        reason = asked.stderr.strip().splitlines()[-1]
        pytest.skip(f"{found} has no Ray Serve for LLMs ({reason}): pip install 'ray[serve,llm]'")
    return found


def test_two_nodes_serve_a_model_each_from_the_ring_there(python, tmp_path):
    for folder in save_models(tmp_path, ("llama", "qwen3")).values():
        save_tokenizer(folder)
    paths = [str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [python, SCRIPT, tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["nodes"] == 2
    assert said["on_rings"] == {"llama": ["llama"], "qwen3": ["qwen3"]}
    for first, again in said["texts"].values():
        assert first == again and first
