"""The broker over a real socket and a real memfd, with engines that compute nothing."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from fake_engine import FakeEngine

from djinn_lib.errors import CapacityError, ConfigError, DjinnError
from djinn_lib.fleet import commands, protocol
from djinn_lib.fleet.connection import Connection
from djinn_lib.fleet.protocol import BrokerGone

MIB = 1 << 20
FAKE_ENGINE = Path(__file__).parents[1] / "support" / "fake_engine.py"
SOON_S = 20.0
LIAR = """
import sys
from djinn_lib.fleet import protocol
from djinn_lib.fleet.connection import Connection
connection = Connection(sys.argv[1])
connection.join("liar", 2)
protocol.send(connection.socket, "give_back", drop=False)
protocol.receive(connection.socket)
"""


def until(condition, what):
    end_s = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.01)


class Ring:
    """A broker in a process of its own."""

    def __init__(self, folder, *options):
        self.socket = folder / "ring"
        command = [sys.executable, "-m", "djinn_lib.fleet.commands", "ring"]
        options = options or ("--capacity", "10MiB", "--quantum", "0.01", "--max-wait", "0.05")
        self.process = subprocess.Popen(
            [*command, "--socket", str(self.socket), "--device", "cpu", *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ready(self):
        assert "ring of" in self.process.stdout.readline(), self.process.stderr.read()
        return self

    def status(self):
        connection = Connection(self.socket)
        try:
            return connection.status()
        finally:
            connection.close()

    def end(self):
        self.process.terminate()
        _, said = self.process.communicate(timeout=SOON_S)
        return said


@pytest.fixture(scope="module")
def shared_ring(tmp_path_factory):
    ring = Ring(tmp_path_factory.mktemp("ring")).ready()
    yield ring
    said = ring.end()
    assert ring.process.returncode == 0 and not said, said
    assert not list(ring.socket.parent.iterdir()), "the socket and its lock are gone"


@pytest.fixture
def ring(shared_ring):
    yield shared_ring
    until(lambda: not shared_ring.status().models, "every engine left")
    assert set(shared_ring.status().frames) == {-1}


@pytest.fixture
def engines(ring):
    forms = {"a": "plain", "b": "compressed", "c": "auto"}
    made = {
        model: FakeEngine(ring.socket, model, 6 * MIB - 100, masters=form)
        for model, form in forms.items()
    }
    yield made
    for engine in made.values():
        engine.close()


def test_bytes_are_right_however_engines_take_turns(ring, engines):
    failed = []

    def work(engine, rests):
        try:
            for i in range(60):
                engine.step(0.001)
                if rests and i % 7 == 0:
                    engine.ring.rest()
            engine.ring.rest()
        except BaseException as error:
            failed.append(error)

    threads = [
        threading.Thread(target=work, args=(engine, model != "a"))
        for model, engine in engines.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed and not any(thread.is_alive() for thread in threads)
    for engine in engines.values():
        costs = engine.ring.costs
        assert costs.switches > 3 and costs.loaded_bytes > 6 * MIB
    for model in ring.status().models:
        assert model.state == "idle"


def test_a_hit_is_a_lease_and_loads_nothing(engines):
    engine = engines["a"]
    engine.step()
    engine.ring.rest()
    before = engine.ring.costs
    for _ in range(50):
        engine.ring.begin_step()
        engine.ring.end_step()
        engine.ring.rest()
    assert engine.ring.costs.loaded_bytes == before.loaded_bytes
    assert engine.ring.costs.leases == before.leases + 50


def test_a_step_within_a_step_is_the_same_step(engines):
    engine = engines["a"]
    engine.ring.begin_step()
    engine.ring.begin_step()
    engine.ring.end_step()
    engine.ring.rest()
    assert engine.ring.costs.leases == 1


def test_an_idle_holder_gives_back_at_once_and_one_in_a_step_at_its_end(engines):
    a, b = engines["a"], engines["b"]
    a.ring.begin_step()
    other = threading.Thread(target=b.step)
    other.start()
    other.join(0.3)
    assert other.is_alive(), "a is in a step"
    a.ring.wait()
    assert torch.equal(a.ring.view[: len(a.weights)], a.weights)
    a.ring.end_step()
    other.join(SOON_S)
    assert not other.is_alive()
    a.step()  # b holds the lease, and is idle


def test_a_sleeper_frees_its_frames(ring, engines):
    engine = engines["a"]
    engine.step()
    engine.ring.sleep()
    until(lambda: ring.status().models[0].n_resident == 0, "no page is left")
    engine.step()
    assert engine.ring.costs.loaded_bytes == 2 * (6 * MIB - 100)


def test_an_engine_killed_in_the_middle_frees_its_frames_and_the_others_go_on(ring, engines):
    killed = subprocess.Popen(
        [sys.executable, FAKE_ENGINE, ring.socket, "killed", str(8 * MIB)],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    stop, failed = threading.Event(), []

    def go_on():
        try:
            while not stop.is_set():
                engines["a"].step(0.001)
        except BaseException as error:
            failed.append(error)

    other = threading.Thread(target=go_on)
    other.start()
    try:
        for _ in range(5):
            assert killed.stdout.readline() == "stepped\n"
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        until(lambda: len(ring.status().models) == 3, "the killed engine is gone from the ring")
        before = engines["a"].ring.costs.leases
        engines["b"].step()
        until(lambda: engines["a"].ring.costs.leases > before, "a goes on")
    finally:
        stop.set()
        other.join(SOON_S)
        killed.stdout.close()
    assert not failed
    engines["a"].ring.rest()


def test_an_engine_that_says_nonsense_is_refused_and_the_others_go_on(ring, engines):
    said = subprocess.run(
        [sys.executable, "-c", LIAR, str(ring.socket)], capture_output=True, text=True
    )
    assert "LeaseError" in said.stderr and "broke the ring's protocol" in said.stderr
    engines["a"].step()


@pytest.mark.parametrize(
    "said",
    [
        b"\0\0\0\4null",
        b"\xff\xff\xff\xff",
        protocol.encode("nonsense"),
        protocol.encode("join", model="x", n_pages=True),
        protocol.encode("join", model=3, n_pages=1),
    ],
)
def test_what_is_no_message_is_refused(ring, said):
    connection = Connection(ring.socket)
    connection.socket.sendall(said)
    with pytest.raises(DjinnError, match="same version of djinn_lib"):
        protocol.receive(connection.socket)
    connection.close()


def test_another_version_is_refused(ring):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(ring.socket))
        protocol.send(connection, "hello", version=99)
        with pytest.raises(
            ConfigError, match="version 1 of its protocol and the client version 99"
        ):
            protocol.receive(connection)


def test_another_user_is_refused(ring, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ConfigError, match="and you are user 12345"):
        Connection(ring.socket)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_the_broker_refuses_a_user_who_gets_past_the_mode_of_the_socket(ring):
    script = (
        "import os, socket, sys; os.setuid(12345); c = socket.socket(socket.AF_UNIX);\n"
        "try: c.connect(sys.argv[1])\n"
        "except PermissionError: print('no way in')"
    )
    asked = subprocess.run(
        [sys.executable, "-c", script, str(ring.socket)], capture_output=True, text=True
    )
    assert asked.stdout == "no way in\n", asked.stderr
    assert ring.socket.stat().st_mode & 0o777 == 0o600


def test_a_model_larger_than_the_ring_and_a_name_that_is_taken(ring, engines):
    with pytest.raises(CapacityError, match="raise the capacity"):
        FakeEngine(ring.socket, "large", 11 * MIB)
    with pytest.raises(ConfigError, match="'a'"):
        FakeEngine(ring.socket, "a", MIB)


def test_no_ring_listens(tmp_path):
    with pytest.raises(ConfigError, match="start one there with `djinn ring`"):
        Connection(tmp_path / "ring")


def test_a_second_broker_on_the_same_socket_is_refused(ring):
    second = Ring(ring.socket.parent)
    _, said = second.process.communicate(timeout=60)
    assert second.process.returncode == protocol.EXIT_STATUS[ConfigError]
    assert said.startswith("djinn: the socket") and "choose another one" in said
    assert ring.status().n_frames == 10, "the first one goes on"


@pytest.mark.parametrize(
    "options, status, says",
    [
        (("--capacity", "10TiB", "--page", "1GiB"), CapacityError, "lower the capacity"),
        (("--capacity", "25GB"), ConfigError, "binary units"),
        (("--capacity", "1MiB", "--page", "2MiB"), CapacityError, "at least one page"),
        (("--capacity", "8MiB", "--policy", "x"), ConfigError, "policy"),
        (("--capacity", "8MiB", "--eviction", "x"), ConfigError, "'pages' or 'models'"),
        (("--capacity", "8MiB", "--quantum", "9"), ConfigError, "longest wait"),
    ],
)
def test_what_cannot_be_a_ring_is_one_message(tmp_path, capsys, options, status, says):
    with pytest.raises(SystemExit) as end:
        commands.app(["ring", "--socket", str(tmp_path / "r"), "--device", "cpu", *options])
    assert end.value.code == protocol.EXIT_STATUS[status]
    said = capsys.readouterr().err
    assert said.startswith("djinn: ") and says in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_broker_that_dies_fails_every_step_and_leaves_nothing(tmp_path):
    ring, lost = Ring(tmp_path).ready(), []
    engine = FakeEngine(ring.socket, "a", 4 * MIB, lost.append)
    other = FakeEngine(ring.socket, "b", 8 * MIB, lost.append)
    engine.step()
    engine.ring.begin_step()
    waiting = []

    def wait_in_vain():
        with pytest.raises(BrokerGone) as refusal:
            other.step()
        waiting.append(refusal)

    thread = threading.Thread(target=wait_in_vain)
    thread.start()
    ring.process.kill()
    ring.process.communicate()
    thread.join(SOON_S)
    assert waiting, "who waited for a lease is told"
    engine.ring.end_step()
    until(lambda: len(lost) == 2, "both are told")
    with pytest.raises(BrokerGone, match="start it again"):
        engine.step()
    engine.close()
    other.close()
    mapped = Path("/proc/self/maps").read_text()
    assert "djinn-frames" not in mapped
    ring = Ring(tmp_path).ready()  # the socket of the dead one is no obstacle
    assert not ring.end()


def test_closing_is_complete(ring, nothing_leaks):
    engine = FakeEngine(ring.socket, "first", MIB)  # what is only made once
    engine.step()
    engine.close()
    before = psutil.Process().children()
    with nothing_leaks():
        engine = FakeEngine(ring.socket, "again", MIB)
        engine.step()
        engine.close()
        engine.close()
    assert psutil.Process().children() == before
