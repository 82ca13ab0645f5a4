"""`djinn serve`: start a ring, one `vllm serve` for each model, and a gateway for all of them."""

from __future__ import annotations

import shutil
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from djinn_lib.engine.device import parse_device
from djinn_lib.errors import ConfigError, DjinnError, PlatformError
from djinn_lib.fleet import children
from djinn_lib.fleet.environment import vllm_python
from djinn_lib.fleet.fleet_file import FleetFile, vllm_arguments
from djinn_lib.fleet.options import WORKERS, defaults_on
from djinn_lib.fleet.protocol import error_class
from djinn_lib.fleet.ring_process import RingProcess
from djinn_lib.fleet.status import RingStatus
from djinn_lib.sockets import socket_folder

_SERVER_STARTS_S = 1800.0
_LAST_ANSWERS_S = 5  # time for unfinished requests at the end
_LONGEST_SOCKET = "/djinn-12345678/12345678-1234-1234-1234-123456789012"


class Server:
    """One `vllm serve` on a port of this machine.

    Attributes:
        url: its address.
    """

    def __init__(
        self, name: str, python: Path, arguments: list[str], log: Path, ring: Path
    ) -> None:
        self.name, self.log, port = name, log, _free_port()
        self.url = f"http://127.0.0.1:{port}"
        where = ["--host", "127.0.0.1", "--port", str(port)]
        self._process = children.start(
            python, "djinn_lib.fleet.vllm_server", [*arguments, *where], log,
            {"DJINN_RING": str(ring), "VLLM_NO_USAGE_STATS": "1",
             "VLLM_RPC_BASE_PATH": str(ring.parent)},
        )  # fmt: skip

    def is_alive(self) -> bool:
        """Whether its process runs."""
        return self._process.poll() is None

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            DjinnError: it ended or took too long; the message has the last lines of its log.
        """
        until_s = time.monotonic() + _SERVER_STARTS_S
        while time.monotonic() < until_s and self.is_alive():
            with suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            time.sleep(0.2)
        raise self._not_started()

    def _not_started(self) -> DjinnError:
        """Return the error in its log; our own errors need no log."""
        kind, message = children.raised_last(self.log) or ("", "")
        if ours := error_class(kind):
            return ours(f"the server of {self.name!r} did not start: {message}")
        why = f" ({kind}: {message})" if kind else ""
        return DjinnError(
            f"the server of {self.name!r} did not start{why}: correct its options. The end of its "
            f"log:\n{children.last_lines(self.log)}"
        )

    def end(self) -> None:
        """End it and its engine."""
        children.end(self._process)


@contextmanager
def running(
    file: FleetFile, progress: Callable[[str], None] = print
) -> Iterator[tuple[dict[str, Server], Callable[[], RingStatus]]]:
    """Start the ring and all servers; end them after the block.

    Yields:
        The servers by model, and a function that returns the state of the ring.

    Raises:
        DjinnError: something did not start; nothing is left running.
    """
    python, device = vllm_python(file.python), parse_device(file.device)
    with ExitStack() as undo:
        place = socket_folder(len(_LONGEST_SOCKET))
        folder = Path(tempfile.mkdtemp(prefix="djinn-", dir=place))
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        ring = RingProcess(folder, {**file.ring_options(), "device": device})
        undo.callback(ring.end)
        servers: dict[str, Server] = {}
        for name, options in file.models.items():
            asked = {**defaults_on(device.type), **options}
            arguments = [*vllm_arguments(name, asked), "--worker-cls", WORKERS[device.type]]
            log = folder / f"server-{len(servers)}.log"
            servers[name] = Server(name, python, arguments, log, ring.socket)
            undo.callback(servers[name].end)
            progress(f"starting the server of {name}, which writes to {log}")
            if device.type == "cuda":  # one after the other: a loading model takes twice its memory
                servers[name].wait()
        for server in servers.values():
            server.wait()
        yield servers, ring.status


def serve(file: FleetFile, progress: Callable[[str], None] = print) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        ConfigError: another program listens at the address.
        PlatformError: a package for serving is missing.
        DjinnError: something did not start.
    """
    try:
        import uvicorn

        from djinn_lib.fleet.gateway import Gateway, Upstream
    except ImportError as error:
        raise PlatformError(
            f"{error.name} is not installed: pip install 'djinn-lib[fleet]', or run this in the "
            "environment that has vLLM"
        ) from error
    with _bound(file.host, file.port) as address, running(file, progress) as (servers, status):
        upstreams = {name: Upstream(one.url, one.is_alive) for name, one in servers.items()}
        progress(f"serving {', '.join(servers)} at http://{file.host}:{file.port}/v1")
        config = uvicorn.Config(
            Gateway(upstreams, status).app,
            log_level="warning",
            timeout_graceful_shutdown=_LAST_ANSWERS_S,
        )
        uvicorn.Server(config).run([address])


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """Bind a socket to the address first, because starting the servers takes minutes.

    It does not listen yet: connections are refused until all servers have started.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"nothing can be served at {host}:{port} ({error.strerror or error}): choose "
                "another `host` or `port`"
            ) from error
        yield bound


def _free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
