"""What tasks are begun with: a file that is edited while a task runs was not what it ran.

doit looks at the files that a task depends on when the task has ended. A cell runs for minutes to
hours; an edit meanwhile would pass for what its rows were made with. So what a task reads is noted
before it begins and kept with its success, and the task is up to date while that is still so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

Inputs = dict[str, str]  # a digest by name; names of files are their paths
_KEY = "begun_with"


def file_inputs(paths: Iterable[Path | str]) -> Inputs:
    """Return a digest of each file; of one that is not there, or cannot be read, that it is not."""
    return {str(path): _digest(Path(path)) for path in paths}


def value_input(value: Any) -> str:
    """Return a digest of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class Begun:
    """The tasks of this process: what they were begun with, and which have run.

    Names are doit's. A task that has run here is not run again in the same process for an edit
    meanwhile: whoever edits may not have finished. The next process runs it.
    """

    def __init__(self) -> None:
        self._noted: dict[str, Inputs] = {}
        self._ran: set[str] = set()

    def note(self, task: str, inputs: Inputs) -> None:
        """Note what a task is begun with that runs elsewhere, and whose action only keeps that."""
        self._noted[task] = inputs

    def action(
        self, act: Callable[..., bool | None], read: Callable[[], Inputs]
    ) -> Callable[..., bool | dict[str, Any]]:
        """Return an action for doit that notes what its task begins with, and keeps it.

        Args:
            act: what it does; False if it failed.
            read: returns what it would be begun with now.
        """

        def noted(*arguments: Any, task: Any) -> bool | dict[str, Any]:  # doit gives the task
            begun = self._noted.pop(task.name, None) or read()
            if act(*arguments) is False:
                return False
            self._ran.add(task.name)
            if changed := _changed(begun, read()):
                print(f"{task.name}: {', '.join(changed)} changed while it ran: "
                      "the next run does it again", flush=True)  # fmt: skip
            return {_KEY: value_input(begun)}

        return noted

    def still(self, read: Callable[[], Inputs]) -> Callable[[Any, Any], bool]:
        """Return a check for doit's `uptodate`: what a task was begun with is as it was."""

        def unchanged(task: Any, values: Mapping[str, Any]) -> bool:
            return task.name in self._ran or values.get(_KEY) == value_input(read())

        return unchanged


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return f"not read: {error.strerror}"


def _changed(before: Inputs, now: Inputs) -> list[str]:
    """Names whose digests differ; files by their last part."""
    names = sorted(before.keys() | now.keys())
    return [Path(name).name for name in names if before.get(name) != now.get(name)]
