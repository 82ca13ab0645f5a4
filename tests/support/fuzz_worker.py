"""Adds folders and says what came of each, in a forked child: a damaged folder may end it.

Memory is limited, so that a number too large ends in an error, not in the machine's OOM killer.
"""

from __future__ import annotations

import os
import resource
import traceback
from multiprocessing.connection import Connection
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


def serve_folders(connection: Connection) -> None:
    """Answer each folder with what came of it, in a forked child."""
    silence = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # libraries print as they like
        os.dup2(silence, descriptor)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, resource.RLIM_INFINITY))
    while True:
        try:
            said = outcome(connection.recv())
        except EOFError:
            return
        except BaseException:
            said = {"add": f"bare {traceback.format_exc()}"}
        connection.send(said)
