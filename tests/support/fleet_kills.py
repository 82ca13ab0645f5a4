"""Kill what a fleet consists of, with real engines: an engine in mid-step, the broker, the program.

python tests/support/fleet_kills.py FOLDER DEVICE CAPACITY [ENGINE OPTION=VALUE ...]

The folder is a checkpoint; the ring of that capacity holds less than two of it. Prints JSON: what
was seen after each kill. On a GPU, `held_bytes` is the device memory in use beyond that at first.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import yaml
from ended_processes import assert_nothing_is_left, descendants, until

from djinn_lib import nvml
from djinn_lib.errors import DjinnError
from djinn_lib.fleet.engines import EngineDied
from djinn_lib.fleet.fleet import Fleet

PROMPT = list(range(5, 25))
PROGRAM = """
import json, sys
from djinn_lib.fleet.fleet import Fleet
folder, device, capacity, options = sys.argv[1:]
with Fleet(capacity, device) as fleet:
    fleet.add("m", folder, **json.loads(options))
    print(fleet.socket.parent, flush=True)
    while True:
        fleet.generate("m", [5, 6, 7], 20, ignore_eos=True)
"""


def used_bytes():
    return nvml.used_bytes() or 0


def held_bytes(before):
    """Device memory that is not given back within ten seconds."""
    end_s = time.monotonic() + 10
    while used_bytes() > before and time.monotonic() < end_s:
        time.sleep(0.1)
    return max(0, used_bytes() - before)


def an_engine(folder, device, capacity, options):
    """The other model's requests go on; the killed engine's fail, and it can be added again."""
    before = used_bytes()
    with Fleet(capacity, device, progress=lambda step: None) as fleet:
        for name in "ab":
            fleet.add(name, folder, **options)
        expected = fleet.generate("b", PROMPT, 20, ignore_eos=True).token_ids
        stop, said = threading.Event(), []

        def go_on():
            while not stop.is_set():
                said.append(fleet.generate("b", PROMPT, 20, ignore_eos=True).token_ids == expected)

        other = threading.Thread(target=go_on)
        other.start()
        asked = fleet.submit("a", [PROMPT] * 4, 60, ignore_eos=True)
        until(lambda: any(m.model == "a" and m.state == "holding" for m in fleet.status().models),
              "a computes")  # fmt: skip
        os.kill(fleet.engine("a").pid, signal.SIGKILL)
        n_before, errors = len(said), []
        for one in asked:
            try:
                one.result(60)
            except EngineDied as error:
                errors.append(str(error).splitlines()[0])
        until(lambda: len(fleet.status().models) == 1, "its frames are free")
        until(lambda: len(said) > n_before + 3, "the other goes on")
        stop.set()
        other.join(60)
        fleet.remove("a")
        fleet.add("a", folder, **options)
        again = fleet.generate("a", PROMPT, 20, ignore_eos=True).token_ids == expected
        processes, home = descendants(), fleet.socket.parent
    assert_nothing_is_left(processes, home)
    return {"errors": errors, "others_served": len(said), "others_right": sum(said),
            "added_again_right": again, "held_bytes": held_bytes(before)}  # fmt: skip


def the_broker(folder, device, capacity, options):
    """Everything ends, with one message."""
    before, errors = used_bytes(), []
    fleet = Fleet(capacity, device, progress=lambda step: None)
    try:
        fleet.add("a", folder, **options)
        processes, home = descendants(), fleet.socket.parent
        asked = fleet.submit("a", [PROMPT] * 4, 60, ignore_eos=True)
        fleet._ring.process.kill()
        for one in asked:
            try:
                one.result(60)
            except DjinnError as error:
                errors.append(str(error).splitlines()[0])
        until(lambda: not fleet.engine("a").is_alive, "its engine ended")
    finally:
        fleet.close()
    assert_nothing_is_left(processes, home)
    return {"errors": errors, "held_bytes": held_bytes(before)}


def the_program(folder, device, capacity, options):
    """A killed notebook's kernel takes its broker and its engines with it."""
    before = used_bytes()
    command = [sys.executable, "-c", PROGRAM, folder, device, capacity, json.dumps(options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout
        lines = iter(program.stdout.readline, "")
        home = next(Path(line.strip()) for line in lines if line.startswith("/"))
        processes = descendants(program.pid)
        time.sleep(1)
        program.kill()
    assert_nothing_is_left(processes, home)
    return {"processes": len(processes), "held_bytes": held_bytes(before)}


if __name__ == "__main__":
    folder, device, capacity, *words = sys.argv[1:]
    options = {name: yaml.safe_load(value) for name, _, value in (w.partition("=") for w in words)}
    options = {"skip_tokenizer_init": True, "load_format": "safetensors", **options}
    for kill in (an_engine, the_broker, the_program):
        print(json.dumps({kill.__name__: kill(folder, device, capacity, options)}), flush=True)
