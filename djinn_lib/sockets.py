"""Where sockets with a path can be: Linux takes no longer one than 107 bytes.

Batch systems set long folders for temporary files, and libraries that listen there fail late and in
words of their own. So each that does is told where its sockets fit: kernels, Ray, vLLM.
"""

from __future__ import annotations

import os
import tempfile

from djinn_lib.errors import ConfigError

LONGEST_BYTES = 107
_SHORT = "/tmp"
_RAYS = "/ray/session_2026-11-23_06-00-00_123456_1234567/sockets/plasma_store.1"


def socket_folder(n_below: int, wanted: str | None = None) -> str:
    """Return a folder for sockets: the one that is wanted, or /tmp where that is too long.

    Args:
        n_below: bytes that the longest path of a socket in it has more than the folder.
        wanted: default is the folder for temporary files (TMPDIR).

    Raises:
        ConfigError: the one is too long, and in the other nothing can be written.
    """
    folder = wanted or tempfile.gettempdir()
    longest = LONGEST_BYTES - n_below
    if len(os.fsencode(folder)) <= longest:
        return folder
    if os.access(_SHORT, os.W_OK | os.X_OK):
        return _SHORT
    raise ConfigError(
        f"expected a folder for sockets of at most {longest} bytes, got {folder}, and {_SHORT} "
        "cannot be written to: set TMPDIR to a shorter folder"
    )


def ray_folder() -> str:
    """Return where a Ray that is started here can have its sockets, logs and spilled objects.

    As Ray itself chooses it, by RAY_TMPDIR or TMPDIR, where that is short enough.

    Raises:
        ConfigError: see `socket_folder`.
    """
    wanted = os.path.abspath(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    return os.path.join(socket_folder(len(_RAYS), wanted), "ray")
