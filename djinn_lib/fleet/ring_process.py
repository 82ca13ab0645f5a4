"""Run a broker in its own process, for a `Fleet` or `djinn serve`."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from djinn_lib.errors import ConfigError, DjinnError
from djinn_lib.fleet import children
from djinn_lib.fleet.connection import Connection
from djinn_lib.fleet.protocol import EXIT_STATUS, BrokerGone
from djinn_lib.fleet.status import RingStatus

_STARTS_S = 120.0


class RingProcess:
    """Starts `djinn ring`, which ends with this process and then removes its folder.

    Args:
        folder: folder of its socket and its log.
        options: options of `djinn ring`.

    Attributes:
        socket: path to which engines connect (DJINN_RING).

    Raises:
        ConfigError, CapacityError, PlatformError: it did not start; with its own message.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        self.socket, self._log = folder / "ring", folder / "ring.log"
        said = {**options, "socket": self.socket, "scratch": folder}
        arguments = [text for name, value in said.items() for text in (f"--{name}", str(value))]
        self.process = children.start(
            sys.executable, "djinn_lib.fleet.commands", ["ring", *arguments], self._log
        )
        try:
            self._connect().close()
        except BaseException:
            children.end(self.process)
            raise

    def _connect(self) -> Connection:
        until_s = time.monotonic() + _STARTS_S
        while time.monotonic() < until_s:
            if self.process.poll() is not None:
                raise self._not_started(self.process.returncode)
            with suppress(ConfigError):
                return Connection(self.socket)
            time.sleep(0.05)
        raise DjinnError(
            f"the broker of the ring did not start within {_STARTS_S:.0f} s. The end of its log:\n"
            f"{children.last_lines(self._log)}"
        )

    def _not_started(self, status: int) -> DjinnError:
        """Return the error on the last line of the broker's log."""
        said = children.last_lines(self._log).rpartition("djinn: ")[2]
        kinds = {number: kind for kind, number in EXIT_STATUS.items()}
        return kinds.get(status, DjinnError)(
            said or f"the broker of the ring ended (exit status {status})"
        )

    def status(self) -> RingStatus:
        """Query the state of the ring, over a connection that an interrupt cannot leave halfway.

        Raises:
            BrokerGone: its process ended.
        """
        try:
            connection = Connection(self.socket)
        except ConfigError as error:
            raise BrokerGone from error
        with closing(connection):
            return connection.status()

    def end(self) -> None:
        """End the broker; a second call does nothing."""
        children.end(self.process)
