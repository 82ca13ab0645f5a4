"""Which files of this package a notebook or module runs, so that an edit reruns what it can change.

Told from the text, without importing anything: statements wherever they stand, so that what a
function imports when it is called counts too, and names in strings like
"djinn_lib.fleet.vllm_engine", by which other processes are told what to run.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from djinn_lib.paths import REPO

_NAME = r"\w+(\.\w+)*"


def imported_files(*starts: Path, package: Path = REPO / "djinn_lib") -> list[Path]:
    """Return the files of a package that modules or notebooks run, the modules included, sorted.

    Followed are absolute imports of modules and of what is in them, not names that a package hands
    on when asked (`djinn_lib.Djinn`): name their module.
    """
    found = {start for start in starts if start.is_relative_to(package)}
    still = list(starts)
    while still:
        for name in _names(still.pop(), package.name):
            for path in _files(name, package):
                if path not in found:
                    found.add(path)
                    still.append(path)
    return sorted(found)


def _files(name: str, package: Path) -> Iterator[Path]:
    """The file of a module and those of the packages around it, which Python runs before it."""
    place = package.parent
    for part in name.split("."):
        place /= part
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.is_file():
                yield path


@cache
def _names(path: Path, package: str) -> frozenset[str]:
    """The modules of a package, and what may be ones, that a file names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(_code(path), str(path))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            module = node.value.partition(":")[0]
            names.update([module] if re.fullmatch(_NAME, module) else [])
    return frozenset(name for name in names if name.split(".")[0] == package)


def _code(path: Path) -> str:
    """The Python of a file; of a notebook that of its cells, without IPython's own commands."""
    text = path.read_text()
    if path.suffix != ".ipynb":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    lines = "\n".join("".join(cell["source"]) for cell in cells).splitlines()
    return "\n".join("" if line.startswith(("%", "!")) else line for line in lines)
