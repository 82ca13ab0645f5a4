"""The fleet around a stand-in for vLLM, which starts faster: processes, requests, faults."""

import gc
import os
import signal
import sys
import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from ended_processes import until
from fake_engine import weights_of
from forked import in_a_child
from rings import MIB, fork_children
from tokenizer_factory import START_ID, save_tokenizer

import djinn_lib as dj
from djinn_lib.errors import CapacityError, ConfigError, DjinnError, PlatformError
from djinn_lib.fleet import children, environment, protocol
from djinn_lib.fleet import fleet as fleet_module
from djinn_lib.fleet.engines import EngineClient, EngineDied
from djinn_lib.fleet.fleet import Fleet

SUPPORT = Path(__file__).parents[1] / "support"
SIZES = {"a": 6 * MIB, "b": 5 * MIB, "c": 3 * MIB}


def tokens(model, prompt, n):
    """What the stand-in says, computed here."""
    weights, ids = weights_of(model, SIZES[model]), list(prompt)
    for _ in range(n):
        ids.append(int(weights[(len(ids) + sum(ids)) * 4099 % len(weights)]))
    return tuple(ids[len(prompt) :])


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(SUPPORT), str(SUPPORT / "fake_vllm")]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setattr(fleet_module, "vllm_python", lambda python: Path(sys.executable))
        folder = tmp_path_factory.mktemp("model")
        (folder / "config.json").write_text("{}")
        yield folder


@pytest.fixture(scope="module")
def forks(patched):
    """Children are forked from here on."""
    with pytest.MonkeyPatch.context() as patch:
        fork_children(patch)
        yield


@pytest.fixture(scope="module")
def fleet(patched, request):
    """The broker and one engine run as they do for users; others are forked."""
    options = {"quantum_s": 0.01, "max_wait_s": 0.1, "progress": lambda step: None}
    with dj.Fleet("10MiB", "cpu", **options) as fleet:
        fleet.add("a", patched, n_bytes=SIZES["a"])
        request.getfixturevalue("forks")
        with ThreadPoolExecutor(2) as threads:
            adding = [threads.submit(fleet.add, n, patched, n_bytes=SIZES[n]) for n in "bc"]
        for one in adding:
            one.result()
        yield fleet
    assert not fleet.socket.parent.exists()


def test_requests_of_many_threads_to_models_that_do_not_fit_together(fleet):
    tasks = [("abc"[i % 3], [i, i + 1], 3 + i % 5) for i in range(90)]
    with ThreadPoolExecutor(8) as threads:
        said = list(
            threads.map(lambda t: fleet.generate(*t[:2], t[2], ignore_eos=True).token_ids, tasks)
        )
    assert said == [tokens(*task) for task in tasks]
    stats = fleet.stats().set_index("model")
    assert (stats.switches > 0).all() and stats.evicted_bytes.sum() > 0


def test_a_list_is_batched_and_loads_once(fleet):
    fleet.generate("a", [1], 1)
    fleet.generate("b", [1], 1)
    prompts = [[i, 1] for i in range(20)]
    generations = fleet.generate("a", prompts, 4)
    assert [g.token_ids for g in generations] == [tokens("a", p, 4) for p in prompts]
    assert sum(bool(g.loaded_bytes) for g in generations) == 1
    assert all(0 <= g.ttft_ms <= g.total_ms for g in generations)
    assert generations[0].text is None
    assert generations[0].n_prompt_tokens == 2 and generations[0].finish_reason == "length"


def test_a_stream_can_be_left(fleet):
    parts = [one for part in fleet.stream("c", [5], 6) for one in part]
    assert tuple(parts) == tokens("c", [5], 6)
    asked = dj.Sampling(seed=3, max_new_tokens=50)
    assert fleet.generate("c", [5], 6, sampling=asked).token_ids == tuple(parts)
    for part in fleet.stream("c", [5], 50):
        assert part == list(tokens("c", [5], 1))
        break
    until(lambda: not fleet.engine("c").n_pending, "the request was given up")


def test_a_request_can_be_cancelled(fleet):
    asked = fleet.submit("c", [5], 60)
    assert asked.cancel()
    with pytest.raises(CancelledError):
        asked.result()
    assert fleet.generate("c", [6], 2).token_ids == tokens("c", [6], 2)


