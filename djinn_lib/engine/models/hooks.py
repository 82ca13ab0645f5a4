"""Hooks of modules that belong to the module at hand, and not to copies of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Hook:
    """Calls a function before or after a module runs, with arguments of the hook's own.

    Compiled code has no such calls: whoever runs it waits for all weights first. A copy of the
    module, by `copy.deepcopy` or `pickle`, has weights of its own and nothing to ask for.
    """

    def __init__(self, function: Callable[..., None], *args: Any) -> None:
        self._function, self._args = function, args

    def __call__(self, *_: Any) -> None:
        """Called with the module and its arguments, which are of no interest."""
        if not torch.compiler.is_compiling():
            self._function(*self._args)

    def __deepcopy__(self, memo: Any) -> Hook:
        return Hook(_nothing)

    def __reduce__(self) -> Any:
        return Hook, (_nothing,)


def _nothing() -> None:
    """What a hook of a copied module does."""
