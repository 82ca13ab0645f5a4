"""Texts without the paths of the machine that they come from, for what is published."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# An absolute path of two parts or more. What comes before keeps URLs, rates (GB/s), HTML tags and
# paths relative to something, `{folder}/a/b` among them, out of it.
_ABSOLUTE = re.compile(r"(?<![\w./:<}\]-])/(?:[\w.+@{}\[\]-]+/)+([\w.+@{}\[\]-]+)/?")


def scrub_text(text: str, known: Mapping[str, str] | None = None) -> str:
    """Return a text with known folders renamed, and every other absolute path cut to its last part.

    Args:
        text: any.
        known: folders and what to write instead; longer ones are replaced first.
    """
    text = text.replace("file:///", "/")
    for folder in sorted(known or {}, key=len, reverse=True):
        text = re.sub(rf"{re.escape(folder)}(?=/|\b)", lambda _, f=folder: (known or {})[f], text)
    return _ABSOLUTE.sub(lambda found: found[1], text)


def scrub(value: Any, known: Mapping[str, str] | None = None) -> Any:
    """Return plain data with every text in it scrubbed; pictures (keys "image/...") stay."""
    if isinstance(value, str):
        return scrub_text(value, known)
    if isinstance(value, list):
        return [scrub(item, known) for item in value]
    if isinstance(value, dict):
        return {
            key: item if str(key).startswith("image/") else scrub(item, known)
            for key, item in value.items()
        }
    return value


def scrub_notebook(path: Path, run_dir: str, known: Mapping[str, str]) -> None:
    """Rewrite an executed notebook in place: its run folder becomes `run_dir`, the repository ".".

    Papermill notes both in the notebook, as they were on the machine that executed it.

    Args:
        path: of the notebook.
        run_dir: what to write for the run's folder.
        known: more folders and what to write instead.
    """
    content, known = json.loads(path.read_text()), dict(known)
    papermill = content.get("metadata", {}).get("papermill", {})
    if executed := papermill.get("parameters", {}).get("run_dir"):
        known[executed] = run_dir
    if source := papermill.get("input_path"):
        known[str(Path(source).parent.parent)] = "."
    path.write_text(json.dumps(scrub(content, known), indent=1, ensure_ascii=False) + "\n")
