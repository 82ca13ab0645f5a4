"""The commands `djinn ring` and `djinn serve`."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from djinn_lib.errors import DjinnError
from djinn_lib.fleet import children
from djinn_lib.fleet.protocol import EXIT_STATUS

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.command()
def ring(
    capacity: Annotated[str, typer.Option(help="device memory for weights, such as 25GiB")],
    socket: Annotated[Path, typer.Option(help="socket to which engines connect (DJINN_RING)")],
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu")] = None,
    page: Annotated[
        str | None, typer.Option(help="page size; 64MiB on a GPU, 1MiB on the CPU")
    ] = None,
    policy: Annotated[str, typer.Option(help="lru, lfu, ewma, adaptive or lookahead")] = "lru",
    eviction: Annotated[str, typer.Option(help="evict `pages`, or whole `models`")] = "pages",
    quantum: Annotated[float, typer.Option(help="minimum duration of a lease, in seconds")] = 0.25,
    max_wait: Annotated[float, typer.Option(help="seconds that an engine waits at most")] = 1.0,
    scratch: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Own the memory for weights of one device, and lend it to the engines that connect."""
    with _said_in_one_line():
        from djinn_lib.fleet.broker import open_broker

        broker = open_broker(capacity, device, page, policy, eviction, quantum, max_wait)
        status = broker.status()
        said = f"ring of {status.n_frames} frames on {status.device}, at {socket}"
        try:
            broker.run(socket, lambda: print(said, flush=True))
        finally:
            if scratch:  # the folder of a fleet that may have been killed
                shutil.rmtree(scratch, ignore_errors=True)


@app.command()
def serve(file: Annotated[Path, typer.Argument(help="fleet.yml, with models and memory")]) -> None:
    """Serve several models at one OpenAI-compatible address."""
    with _said_in_one_line():
        from djinn_lib.fleet import fleet_file
        from djinn_lib.fleet import serve as serving

        serving.serve(fleet_file.read_fleet_file(file))


@contextmanager
def _said_in_one_line() -> Iterator[None]:
    """Print our own errors in one line, without a traceback."""
    try:
        yield
    except DjinnError as error:
        print(f"djinn: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_STATUS.get(type(error), 1)) from error


@app.callback()
def fleet() -> None:
    """Serve several models from one ring of device memory with vLLM."""


if __name__ == "__main__":
    children.end_with_parent(signal.SIGTERM)  # SIGTERM, so it cleans up
    app()
