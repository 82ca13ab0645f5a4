"""Start a Ray on this machine."""

from __future__ import annotations

from typing import Any

from djinn_lib.sockets import ray_folder

_LATE = "timed out during startup"
_ATTEMPTS = 5


def start_ray(**options: Any) -> None:
    """Start a Ray of its own for this process, also where another one runs on this machine.

    Ray gives a node 30 s to start, and has no option for more. A busy machine can take longer, so a
    node that is late is started again.

    Args:
        options: of `ray.init`.

    Raises:
        ConfigError: there is no folder for its sockets.
        Exception: what Ray raises; its plainest one where a node is late each time.
    """
    import ray

    for attempt in range(_ATTEMPTS):
        try:
            ray.init(address="local", include_dashboard=False, log_to_driver=False,
                     _temp_dir=ray_folder(), **options)  # fmt: skip
            return
        except Exception as error:
            ray.shutdown()
            if _LATE not in str(error) or attempt + 1 == _ATTEMPTS:
                raise
