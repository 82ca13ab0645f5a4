"""The broker over a real socket and a real memfd, with engines that compute nothing."""

import os
import resource
import socket
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import psutil
import pytest
import torch
from ended_processes import until
from fake_engine import FakeEngine
from rings import FORK, MIB, SOON_S, Ring, forked

from djinn_lib.errors import CapacityError, ConfigError, DjinnError
from djinn_lib.fleet import commands, protocol
from djinn_lib.fleet.connection import Connection
from djinn_lib.fleet.listening import only_one_on
from djinn_lib.fleet.protocol import BrokerGone

SOMEBODY = 65534


@pytest.fixture(scope="module")
def shared_ring():
    with TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)  # other users get as far as the socket
        with Ring(Path(folder)) as ring:
            yield ring
        assert not os.listdir(folder), "the socket and its lock are gone"


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
            for i in range(30):
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


def step_for_ever(socket, stepped):
    torch.set_num_threads(1)
    engine = FakeEngine(socket, "killed", 8 * MIB)
    while True:
        engine.step(0.002)
        stepped.send(None)


def test_an_engine_killed_in_the_middle_frees_its_frames_and_the_others_go_on(ring, engines):
    stepped, theirs = FORK.Pipe()
    killed = FORK.Process(target=step_for_ever, args=(ring.socket, theirs), daemon=True)
    killed.start()
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
            assert stepped.poll(SOON_S)
            stepped.recv()
        killed.kill()
        killed.join()
        until(lambda: len(ring.status().models) == 3, "the killed engine is gone from the ring")
        before = engines["a"].ring.costs.leases
        engines["b"].step()
        until(lambda: engines["a"].ring.costs.leases > before, "a goes on")
    finally:
        stop.set()
        other.join(SOON_S)
        stepped.close(), theirs.close()
    assert not failed
    engines["a"].ring.rest()


def lie(socket):
    """Give back what was never lent; returns what the broker says to that."""
    connection = Connection(socket)
    connection.join("liar", 2)
    protocol.send(connection.socket, "give_back", drop=False)
    try:
        return protocol.receive(connection.socket)
    except DjinnError as error:
        return f"{type(error).__name__}: {error}"


def in_a_process(function, *arguments):
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, FORK) as processes:
        return processes.submit(function, *arguments).result(SOON_S)


def test_an_engine_that_says_nonsense_is_refused_and_the_others_go_on(ring, engines):
    said = in_a_process(lie, ring.socket)
    assert said.startswith("LeaseError: ") and "broke the ring's protocol" in said
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


def test_a_ring_of_another_user_is_not_used(ring, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: SOMEBODY)
    with pytest.raises(ConfigError, match=rf"belongs to user \d+ and you are user {SOMEBODY}"):
        Connection(ring.socket)


def connect_as(user, path, connect):
    os.setuid(user)
    try:
        connect(path)
    except ConfigError as error:
        return str(error)


def greet(path):
    """What a `Connection` does, without its own look at who owns the ring."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        protocol.send(connection, "hello", version=protocol.VERSION)
        protocol.receive(connection)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_the_mode_of_the_socket_and_the_broker_itself_keep_other_users_out(ring):
    assert ring.socket.stat().st_mode & 0o777 == 0o600
    said = in_a_process(connect_as, SOMEBODY, ring.socket, Connection)
    assert "belongs to another user: start a ring of your own" in said
    ring.socket.chmod(0o666)
    said = in_a_process(connect_as, SOMEBODY, ring.socket, greet)
    ring.socket.chmod(0o600)
    assert f"you are user {SOMEBODY}: start a ring of your own" in said


def test_a_model_larger_than_the_ring_and_a_name_that_is_taken(ring, engines):
    with pytest.raises(CapacityError, match="raise the capacity"):
        FakeEngine(ring.socket, "large", 11 * MIB)
    with pytest.raises(ConfigError, match="'a'"):
        FakeEngine(ring.socket, "a", MIB)


def test_no_ring_listens(tmp_path):
    with pytest.raises(ConfigError, match="start one there with `djinn ring`"):
        Connection(tmp_path / "ring")


def refused(capsys, socket, *options):
    """The exit status and the one line of a broker that does not start."""
    with pytest.raises(SystemExit) as end:
        commands.app(["ring", "--socket", str(socket), "--device", "cpu", *options])
    said = capsys.readouterr().err
    assert said.startswith("djinn: ") and said.count("\n") == 1
    return end.value.code, said


def test_a_second_broker_on_the_same_socket_is_refused(ring, capsys):
    status, said = refused(capsys, ring.socket, "--capacity", "2MiB")
    assert status == protocol.EXIT_STATUS[ConfigError]
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
    exit_status, said = refused(capsys, tmp_path / "r", *options)
    assert exit_status == protocol.EXIT_STATUS[status] and says in said
    assert not list(tmp_path.iterdir())


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


@pytest.mark.slow
def test_a_broker_that_dies_fails_every_step_and_leaves_nothing(tmp_path):
    ring, lost = Ring(tmp_path, forked), []
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
    with Ring(tmp_path, forked):  # the socket of the dead one is no obstacle
        pass


def test_a_broker_ends_at_once_whatever_its_clients_do(tmp_path):
    ring = Ring(tmp_path, forked)
    engine = FakeEngine(ring.socket, "a", 4 * MIB)
    engine.step()
    deaf = Connection(ring.socket)  # it asks, and reads no answer
    deaf.socket.settimeout(1)
    with pytest.raises(BrokerGone):
        for _ in range(100_000):
            protocol.send(deaf.socket, "status")
    begin_s = time.monotonic()
    assert not ring.end() and ring.process.returncode == 0
    assert time.monotonic() - begin_s < 5
    assert not list(tmp_path.iterdir())
    engine.close()
    deaf.close()


def test_a_broker_without_free_descriptors_serves_later_clients(ring):
    pid = ring.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    n_open = len(os.listdir(f"/proc/{pid}/fd"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (n_open + 3, before[1]))
    with ExitStack() as opened:
        for _ in range(20):
            opened.enter_context(socket.socket(socket.AF_UNIX)).connect(str(ring.socket))
        time.sleep(0.3)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    assert ring.status().n_frames == 10


def test_closing_wakes_who_waits(ring, engines):
    """Another thread that waits for the lease; and the listener that waits for the step to end."""
    holder, waiter = engines["a"].ring, engines["b"].ring
    holder.begin_step()
    with ThreadPoolExecutor(2) as threads:
        waiting = threads.submit(waiter.begin_step)
        until(lambda: holder._is_revoked, "the other one asked for the lease")
        threads.submit(waiter.close).result(SOON_S)
        with pytest.raises(DjinnError, match="'b' has left its ring"):
            waiting.result(SOON_S)
        threads.submit(holder.close).result(SOON_S)
    with pytest.raises(DjinnError, match="'a' has left its ring"):
        engines["a"].step()


def test_a_form_of_masters_that_is_unknown_leaves_no_connection(ring, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "fake_engine.Connection", lambda path: opened.append(Connection(path)) or opened[0]
    )
    with pytest.raises(ConfigError, match="expected masters to be one of"):
        FakeEngine(ring.socket, "d", MIB, masters="zip")
    assert opened[0].socket.fileno() == -1


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
