"""Executed notebooks as HTML files that need no network.

nbconvert's own pages fetch RequireJS, MathJax and Mermaid from the web. These do not, and they
follow the reader's choice of a light or a dark screen.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter

_TEMPLATE = """
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block html_head_css -%}
<style>
@media (prefers-color-scheme: dark) {
{% include 'static/theme-dark.css' %}
}
body { background: var(--jp-layout-color0); }
main { max-width: 70rem; margin: 0 auto; padding: 0 1rem; }
.jp-RenderedImage img { max-width: 100%; height: auto; }
.jp-RenderedHTMLCommon { overflow-x: auto; }
</style>
{%- endblock -%}
"""
_NO_ALT = "No description has been provided for this image"


@dataclass(frozen=True, slots=True)
class Page:
    """A notebook as HTML; `error` says why there is none."""

    notebook: Path
    html: Path
    error: str = ""


def convert_notebooks(folder: Path) -> list[Page]:
    """Convert every notebook of a folder whose HTML is missing or older; returns all of them.

    A notebook that cannot be converted does not stop the others.
    """
    exporter = HTMLExporter(raw_template=_TEMPLATE, embed_images=True)
    exporter.log.setLevel(logging.ERROR)  # pictures without a description get one here
    notebooks = sorted(folder.glob("*.ipynb"))
    whole = [path for path in notebooks if not path.name.endswith(".partial.ipynb")]
    return [_convert(exporter, notebook) for notebook in whole]


def _convert(exporter: HTMLExporter, notebook: Path) -> Page:
    html = notebook.with_suffix(".html")
    if html.exists() and html.stat().st_mtime_ns > notebook.stat().st_mtime_ns:
        return Page(notebook, html)
    try:
        content = nbformat.read(notebook, as_version=4)
        body, _ = exporter.from_notebook_node(
            content, {"metadata": {"name": notebook.stem, "path": str(notebook.parent)}}
        )
    except Exception as error:  # whatever a broken file makes the libraries raise
        html.unlink(missing_ok=True)
        return Page(notebook, html, f"{type(error).__name__}: {error}".splitlines()[0][:200])
    partial = html.with_name(html.name + ".partial")
    partial.write_text(body.replace(_NO_ALT, "Figure drawn by the cell above"), encoding="utf-8")
    os.replace(partial, html)
    return Page(notebook, html)
