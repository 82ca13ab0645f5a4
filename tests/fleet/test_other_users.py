"""What is somebody else's: rings and engines of other users, and a GPU that has a ring already."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_broker import Ring

from djinn_lib.errors import ConfigError
from djinn_lib.fleet.broker import Broker
from djinn_lib.fleet.connection import Connection
from djinn_lib.fleet.listening import only_one_on

SOMEBODY = 65534


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    ring = Ring(tmp_path_factory.mktemp("ring")).ready()
    yield ring
    ring.end()


def test_a_ring_of_another_user_is_not_used(ring, monkeypatch):
    assert os.stat(ring.socket).st_mode & 0o777 == 0o600
    monkeypatch.setattr(os, "getuid", lambda: SOMEBODY)
    with pytest.raises(ConfigError, match=rf"belongs to user \d+ and you are user {SOMEBODY}"):
        Connection(ring.socket)


def test_an_engine_of_another_user_is_not_served():
    broker = Broker(1 << 20, 1 << 18, torch.device("cpu"))
    try:
        with pytest.raises(ConfigError, match=f"you are user {SOMEBODY}: start a ring of your own"):
            broker._greet(None, None, SOMEBODY)
    finally:
        broker.close()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_socket_that_one_may_not_open(ring):
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.setuid(SOMEBODY)
        try:
            Connection(ring.socket)
        except ConfigError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    said = os.read(reader, 1000).decode()
    os.close(reader)
    os.close(writer)
    assert "belongs to another user: start a ring of your own" in said


def test_a_gpu_has_one_ring(monkeypatch):
    gpus = {0: f"test-{os.getpid()}-0", 1: f"test-{os.getpid()}-1"}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda one: SimpleNamespace(uuid=gpus[one.index])
    )
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    try:
        with only_one_on(first), only_one_on(second):
            says = r"cuda:0 already has a ring \(another broker holds its lock\): connect"
            with pytest.raises(ConfigError, match=says), only_one_on(first):
                pass
        with only_one_on(first):
            pass
    finally:
        for uuid in gpus.values():
            Path(f"/tmp/djinn-ring-{uuid}.lock").unlink(missing_ok=True)
