"""Hooks that act on one module only, not on copies of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Hook:
    """Call a function with fixed arguments before or after a module runs.

    Compiled code skips hooks, so its caller must wait for all weights first. A copy of the module
    (`copy.deepcopy` or `pickle`) owns its weights, so its hooks do nothing.
    """

    def __init__(self, function: Callable[..., None], *args: Any) -> None:
        self._function, self._args = function, args

    def __call__(self, *_: Any) -> None:
        """Run the function; the module and its arguments are ignored."""
        if not torch.compiler.is_compiling():
            self._function(*self._args)

    def __deepcopy__(self, memo: Any) -> Hook:
        return Hook(_nothing)

    def __reduce__(self) -> Any:
        return Hook, (_nothing,)


def _nothing() -> None:
    """Do nothing; the hook of a copied module."""
