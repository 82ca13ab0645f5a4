"""How far the adding of a model has come: a bar, calls of a function, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from djinn_lib.arguments import function

Show = bool | Callable[..., object]  # a function is told each step, as text
_SHOWN_AFTER_S = 0.5  # a small model needs no bar


class Progress:
    """What one `add` has done so far.

    Attributes:
        advance: called with how many more bytes of weights have been read.
        step: called with what is being done after that.
    """

    def __init__(self, advance: Callable[[int], object], step: Callable[[str], object]) -> None:
        self.advance, self.step = advance, step


@contextmanager
def progress_of(show: Show, name: str, n_bytes: int) -> Iterator[Progress]:
    """Show how far a model of `n_bytes` has come while the block runs.

    Args:
        show: True for a bar (tqdm, a widget in notebooks, else on stderr), False for nothing; a
            function is told the steps.
        name: of the model.
        n_bytes: of weights to read.
    """
    if show is False:
        yield Progress(lambda n: None, lambda step: None)
    elif callable(show):
        yield Progress(lambda n: None, lambda step: show(f"{name}: {step}"))
    else:
        with tqdm(
            desc=f"{name}: reading weights", total=n_bytes, unit="B", unit_scale=True,
            unit_divisor=1024, delay=_SHOWN_AFTER_S, leave=False, dynamic_ncols=True,
        ) as bar:  # fmt: skip
            yield Progress(bar.update, lambda step: bar.set_description(f"{name}: {step}"))
            bar.n = n_bytes  # gaps between tensors are not read; an incomplete widget turns red


def check_show(value: object) -> Show:
    """Return what may be shown.

    Raises:
        ConfigError: it is neither True, False nor a function.
    """
    return value if isinstance(value, bool) else function(value, "progress, if not True or False,")
