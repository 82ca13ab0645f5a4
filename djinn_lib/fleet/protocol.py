"""Messages between the broker of a ring and its clients, protocol version 1.

The transport is a Unix stream socket of mode 0600, one connection per client. Each message is a
JSON object after its length (4 bytes, big-endian), with a field "kind". The broker accepts
connections of its own user only (SO_PEERCRED).

A connection starts with a greeting:

=================  ==================================================  ============================
kind               fields                                              then
=================  ==================================================  ============================
client: hello      version                                             welcome, or refused
broker: welcome    version, page_bytes, n_frames, device               the client may go on
broker: refused    error (a class of `djinn_lib.errors`), message      the broker hangs up
=================  ==================================================  ============================

A monitoring client sends ``status`` at any time, and is answered with ``status``: the fields of
`djinn_lib.fleet.status.RingStatus`. An engine joins:

=================  ==================================================  ============================
kind               fields                                              meaning
=================  ==================================================  ============================
engine: join       model, n_pages                                      at most one engine per model
broker: joined     n_descriptors                                       the frames follow, once, as
                                                                       descriptors: one byte of data
                                                                       with up to 200 of them each
engine: ask        -                                                   it has work
broker: frames     n_kept, frames, granted, n_evicted                  keep the first `n_kept`
                                                                       pages, map `frames` after
                                                                       them, load those; compute
                                                                       when `granted`
engine: loaded     seconds                                             the pages of a grant arrived
engine: use        -                                                   a request came under a lease
broker: revoke     -                                                   give back after this step
engine: give_back  drop                                                done with its pages; `drop`
                                                                       frees their frames as well
engine: leave      -                                                   it no longer accesses any
                                                                       frame
=================  ==================================================  ============================

``revoke`` may cross a ``give_back``; an engine without a lease ignores it. If an engine's
connection ends without ``leave``, its frames are free when its process has ended.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from djinn_lib import errors
from djinn_lib.errors import CapacityError, ConfigError, DjinnError, PlatformError

VERSION = 1
EXIT_STATUS = {ConfigError: 2, CapacityError: 3, PlatformError: 4}  # of a broker that cannot start
HEADER = struct.Struct("!I")
MOST_BYTES = 64 << 20  # more than the page table of the largest ring
_DESCRIPTORS_AT_ONCE = 200  # Linux allows 253 per message

Message = dict[str, Any]


class ProtocolError(DjinnError, ConnectionError):
    """The other side sent a message that this version does not know."""


class BrokerGone(DjinnError, ConnectionError):
    """The broker of a ring ended, or closed the connection."""

    said = (
        "the broker of the ring ended or closed the connection: start it again (`djinn ring`, or a "
        "new Fleet), and then the engines"
    )

    def __init__(self, message: str = said) -> None:
        super().__init__(message)


def encode(kind: str, **fields: object) -> bytes:
    """Encode a message for the socket."""
    body = json.dumps({"kind": kind, **fields}).encode()
    return HEADER.pack(len(body)) + body


def decode(body: bytes) -> Message:
    """Decode the body of a message.

    Raises:
        ProtocolError: it is not a message.
    """
    try:
        message = json.loads(body)
    except ValueError:
        message = None
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        raise ProtocolError(
            "the ring's socket received something else than a message of its protocol: connect "
            "only engines of the same version of djinn_lib"
        )
    return message


def body_bytes(header: bytes) -> int:
    """Return the length of the body after a header, in bytes.

    Raises:
        ProtocolError: it is longer than any message.
    """
    (n_bytes,) = HEADER.unpack(header)
    if n_bytes > MOST_BYTES:
        raise ProtocolError(
            f"the ring's socket received a message of {n_bytes} bytes, more than its protocol "
            "has: connect only engines of the same version of djinn_lib"
        )
    return n_bytes


def field(message: Mapping[str, Any], name: str, kind: type) -> Any:
    """Return a field of a message.

    Raises:
        ProtocolError: it is missing, or of another type.
    """
    value = message.get(name)
    is_bool = isinstance(value, bool) and kind is not bool
    if is_bool or not isinstance(value, (int, float) if kind is float else kind):
        raise ProtocolError(
            f"the message {message.get('kind')!r} has no field {name!r} of type {kind.__name__}: "
            "connect only engines of the same version of djinn_lib"
        )
    return value


def send(connection: socket.socket, kind: str, **fields: object) -> None:
    """Send a message; block until the socket has accepted it.

    Raises:
        BrokerGone: the connection ended, or was closed.
    """
    try:
        connection.sendall(encode(kind, **fields))
    except OSError as error:
        raise BrokerGone from error


def receive(connection: socket.socket) -> Message:
    """Wait for a message; raise the error that a "refused" message names.

    Raises:
        BrokerGone: the other side closed the connection.
        ProtocolError: it is not a message.
        DjinnError: the broker refused.
    """
    header = receive_bytes(connection, HEADER.size)
    message = decode(receive_bytes(connection, body_bytes(header)))
    if message["kind"] == "refused":
        raise refusal(message)
    return message


def receive_bytes(connection: socket.socket, n_bytes: int) -> bytes:
    """Wait for exactly `n_bytes` bytes.

    Raises:
        BrokerGone: the connection ended before, was closed, or its time was up.
    """
    data = bytearray()
    while len(data) < n_bytes:
        try:
            part = connection.recv(n_bytes - len(data))
        except OSError:
            part = b""
        if not part:
            raise BrokerGone
        data += part
    return bytes(data)


def expect(message: Message, kind: str) -> Message:
    """Return a message if it is of the expected kind.

    Raises:
        ProtocolError: it is of another kind.
    """
    if message["kind"] != kind:
        raise ProtocolError(
            f"expected the message {kind!r}, got {message['kind']!r}: connect only engines of the "
            "same version of djinn_lib"
        )
    return message


def send_descriptors(connection: socket.socket, descriptors: Sequence[int]) -> None:
    """Send open files to another process, which receives its own descriptors."""
    for first in range(0, len(descriptors), _DESCRIPTORS_AT_ONCE):
        some = list(descriptors[first : first + _DESCRIPTORS_AT_ONCE])
        socket.send_fds(connection, [b"\0"], some)


def receive_descriptors(connection: socket.socket, n: int) -> list[int]:
    """Receive `n` open files; the caller must close them.

    Raises:
        BrokerGone: the connection ended before.
    """
    descriptors: list[int] = []
    while len(descriptors) < n:
        data, some, _, _ = socket.recv_fds(connection, 1, min(n, _DESCRIPTORS_AT_ONCE))
        descriptors += some
        if not data or not some:
            for descriptor in descriptors:
                os.close(descriptor)
            raise BrokerGone(
                f"the broker of the ring sent {len(descriptors)} of {n} frames: raise `ulimit -n` "
                "of this process, and start the engine again"
            )
    return descriptors


def peer(connection: socket.socket) -> tuple[int, int]:
    """Return the process id and the user id of the other side."""
    pid, uid, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    return pid, uid


def refused(error: BaseException) -> bytes:
    """Encode the message that refuses a client."""
    return encode("refused", error=type(error).__name__, message=str(error))


def refusal(message: Message) -> DjinnError:
    """Return the error that a "refused" message names."""
    kind = error_class(str(message.get("error"))) or DjinnError
    return kind(str(message.get("message")))


def error_class(name: str) -> type[DjinnError] | None:
    """Return a class of `djinn_lib.errors` by name, or None."""
    found = getattr(errors, name, None)
    return found if isinstance(found, type) and issubclass(found, DjinnError) else None
