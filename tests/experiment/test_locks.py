"""Locks: two runs never share a folder nor a GPU, and the message says who was first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from command import djinn

from djinn_lib import nvml
from djinn_lib.errors import ConfigError
from djinn_lib.experiment import locks, reproduce
from djinn_lib.paths import REPO


def test_a_second_run_in_a_folder_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "_run", lambda *_: [])
    arguments = ["--profile", "smoke", "--run-dir", str(tmp_path)]
    with locks.run_locks(tmp_path, "cpu"):
        assert djinn("reproduce", *arguments) == 2
        said = capsys.readouterr().err
        assert f"process {os.getpid()}" in said and f"run folder {tmp_path}" in said
        assert "--run-dir" in said
    assert djinn("reproduce", *arguments) == 0


def test_one_run_a_gpu_whatever_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(nvml, "first_gpu", lambda: os.environ["CUDA_VISIBLE_DEVICES"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1")
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir(), other.mkdir()
    with locks.run_locks(one, "cuda"):
        with pytest.raises(ConfigError, match=rf"GPU-1 is in use .*{one}.*VISIBLE_DEVICES"):
            locks.run_locks(other, "cuda").__enter__()
        with locks.run_locks(other, "cpu"):
            pass  # nor does the attempt keep the other folder
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-2")
        with locks.run_locks(other, "cuda"):
            pass
    with pytest.raises(KeyError), locks.run_locks(one, "cuda"):
        raise KeyError
    with locks.run_locks(one, "cuda"):
        pass


def test_the_lock_of_a_killed_run_holds_nobody_up(tmp_path, nothing_leaks):
    script = (
        "import sys, time\nfrom pathlib import Path\n"
        "from djinn_lib.experiment.locks import run_locks\n"
        "with run_locks(Path(sys.argv[1]), 'cpu'):\n    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with nothing_leaks():
        holder = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True,
            cwd=REPO,
        )  # fmt: skip
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"process {holder.pid} on "):
            locks.run_locks(tmp_path, "cpu").__enter__()
        holder.kill()
        holder.wait()
        holder.stdout.close()
        with locks.run_locks(tmp_path, "cpu"):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_lock_files_that_are_none(tmp_path):
    (tmp_path / ".lock").write_text("not JSON")
    with locks.run_locks(tmp_path, "cpu"):
        (tmp_path / ".lock").write_text("[]")
        with pytest.raises(ConfigError, match="has not given its name"):
            locks.run_locks(tmp_path, "cpu").__enter__()
    (tmp_path / ".lock").unlink()
    (tmp_path / "target").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "target")
    with pytest.raises(ConfigError, match="cannot be locked"):
        locks.run_locks(tmp_path, "cpu").__enter__()
    assert (tmp_path / "target").read_text() == "precious"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("", "GPU-a1"), ("1", "GPU-b2"), ("1,0", "GPU-b2"), ("GPU-b", "GPU-b2"), ("7", "gpu7"),
     ("GPU-c", "GPU-c"), ("MIG-x-1", "MIG-x-1"), ("../../x", "GPU-a1")],
)  # fmt: skip
def test_the_gpu_that_cuda_shows_first(monkeypatch, visible, expected):
    class NVMLError(Exception):
        pass

    def handle(index):
        if index > 1:
            raise NVMLError
        return index

    driver = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=handle,
        nvmlDeviceGetUUID=["GPU-a1", "GPU-b2"].__getitem__,
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert nvml.first_gpu() == expected
