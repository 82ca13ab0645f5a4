"""Open the storage of masters that a user's options ask for: host or disk, compressed or not."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, cast, get_args

import torch

from djinn_lib.engine.memory.disk_tier import DiskTier
from djinn_lib.engine.memory.masters import HostMasters, Masters
from djinn_lib.errors import ConfigError, PlatformError
from djinn_lib.paths import user_path
from djinn_lib.units import parse_bytes

MastersForm = Literal["plain", "compressed", "auto"]


def choose_masters(masters: str, device: torch.device) -> MastersForm:
    """Return the form of masters: as requested, or plain if `device` cannot decode them.

    Raises:
        ConfigError: the form is unknown.
        PlatformError: compressed masters are requested, and the GPU cannot decode them.
    """
    if masters not in get_args(MastersForm):
        raise ConfigError(f"expected masters to be one of {get_args(MastersForm)}, got {masters!r}")
    if device.type == "cuda" and masters != "plain" and find_spec("triton") is None:
        if masters == "compressed":
            raise PlatformError(
                "masters='compressed' needs the package triton to decode weights on a GPU: "
                "pip install 'triton>=3.5,<4', or use masters='plain'"
            )
        return "plain"
    return cast("MastersForm", masters)


def open_masters(
    host_capacity: int | str | None,
    page_bytes: int,
    swap_dir: str | Path | None = None,
    pin: bool = False,
    form: MastersForm = "plain",
) -> Masters:
    """Open the storage of masters: host memory, or disk with host memory as a cache.

    Args:
        host_capacity: host memory for masters, in bytes or as text; None keeps all of them there.
        page_bytes: size of a page.
        swap_dir: folder of the files on disk; default DJINN_SWAP_DIR, or the user's cache.
        pin: register host memory with the CUDA driver.
        form: "compressed" compresses them; "auto" compresses models that get smaller by 5% or more.

    Raises:
        CapacityError, ConfigError: see `DiskTier` and `CompressedMasters`.
    """
    store = _open_store(host_capacity, page_bytes, swap_dir, pin)
    if form == "plain":
        return store
    # Here, because numba takes a second to import, and plain masters do not need it.
    from djinn_lib.engine.memory.compressed.masters import CompressedMasters

    try:
        return CompressedMasters(store, page_bytes, form == "auto")
    except BaseException:
        store.close()
        raise


def _open_store(
    host_capacity: int | str | None, page_bytes: int, swap_dir: str | Path | None, pin: bool
) -> HostMasters | DiskTier:
    folder = None if swap_dir is None else user_path(swap_dir, "swap_dir")
    if host_capacity is None:
        return HostMasters(pin)
    return DiskTier(parse_bytes(host_capacity), page_bytes, folder or default_folder(), pin)


def default_folder() -> Path:
    """Return DJINN_SWAP_DIR, or a folder in the user's cache."""
    named = os.environ.get("DJINN_SWAP_DIR")
    return user_path(named or "~/.cache/djinn/swap", "DJINN_SWAP_DIR")
