"""Serves a list of requests with `vllm_recreate`; run by the tests in vLLM's own environment."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from djinn_lib.systems import system_class
from djinn_lib.systems.base import ModelFiles

folder = Path(sys.argv[1])
task = json.loads((folder / "task.json").read_text())
models = {
    name: ModelFiles(**{**files, "folder": Path(files["folder"])})
    for name, files in task["models"].items()
}
system = system_class("vllm_recreate")(models, 1 << 20, "cpu")
system.start()
try:
    served = [system.serve(name, task["prompt"], task["n"]) for name in task["names"]]
finally:
    system.close()
(folder / "served.json").write_text(json.dumps([asdict(one) for one in served]))
