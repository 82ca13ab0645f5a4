"""Adds the folders that come in on standard input, one a line, and says what came of each.

It runs in a process of its own, since a damaged folder may end it: that is what is looked for.
Memory is limited, so that a number too large ends in an error, not in the machine's OOM killer.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from pathlib import Path

import psutil
import torch
from transformers.utils import logging

import djinn_lib as dj
from djinn_lib.errors import DjinnError

SPARE_BYTES = 4 << 30  # of addresses, beyond those in use when everything is imported


def outcome(folder: Path) -> dict[str, str]:
    """Serve a folder in every way there is; "ok", "refused" in words, or "bare"."""
    steps = {
        "add": lambda djinn: djinn.add("m", folder),
        "ids": lambda djinn: djinn.generate("m", [5, 6, 7], 2),
        "text": lambda djinn: djinn.generate("m", "hi", 2),
        "chat": lambda djinn: djinn.chat("m", [{"role": "user", "content": "hi"}], 2),
    }
    said = {}
    with dj.Djinn("8MiB", "cpu", page="64KiB", progress=lambda step: None) as djinn:
        for name, step in steps.items():
            try:
                step(djinn)
                said[name] = "ok"
            except DjinnError as error:
                said[name] = f"refused {type(error).__name__}: {error}"
            except BaseException as error:
                said[name] = f"bare {type(error).__name__}: {error}\n{traceback.format_exc()}"
            if name == "add" and said[name] != "ok":
                break
        djinn.check()
    return said


def main() -> None:
    """Answer each line with a line."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, resource.RLIM_INFINITY))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print as they like
    for line in sys.stdin:
        try:
            said = outcome(Path(line.rstrip("\n")))
        except BaseException:
            said = {"add": f"bare {traceback.format_exc()}"}
        print(json.dumps(said), file=answers, flush=True)


if __name__ == "__main__":
    main()
