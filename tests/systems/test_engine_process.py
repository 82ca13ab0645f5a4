"""Processes that hold engines: calls, errors, deaths and silence."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from djinn_lib.errors import DjinnError
from djinn_lib.paths import REPO
from djinn_lib.systems import engine_process
from djinn_lib.systems.engine_process import EngineDied, EngineProcess


class Counter:
    """A stand-in engine, made in the other process."""

    def __init__(self, start):
        if start < 0:
            raise ValueError("expected a start of at least 0")
        self.value = start

    def add(self, n):
        self.value += n
        return self.value, os.getpid()

    def fail(self):
        raise KeyError("no such thing")

    def hang(self):
        time.sleep(60)

    def unpicklable(self):
        return lambda: None

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def fall_silent(self):
        """Close the connection and live on."""
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if os.path.realpath(f"/proc/self/fd/{descriptor}").rpartition("/")[2][:6] == "socket":
                os.close(descriptor)
        time.sleep(60)


TARGET = f"{__name__}:Counter"


@pytest.fixture
def engine():
    engine = EngineProcess(TARGET, 5)
    yield engine
    engine.close()


def test_calls_reach_one_object_in_another_process(engine):
    assert engine.call("add", 2) == (7, engine.pid)
    assert engine.call("add", 3) == (10, engine.pid)
    assert engine.pid != os.getpid()


def test_an_error_is_told_and_the_engine_lives_on(engine):
    with pytest.raises(DjinnError, match="no such thing"):
        engine.call("fail")
    with pytest.raises(DjinnError, match="nonsense"):
        engine.call("nonsense")
    with pytest.raises(DjinnError, match="pickle"):
        engine.call("unpicklable")
    assert engine.call("add", 1)[0] == 6


def test_a_death_is_an_error_not_a_hang(engine):
    begin_s = time.perf_counter()
    with pytest.raises(EngineDied, match="exit status -9"):
        engine.call("die")
    with pytest.raises(EngineDied):
        engine.call("add", 1)
    assert not engine.is_alive
    assert time.perf_counter() - begin_s < 10


def test_silence_ends_the_process(engine):
    with pytest.raises(TimeoutError, match="got no answer"):
        engine.call("hang", timeout_s=0.3)
    assert not engine.is_alive


def test_a_process_that_lives_on_without_its_pipe_is_ended(engine, monkeypatch):
    monkeypatch.setattr(engine_process, "_DIE_S", 0.2)
    process = psutil.Process(engine.pid)
    with pytest.raises(EngineDied):
        engine.call("fall_silent")
    assert not process.is_running()


def test_an_interrupted_call_leaves_no_answer_for_the_next(engine, monkeypatch):
    def interrupt(_timeout_s):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._pipe, "poll", interrupt, raising=False)
    with pytest.raises(KeyboardInterrupt):
        engine.call("add", 1)
    monkeypatch.undo()
    with pytest.raises(EngineDied):
        engine.call("add", 100)
    assert not engine.is_alive


@pytest.mark.parametrize("end", ["die", "hang", "fail"])
def test_however_an_engine_ends_nothing_is_left(end, nothing_leaks):
    with nothing_leaks():
        engine = EngineProcess(TARGET, 5)
        with pytest.raises((DjinnError, TimeoutError)):
            engine.call(end, timeout_s=0.3 if end == "hang" else 60)
        engine.close()
        del engine


def test_a_failing_start_leaves_no_process():
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(DjinnError, match="start of at least 0"):
        EngineProcess(TARGET, -1)
    alive = [p for p in psutil.Process().children(recursive=True) if p not in before]
    assert [p for p in alive if "resource_tracker" not in " ".join(p.cmdline())] == []


def test_close_can_be_repeated_and_ends_the_process(engine):
    process = psutil.Process(engine.pid)
    engine.close()
    engine.close()
    assert not process.is_running()


@pytest.mark.parametrize("end", ["pass", "os.kill(os.getpid(), 9)"], ids=["forgets", "killed"])
def test_no_process_outlives_a_caller_that_never_closes(end, tmp_path):
    script = tmp_path / "caller.py"
    script.write_text(
        "import os\n"
        "from djinn_lib.systems.engine_process import EngineProcess\n"
        'if __name__ == "__main__":\n'
        '    engine = EngineProcess("collections:Counter")\n'
        "    print(engine.pid, flush=True)\n"
        f"    {end}\n"
    )
    paths = [str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": ":".join(paths)},
        stdout=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    pid, until_s = int(done.stdout), time.perf_counter() + 20
    while psutil.pid_exists(pid) and time.perf_counter() < until_s:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid)