def test_evicting_and_looking_at_the_ring(fleet):
    fleet.generate("a", [1], 1)
    fleet.evict("a")
    residency = fleet.residency().set_index("model")
    assert residency.resident_bytes["a"] == 0 and residency.bytes["a"] == 6 * MIB
    html = fleet._repr_html_()
    assert html.count("<i style") == 10 and "<script" not in html
    assert all(f" {name}</td>" in html for name in SIZES)


@pytest.mark.parametrize(
    "name, prompt, options, says",
    [
        ("d", [1], {}, r"the models \['a', .*\], got 'd': add it with fleet"),
        ("aa", [1], {}, "got 'aa': did you mean 'a'?"),
        ("a", "text", {}, "has no tokenizer"),
        ("a", [], {}, "at least one"),
        ("a", [[1], []], {}, "at least one"),
        ("a", [256], {}, "ids go from 0 to 255"),
        ("a", [1] * 60, {"max_new_tokens": 5}, "more than the 64"),
        ("a", [13], {}, "refused the request: 13 is bad luck"),
        ("a", [1], {"max_new_tokens": 0}, "max_new_tokens"),
        ("a", [1], {"temperature": -1}, "temperature"),
        ("a", [1], {"temperature": 200.0}, "that is too hot"),
        ("a", None, {}, "prompt"),
        ("a", [1], {"stop": "x"}, "stop needs a tokenizer"),
        ("a", [1], {"sampling": {"seed": 1}}, r"expected sampling to be a dj\.Sampling"),
    ],
)
def test_a_request_that_cannot_be_served(fleet, name, prompt, options, says):
    with pytest.raises(ConfigError, match=says):
        fleet.generate(name, prompt, **options)
    assert fleet.generate("a", [2], 2).token_ids == tokens("a", [2], 2)


def test_a_model_that_cannot_be_added(fleet, patched, tmp_path):
    for options, kind, says in [
        ({"fails": "start"}, EngineDied, "RuntimeError: no kernel for this device.*its log"),
        ({"fails": "die"}, EngineDied, "exit status 7"),
        ({"n_bytes": 11 * MIB}, CapacityError, "'d' did not start: .*raise the capacity"),
        ({"tensor_parallel_size": 2}, ConfigError, "one device"),
        ({"worker_cls": "x"}, ConfigError, "leave it out"),
    ]:
        with pytest.raises(kind, match=f"(?s){says}"):
            fleet.add("d", patched, **options)
    with pytest.raises(ConfigError, match="choose another name"):
        fleet.add("a", patched)
    with pytest.raises(ConfigError, match=r"config\.json"):
        fleet.add("d", tmp_path)
    assert set(fleet.models) == set(SIZES)
    assert len(fleet.status().models) == 3


def test_an_engine_that_is_killed_fails_its_requests_and_can_be_added_again(fleet, patched):
    asked = fleet.submit("c", [[i] for i in range(5)], 60)
    os.kill(fleet.engine("c").pid, signal.SIGKILL)
    for one in asked:
        with pytest.raises(EngineDied, match=r"exit status -9.*add it again"):
            one.result(20)
    assert fleet.generate("a", [2], 2).token_ids == tokens("a", [2], 2)
    until(lambda: len(fleet.status().models) == 2, "its frames are free")
    fleet.remove("c")
    fleet.add("c", patched, n_bytes=SIZES["c"])
    assert fleet.generate("c", [2], 2).token_ids == tokens("c", [2], 2)


def test_a_conversation_is_formatted_with_the_models_own_template(tmp_path, patched, fleet):
    (tmp_path / "config.json").write_text("{}")
    save_tokenizer(tmp_path)
    chat = fleet.add("t", tmp_path, n_bytes=MIB)
    formatted = [START_ID, *b"[user]Hi[assistant]"]
    want = fleet.generate("t", formatted, 5)
    messages = [{"role": "user", "content": "Hi"}]
    for said in (fleet.chat("t", messages, 5), fleet.chat("t", "Hi", 5), chat.chat("Hi", 5)):
        assert said.token_ids == want.token_ids and said.n_prompt_tokens == len(formatted)
    assert "".join(fleet.stream("t", messages, 5)) == want.text
    with pytest.raises(ConfigError, match="unknown role system"):
        fleet.chat("t", [{"role": "system", "content": "Hi"}])
    with pytest.raises(ConfigError, match="'a' has no tokenizer"):
        fleet.chat("a", "Hi")
    chat.remove()


