"""Update a picture in a notebook while a block runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from djinn_lib.errors import DjinnError


@contextmanager
def drawn_again(html: Callable[[], str], every_s: float) -> Iterator[None]:
    """Show the result of `html`; update it every `every_s` seconds and at the end.

    Outside a notebook, it shows nothing.
    """
    try:
        from IPython.core.getipython import get_ipython
        from IPython.display import HTML, display
    except ImportError:
        yield
        return
    if get_ipython() is None:
        yield
        return
    picture: Any = display(HTML(html()), display_id=True)
    ended = threading.Event()

    def draw() -> None:
        with suppress(DjinnError, OSError):  # the source of the picture may have been closed
            picture.update(HTML(html()))

    def draw_again() -> None:
        while not ended.wait(every_s):
            draw()

    drawing = threading.Thread(target=draw_again, name="djinn-live", daemon=True)
    drawing.start()
    try:
        yield
    finally:
        ended.set()
        drawing.join()
        draw()
