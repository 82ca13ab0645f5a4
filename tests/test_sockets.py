"""Where sockets can be: 107 bytes, and not a character more."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from djinn_lib import sockets
from djinn_lib.errors import ConfigError
from djinn_lib.experiment import executors
from djinn_lib.experiment.execution import notebooks
from djinn_lib.experiment.executors import ensure_ray
from djinn_lib.local_ray import start_ray
from djinn_lib.sockets import LONGEST_BYTES, ray_folder, socket_folder
from djinn_lib.systems import vllm_recreate

LONG = "scratch/users/some.user.name/jobs/slurm-1234567.batch/tmp"


@pytest.fixture
def long_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Temporary files where batch systems put them."""
    folder = tmp_path / LONG
    folder.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    for name in ("RAY_TMPDIR", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.mark.parametrize(
    ("folder", "n_below", "expected"),
    [("/a" * 20, 67, "/a" * 20), ("/a" * 20, 68, "/tmp"), ("/" + "ü" * 10, 86, "/" + "ü" * 10),
     ("/" + "ü" * 10, 87, "/tmp")],
)  # fmt: skip
def test_a_folder_counts_in_bytes_with_what_comes_below_it(folder, n_below, expected):
    assert socket_folder(n_below, folder) == expected


def test_no_folder_that_is_short_enough_is_said(monkeypatch):
    monkeypatch.setattr(sockets, "_SHORT", "/proc/nowhere")
    with pytest.raises(ConfigError, match=r"at most 7 bytes, got /a/long/one.*set TMPDIR"):
        socket_folder(100, "/a/long/one")


def test_kernels_ray_and_vllm_all_fit(long_tmpdir, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop("VLLM_RPC_BASE_PATH", None)
    vllm_recreate.set_environment()
    longest = (
        socket_folder(len(notebooks._SOCKET)) + notebooks._SOCKET,
        ray_folder() + sockets._RAYS.removeprefix("/ray"),
        os.environ["VLLM_RPC_BASE_PATH"] + vllm_recreate._SOCKET,
    )
    assert all(len(path) <= LONGEST_BYTES and path.startswith("/tmp/") for path in longest)


def test_ray_without_room_for_sockets_is_refused_before_the_set_up(monkeypatch, long_tmpdir):
    pytest.importorskip("ray")
    assert ensure_ray() is None
    monkeypatch.setattr(sockets, "_SHORT", "/proc/nowhere")
    with pytest.raises(ConfigError, match="a folder for sockets"):
        ensure_ray()


def test_ray_that_does_not_start_is_an_error_in_words(monkeypatch):
    ray = pytest.importorskip("ray")

    begun = []

    def refuse(**_):
        begun.append("late")
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(executors.PlatformError, match="got Exception: The current node timed"):
        list(executors.fan_out([]))
    assert len(begun) > 1


def test_a_ray_that_is_late_once_is_started_again(monkeypatch):
    ray = pytest.importorskip("ray")
    raised = iter([Exception("The current node timed out during startup."), None])
    started = []

    def init(**options):
        if error := next(raised):
            raise error
        started.append(options)

    monkeypatch.setattr(ray, "init", init)
    start_ray(num_cpus=2)
    assert [(one["num_cpus"], one["address"]) for one in started] == [(2, "local")]
    monkeypatch.setattr(ray, "init", lambda **_: 1 / 0)  # another error is not tried again
    with pytest.raises(ZeroDivisionError):
        start_ray()