def test_a_handle_does_what_the_fleet_does_until_its_model_is_removed(patched, fleet):
    first = fleet.add("h", patched, n_bytes=MIB)
    assert isinstance(first, dj.FleetModel) and repr(first) == "FleetModel('h')"
    want = fleet.generate("h", [5], 4).token_ids
    assert first.generate([5], 4).token_ids == first.submit([5], 4).result().token_ids == want
    assert tuple(one for part in first.stream([5], 4) for one in part) == want
    first.evict()
    assert fleet.status().resident_bytes()["h"] == 0
    first.remove()
    second = fleet.add("h", patched, n_bytes=MIB)
    assert second == fleet["h"] != first and repr(first) == "FleetModel('h', removed)"
    for use in (lambda: first.generate([5], 4), first.evict, first.remove):
        with pytest.raises(ConfigError, match="'h' of this handle was removed"):
            use()
    assert second.generate([5], 4).token_ids == want
    second.remove()


def test_a_fleet_holds_models_by_name(fleet):
    assert set(fleet) == set(SIZES) == set(fleet._ipython_key_completions_())
    assert len(fleet) == 3 and "a" in fleet and "d" not in fleet and 5 not in fleet
    assert fleet["a"] == fleet["a"] != fleet["b"] and len({fleet["a"], fleet["a"]}) == 1


def test_closing_fails_what_waits_and_ends_everything(patched, forks, nothing_leaks):
    with nothing_leaks():
        fleet = Fleet("4MiB", "cpu", progress=lambda step: None)
        handle = fleet.add("c", patched, n_bytes=SIZES["c"], step_s=0.5)
        asked = fleet.submit("c", [1], 60)
        folder, pid = fleet.socket.parent, fleet.engine("c").pid
        fleet.close()
        with pytest.raises(EngineDied, match="it was closed"):
            asked.result(20)
        assert not folder.exists() and not Path(f"/proc/{pid}").exists()
        fleet.close()
        uses = (lambda: fleet.generate("c", [1]), lambda: fleet.add("x", patched), fleet.stats,
                lambda: handle.generate([1]), handle.remove)  # fmt: skip
        assert repr(handle) == "FleetModel('c', closed)"
        for use in uses:
            with pytest.raises(DjinnError, match="this fleet was closed"):
                use()
        assert fleet._repr_html_() == "<i>closed</i>"


def test_a_fleet_may_be_closed_in_a_callback_of_a_request(patched, forks, nothing_leaks):
    with nothing_leaks():
        fleet = Fleet("4MiB", "cpu", progress=lambda step: None)
        fleet.add("c", patched, n_bytes=SIZES["c"])
        folder, pid = fleet.socket.parent, fleet.engine("c").pid
        closed = threading.Event()
        fleet.submit("c", [1], 2).add_done_callback(lambda done: [fleet.close(), closed.set()])
        assert closed.wait(30)
        assert not folder.exists() and not Path(f"/proc/{pid}").exists()


def test_answers_arrive_and_streams_are_dropped_while_a_request_is_sent(fleet):
    """Sending waits for an engine, which may itself wait until its answers are read."""
    engine, sending = fleet.engine("c"), threading.Event()

    def send_slowly():
        with engine._lock:
            sending.set()
            done.wait(20)

    asked, stream, done = fleet.submit("c", [1], 5), fleet.stream("c", [2], 60), threading.Event()
    thread = threading.Thread(target=send_slowly)
    thread.start()
    sending.wait(20)
    try:
        assert len(asked.result(10).token_ids) == 5
        dropping = threading.Thread(target=stream.__del__)  # as the garbage collector does
        dropping.start()
        dropping.join(10)
        assert not dropping.is_alive()
    finally:
        done.set()
        thread.join()
    until(lambda: not engine.n_pending, "what was dropped is cancelled")


def test_a_forked_child_is_told_so(fleet):
    handle = fleet["a"]
    for use in (lambda: fleet.generate("a", [1], 1), lambda: handle.submit([1], 1), fleet.status,
                lambda: fleet.add("x", "x"), lambda: fleet.remove("a")):  # fmt: skip
        said, status = in_a_child(use)
        assert said.startswith(f"DjinnError: this fleet belongs to process {os.getpid()}")
        assert status == 0
    assert in_a_child(fleet.close) == ("None", 0)
    assert fleet.generate("a", [3], 4).token_ids == tokens("a", [3], 4)


