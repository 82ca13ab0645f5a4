"""What `djinn serve` says when it cannot: no engine is started here."""

import socket
import sys

import pytest

from djinn_lib.errors import CapacityError, ConfigError, DjinnError
from djinn_lib.fleet import children
from djinn_lib.fleet import serve as serving
from djinn_lib.fleet.fleet_file import FleetFile

OURS = """(Worker pid=8) ERROR 11-26 21:52:00 [multiproc_executor.py:871] Traceback (most recent call last):
(Worker pid=8) ERROR 11-26 21:52:00 [multiproc_executor.py:871] djinn_lib.errors.CapacityError: 'a' has 9 pages: raise it
(EngineCore pid=7) ERROR 11-26 21:52:00 [core.py:857] Exception: WorkerProc initialization failed due to an exception in a background process.
(EngineCore pid=7) AttributeError: 'NoneType' object has no attribute 'close'
(APIServer pid=6)   File "vllm/v1/engine/utils.py", line 1431, in wait_for_engine_startup
(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.
"""  # noqa: E501
THEIRS = """(EngineCore pid=7) ValueError: To serve at least one request, 3 GiB KV cache is needed
(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.
"""


@pytest.fixture
def file():
    return FleetFile("16MiB", {"a": {"model": "m"}}, device="cpu", python=sys.executable)


@pytest.mark.parametrize(
    "log, found",
    [
        (OURS, ("CapacityError", "'a' has 9 pages: raise it")),
        (THEIRS, ("ValueError", "To serve at least one request, 3 GiB KV cache is needed")),
        ("vllm: error: unrecognized arguments: --no-such\n", None),
        ("", None),
        (None, None),
    ],
)
def test_the_error_behind_an_error(tmp_path, log, found):
    path = tmp_path / "log"
    if log is not None:
        path.write_text(log)
    assert children.raised_last(path) == found


@pytest.mark.parametrize(
    "says, kind, match",
    [
        (OURS, CapacityError, r"^the server of 'a' did not start: 'a' has 9 pages: raise it$"),
        (THEIRS, DjinnError, r"(?s)\(ValueError: To serve.*correct its options.*end of its log"),
        ("usage: vllm\n", DjinnError, r"(?s)did not start: correct its options.*usage: vllm"),
    ],
)
def test_a_server_that_does_not_start(monkeypatch, tmp_path, says, kind, match):
    """`python -m` of a module that writes a log of vLLM's and ends."""
    (tmp_path / "ends.py").write_text(f"print({says!r}); raise SystemExit(1)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started = children.start
    monkeypatch.setattr(
        children, "start", lambda python, module, *rest: started(python, "ends", *rest)
    )
    server = serving.Server("a", sys.executable, [], tmp_path / "log", tmp_path / "ring")
    with pytest.raises(kind, match=match):
        server.wait()
    server.end()


def test_an_address_that_is_taken_is_told_before_anything_starts(monkeypatch, file):
    monkeypatch.setattr(serving, "running", lambda *_: pytest.fail("engines were started"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        taken_file = FleetFile(file.capacity, file.models, port=port)
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port} \(Address already in use"):
            serving.serve(taken_file)
    with pytest.raises(ConfigError, match="choose another `host`"):
        serving.serve(FleetFile(file.capacity, file.models, host="203.0.113.1"))
