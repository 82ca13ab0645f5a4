"""Move the printed output of executed notebooks to log files.

Notebooks of this package show results as tables and figures. They print only progress and messages
of libraries, which can be hundreds of lines. So an executed copy has a link to a log instead.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from djinn_lib.files import write_text

_WIDGET = "application/vnd.jupyter.widget-view+json"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours and cursor movements of terminals


def log_of(notebook: Path) -> Path:
    """Return where the log of an executed copy is, if it has one."""
    return notebook.with_suffix(".log")


def move_messages(notebook: Path, log: Path) -> None:
    """Move the printed output of an executed notebook into a log next to it, and link it.

    Each cell that printed gets a link. A progress bar becomes one line of the log. Without messages
    there is no log, and the log of an earlier execution is deleted.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the copy is not a notebook.
    """
    log.unlink(missing_ok=True)
    content, lines = json.loads(notebook.read_text()), []
    for number, cell in enumerate(_code_cells(content), start=1):
        printed = _lines([_text(output) for output in cell["outputs"] if _is_message(output)])
        kept = [output for output in cell["outputs"] if not _is_message(output)]
        if printed:
            lines += [f"--- code cell {number}", *printed]
            kept.insert(0, _link(log, len(printed)))
        cell["outputs"] = kept
    if lines:
        write_text(log, "\n".join(lines) + "\n")
    write_text(notebook, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def copy_with_log(notebook: Path, copy: Path) -> None:
    """Copy an executed notebook and its log; the copy links the log by its new name."""
    text = notebook.read_text()
    if (log := log_of(notebook)).exists():
        write_text(log_of(copy), log.read_text())
        text = text.replace(f"({quote(log.name)})", f"({quote(log_of(copy).name)})")
    write_text(copy, text)


def _code_cells(content: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        return [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    except (TypeError, KeyError) as error:
        raise ValueError(f"not a notebook: it has no {error}") from error


def _is_message(output: dict[str, Any]) -> bool:
    """Whether an output was printed; a bar that is drawn as a widget counts too."""
    if output["output_type"] == "display_data":
        return _WIDGET in output["data"]
    return output["output_type"] == "stream"


def _text(output: dict[str, Any]) -> str:
    text = output["text"] if "text" in output else [*output["data"].get("text/plain", ""), "\n"]
    return "".join(text)


def _lines(printed: list[str]) -> list[str]:
    """Return the lines of a text as a terminal finally shows them, without empty ones."""
    text = _ESCAPES.sub("", "".join(printed)).replace("\r\n", "\n")
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line for line in lines if line]


def _link(log: Path, n_lines: int) -> dict[str, Any]:
    lines = f"{n_lines} line{'s' * (n_lines != 1)}"
    text = f"[Messages of this cell]({quote(log.name)}): {lines}."
    return {"output_type": "display_data", "metadata": {}, "data": {"text/markdown": text}}
