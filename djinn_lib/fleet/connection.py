"""A client's connection to the broker of a ring."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch

from djinn_lib.errors import ConfigError
from djinn_lib.fleet import protocol
from djinn_lib.fleet.status import RingStatus

_GREETING_S = 30.0


class Connection:
    """A connection to a broker, after the greeting.

    Attributes:
        page_bytes, n_frames, device: of the ring.

    Raises:
        ConfigError: no broker listens there, or it belongs to another user or has another version.
        BrokerGone: it ended, or does not answer.
    """

    def __init__(self, path: str | Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._greet(path)
        except BaseException:
            self.socket.close()
            raise

    def _greet(self, path: str | Path) -> None:
        self.socket.settimeout(_GREETING_S)
        try:
            self.socket.connect(str(path))
        except PermissionError as error:
            raise ConfigError(
                f"the ring at {path} belongs to another user: start a ring of your own"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"no ring listens at {path} ({error.strerror or error}): start one there with "
                "`djinn ring`, or name another socket"
            ) from error
        if (uid := protocol.peer(self.socket)[1]) != os.getuid():
            raise ConfigError(
                f"the ring at {path} belongs to user {uid} and you are user {os.getuid()}: start a "
                "ring of your own"
            )
        protocol.send(self.socket, "hello", version=protocol.VERSION)
        welcome = protocol.expect(protocol.receive(self.socket), "welcome")
        self.page_bytes: int = protocol.field(welcome, "page_bytes", int)
        self.n_frames: int = protocol.field(welcome, "n_frames", int)
        self.device = torch.device(protocol.field(welcome, "device", str))
        self.socket.settimeout(None)

    def status(self) -> RingStatus:
        """Query the ring; only for a connection that has not joined.

        Raises:
            BrokerGone: the broker ended.
        """
        protocol.send(self.socket, "status")
        return RingStatus.from_message(protocol.expect(protocol.receive(self.socket), "status"))

    def join(self, model: str, n_pages: int) -> list[int]:
        """Join as the engine of a model; return frame descriptors for the caller to close

        Raises:
            ConfigError: another engine serves that model.
            CapacityError: it is larger than the ring.
        """
        protocol.send(self.socket, "join", model=model, n_pages=n_pages)
        joined = protocol.expect(protocol.receive(self.socket), "joined")
        n_descriptors = protocol.field(joined, "n_descriptors", int)
        return protocol.receive_descriptors(self.socket, n_descriptors)

    def close(self) -> None:
        """Close the connection; closing twice is harmless."""
        self.socket.close()
