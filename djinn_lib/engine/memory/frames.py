"""Count the frames that fit into a capacity, and describe which pages lie in which frames."""

from __future__ import annotations

from dataclasses import dataclass

from djinn_lib.errors import CapacityError, ConfigError
from djinn_lib.units import format_bytes

MOST_FRAMES = 1 << 24  # their tables take 1 GiB of host memory


@dataclass(frozen=True, slots=True)
class Extent:
    """Consecutive pages of one model and the frame of each: `first_page + i` is in `frames[i]`."""

    model: str
    first_page: int
    frames: tuple[int, ...]


def n_frames_in(capacity_bytes: int, page_bytes: int, what: str = "a capacity") -> int:
    """Return how many whole frames fit into a capacity; `what` names it in errors.

    Raises:
        ConfigError: the page size is below 1, or the frames are too many for their tables.
        CapacityError: not one frame fits.
    """
    if page_bytes < 1:
        raise ConfigError(f"expected a page size of at least 1 byte, got {page_bytes}")
    if capacity_bytes < page_bytes:
        raise CapacityError(
            f"expected {what} of at least one page ({format_bytes(page_bytes)}), got "
            f"{format_bytes(capacity_bytes)}: raise it or choose smaller pages"
        )
    if (n_frames := capacity_bytes // page_bytes) > MOST_FRAMES:
        raise ConfigError(
            f"expected {what} of at most {MOST_FRAMES} pages, got {n_frames} "
            f"({format_bytes(capacity_bytes)} in pages of {format_bytes(page_bytes)}): lower it or "
            "choose larger pages"
        )
    return n_frames
