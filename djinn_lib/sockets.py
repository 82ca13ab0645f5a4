"""Choose folders for Unix sockets, whose paths Linux limits to 107 bytes.

Batch systems set long temporary folders, and libraries that listen there fail late with unclear
errors. So each of them gets a folder that is short enough: kernels, Ray, vLLM.
"""

from __future__ import annotations

import os
import tempfile

from djinn_lib.errors import ConfigError

LONGEST_BYTES = 107
_SHORT = "/tmp"
_RAYS = "/ray/session_2026-11-23_06-00-00_123456_1234567/sockets/plasma_store.1"


def socket_folder(n_below: int, wanted: str | None = None) -> str:
    """Return a folder for sockets: the wanted one, or /tmp if that is too long.

    Default is the folder for temporary files (TMPDIR). A socket's path adds at most `n_below`
    bytes.

    Raises:
        ConfigError: the wanted folder is too long, and /tmp is not writable.
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
    """Return a folder for the sockets, logs and spilled objects of a new Ray.

    It is Ray's own choice, RAY_TMPDIR or TMPDIR, if that is short enough.

    Raises:
        ConfigError: see `socket_folder`.
    """
    wanted = os.path.abspath(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    return os.path.join(socket_folder(len(_RAYS), wanted), "ray")
