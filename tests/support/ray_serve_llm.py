"""Ray Serve's LLM application on two Ray nodes of this machine, a ring each; prints JSON.

``ray_serve_llm.py FOLDER``, run where vLLM for the CPU is, and ``ray[serve,llm]`` as well;
FOLDER holds models. Each goes to a node of its own, with our worker and the ring there.
"""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.llm import LLMConfig, build_openai_app

from djinn_lib.fleet.connection import Connection

URL = "http://127.0.0.1:8000/v1"
OPTIONS = {"dtype": "float32", "max_model_len": 64, "enforce_eager": True,
           "kv_cache_memory_bytes": 64 << 20}  # fmt: skip


def started_ring(folder):
    """A ring at `folder`/ring; its process."""
    command = [sys.executable, "-m", "djinn_lib.fleet.commands", "ring", "--capacity", "14MiB"]
    process = subprocess.Popen(
        [*command, "--page", "256KiB", "--device", "cpu", "--socket", str(folder / "ring")],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert "ring of" in process.stdout.readline()
    return process


def config(model, ring):
    """A model of the application; the resource of its node has its own name."""
    return LLMConfig(
        model_loading_config={"model_id": model.name, "model_source": str(model)},
        deployment_config={"num_replicas": 1},
        placement_group_config={"bundles": [{"CPU": 1, model.name: 0.1}]},
        engine_kwargs={"worker_cls": "djinn_lib.fleet.vllm_worker.RingCPUWorker", **OPTIONS},
        runtime_env={"env_vars": {"DJINN_RING": str(ring), "VLLM_NO_USAGE_STATS": "1",
                                  "PYTHONPATH": os.environ["PYTHONPATH"]}},
        log_engine_metrics=False,
    )  # fmt: skip


def asked(model):
    """What the application says to a prompt."""
    body = {"model": model.name, "prompt": "Hello", "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{URL}/completions", json={**body, "ignore_eos": True}, timeout=120)
    answer.raise_for_status()
    return answer.json()["choices"][0]["text"]


def main():
    models = sorted(one for one in Path(sys.argv[1]).iterdir() if (one / "config.json").exists())
    with ExitStack() as undo:
        rings = {}
        for model in models:
            process = started_ring(model)
            undo.callback(process.wait)
            undo.callback(process.terminate)
            rings[model.name] = model / "ring"
        cluster = Cluster()
        undo.callback(cluster.shutdown)
        for model in models:
            cluster.add_node(num_cpus=4, resources={model.name: 1}, object_store_memory=100 << 20)
        ray.init(address=cluster.address)
        undo.callback(ray.shutdown)
        configs = [config(model, rings[model.name]) for model in models]
        serve.run(build_openai_app({"llm_configs": configs}))
        undo.callback(serve.shutdown)
        texts = {model.name: [asked(model) for _ in range(2)] for model in models}
        on_rings = {}
        for name, path in rings.items():
            connection = Connection(path)
            on_rings[name] = [one.model for one in connection.status().models]
            connection.close()
        n_nodes = sum(node["Alive"] for node in ray.nodes())
        print(json.dumps({"nodes": n_nodes, "texts": texts, "on_rings": on_rings}), flush=True)


if __name__ == "__main__":
    main()