def test_a_status_that_was_interrupted_leaves_no_answer_behind(fleet, monkeypatch):
    fleet.generate("a", [1], 1)
    send, receive, sent = protocol.send, protocol.receive, []

    def noted(connection, kind, **fields):
        sent.append(kind)
        send(connection, kind, **fields)

    def interrupted(connection):
        if sent[-1] == "status":
            raise KeyboardInterrupt
        return receive(connection)

    with monkeypatch.context() as patch:
        patch.setattr(
            protocol, "send", lambda to, kind, **f: (sent.append(kind), send(to, kind, **f))
        )
        patch.setattr(protocol, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fleet.status()
    fleet.evict("a")
    time.sleep(0.3)  # until the broker has heard of it
    assert not fleet.residency().set_index("model").resident_bytes["a"]


def test_who_removes_a_model_twice_removes_no_later_one(fleet, patched, monkeypatch):
    engine = fleet.add("d", patched, n_bytes=MIB)._engine
    fleet.remove("d")
    later = fleet.add("d", patched, n_bytes=MIB)
    monkeypatch.setattr(fleet, "engine", lambda name: engine)  # looked up before the first removal
    fleet.remove("d")
    monkeypatch.undo()
    assert later.generate([1], 1).token_ids
    later.remove()
    assert repr(later) == "FleetModel('d', removed)"


def test_a_model_whose_size_cannot_be_read_leaves_its_name_free(fleet, patched, monkeypatch):
    def broken(source, settings):
        raise OSError("cannot read")

    monkeypatch.setattr(fleet_module, "need_bytes", broken)
    monkeypatch.setattr(fleet, "device", torch.device("cuda"))
    with pytest.raises(OSError, match="cannot read"):
        fleet.add("e", patched)
    assert "e" not in fleet._engines


def test_a_forked_child_can_start_children_of_its_own(tmp_path):
    def start(module="this"):
        signal.alarm(20)
        return children.start(sys.executable, module, [], tmp_path / "log").wait()

    assert start() == 0
    signal.alarm(0)
    assert in_a_child(start) == ("0", 0)


def test_a_start_that_is_interrupted_leaves_no_process(tmp_path, monkeypatch, nothing_leaks):
    started = []

    def interrupted(self, timeout=None):
        monkeypatch.undo()
        started.append(self.result(timeout))
        raise KeyboardInterrupt

    with nothing_leaks():
        monkeypatch.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            children.start(sys.executable, "http.server", ["0"], tmp_path / "log")
        assert started[0].poll() is not None


def test_a_fleet_that_is_forgotten_is_closed(patched, forks, nothing_leaks):
    with nothing_leaks():
        fleet = Fleet("4MiB", "cpu", progress=lambda step: None)
        folder = fleet.socket.parent
        del fleet
        until(lambda: gc.collect() is not None and not folder.exists(), "it was collected")


@pytest.mark.parametrize(
    "options, kind, says",
    [
        ({"capacity": "10TiB", "page": "1GiB"}, CapacityError, "lower the capacity"),
        ({"capacity": "x"}, ConfigError, "size"),
        ({"capacity": "4MiB", "policy": "x"}, ConfigError, "policy"),
        ({"capacity": "4MiB", "device": "tpu"}, ConfigError, "device"),
    ],
)
def test_what_cannot_be_a_fleet(patched, forks, nothing_leaks, options, kind, says):
    with pytest.raises(kind, match=says):
        Fleet(**{"device": "cpu", **options})


# -- the environment that has vLLM --


def test_which_python_runs_vllm(monkeypatch, tmp_path):
    monkeypatch.delenv(environment.VARIABLE, raising=False)
    monkeypatch.setattr(environment, "find_spec", lambda name: True)
    assert environment.vllm_python() == Path(sys.executable)
    monkeypatch.setattr(environment, "find_spec", lambda name: None)
    monkeypatch.setattr(environment, "_built", lambda: None)
    with pytest.raises(PlatformError, match="make vllm"):
        environment.vllm_python()
    assert "make vllm" in environment.unavailable()
    monkeypatch.setenv(environment.VARIABLE, "/nonexistent/python")
    with pytest.raises(PlatformError, match="/nonexistent/python is no Python with vLLM"):
        environment.vllm_python()
    with pytest.raises(PlatformError, match="no Python with vLLM"):
        environment.vllm_python(tmp_path)


def test_an_engine_that_says_nothing_is_given_up(patched, tmp_path):
    with pytest.raises(EngineDied, match="said nothing within 0 s"):
        EngineClient("x", sys.executable, {}, tmp_path / "log", start_timeout_s=0.0)
