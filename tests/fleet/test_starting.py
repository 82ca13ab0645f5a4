import math
import threading

import pytest

from djinn_lib.fleet.starting import StartingRoom, need_bytes


class Engines:
    """Engines that start in threads of their own, and end when they are told to."""

    def __init__(self, free_bytes):
        self.free_bytes = free_bytes
        self.room = StartingRoom(lambda: self.free_bytes)
        self.begun, self.threads = {}, []

    def start(self, name, need):
        begun, end = threading.Event(), threading.Event()

        def run():
            with self.room.held(need):
                begun.set()
                end.wait(10)

        self.begun[name] = begun, end
        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()

    def has_begun(self, name, within_s=0.05):
        return self.begun[name][0].wait(within_s)

    def end(self, name):
        self.begun[name][1].set()

    def end_all(self):
        for name in self.begun:
            self.end(name)
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()


def test_engines_start_side_by_side_as_far_as_the_memory_goes():
    engines = Engines(free_bytes=100)
    for name, need in (("a", 40), ("b", 60)):
        engines.start(name, need)
        assert engines.has_begun(name, 5)
    engines.start("c", 1)
    assert not engines.has_begun("c")
    engines.end("a")
    assert engines.has_begun("c", 5)
    engines.end_all()


@pytest.mark.parametrize("need", [101, math.inf])
def test_one_that_is_too_large_or_of_unknown_size_starts_alone(need):
    engines = Engines(free_bytes=100)
    engines.start("small", 10)
    assert engines.has_begun("small", 5)
    engines.start("large", need)
    assert not engines.has_begun("large")
    engines.end("small")
    assert engines.has_begun("large", 5)
    engines.start("next", 10)
    assert not engines.has_begun("next")
    engines.end_all()


def test_where_nobody_knows_the_free_memory_one_starts_after_the_other():
    engines = Engines(free_bytes=None)
    engines.start("a", 1)
    assert engines.has_begun("a", 5)
    engines.start("b", 1)
    assert not engines.has_begun("b")
    engines.end_all()


def test_the_need_counts_weights_and_cache(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.safetensors").write_bytes(b"x" * 1000)
    with_cache = need_bytes(tmp_path, {"kv_cache_memory_bytes": 500})
    assert with_cache - need_bytes(tmp_path, {}) == 500
    assert need_bytes(tmp_path, {}) > 2000
    assert need_bytes("some/model", {}) == math.inf
