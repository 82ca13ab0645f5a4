"""What executed notebooks printed lies in a log next to them, and is linked."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from djinn_lib.experiment.execution.notebook_logs import copy_with_log, log_of, move_messages

WIDGET = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": "50%|#  |"}


def printed(text: str, name: str = "stderr"):
    return new_output("stream", text=text, name=name)


def executed(path: Path, *outputs) -> Path:
    """A notebook whose second code cell has these outputs."""
    cells = [
        new_markdown_cell("# T"),
        new_code_cell("n = 1"),
        new_code_cell("f()", outputs=list(outputs)),
    ]
    nbformat.write(new_notebook(cells=cells), path)
    return path


def left(path: Path) -> list:
    return nbformat.read(path, as_version=4).cells[2].outputs


def test_a_copy_keeps_its_results_and_links_what_was_printed(tmp_path):
    table = new_output("execute_result", data={"text/plain": "a table"}, execution_count=1)
    picture = new_output("display_data", data={"image/png": "abcd"})
    copy = executed(
        tmp_path / "a.ipynb", printed("one\n"), table, printed("two\n", "stdout"), picture
    )
    move_messages(copy, log_of(copy))
    assert log_of(copy).read_text() == "--- code cell 2\none\ntwo\n"
    link, *results = left(copy)
    assert link["data"] == {"text/markdown": "[Messages of this cell](a.log): 2 lines."}
    assert results == [table, picture]
    nbformat.validate(nbformat.read(copy, as_version=4))


def test_bars_of_progress_are_a_line_each(tmp_path):
    bars = [printed(f"\r{n}%|##|") for n in (0, 50, 100)]
    coloured = printed("\x1b[31mred\x1b[0m\r\n\n")
    copy = executed(tmp_path / "a.ipynb", *bars, printed("\n"), coloured)
    move_messages(copy, log_of(copy))
    assert log_of(copy).read_text().splitlines()[1:] == ["100%|##|", "red"]


def test_a_bar_that_is_a_widget_is_printed_too_but_a_result_that_is_one_is_not(tmp_path):
    result = new_output("execute_result", data=WIDGET, execution_count=1)
    copy = executed(tmp_path / "a.ipynb", new_output("display_data", data=WIDGET), result)
    move_messages(copy, log_of(copy))
    assert "50%|#  |" in log_of(copy).read_text()
    assert left(copy)[1:] == [result]


def test_a_copy_without_messages_has_no_log(tmp_path):
    copy = executed(tmp_path / "a.ipynb", printed("\n"))
    log_of(copy).write_text("of an earlier execution")
    move_messages(copy, log_of(copy))
    assert not log_of(copy).exists() and left(copy) == []


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"cells": [{}]}'])
def test_half_a_copy_is_no_notebook(tmp_path, content):
    copy = tmp_path / "a.ipynb"
    copy.write_text(content)
    with pytest.raises(ValueError):
        move_messages(copy, log_of(copy))
    assert copy.read_text() == content


def test_a_log_goes_where_its_notebook_goes(tmp_path):
    copy = executed(tmp_path / "a b.ipynb", printed("one\n"))
    move_messages(copy, log_of(copy))
    copy_with_log(copy, tmp_path / "c.ipynb")
    assert (tmp_path / "c.log").read_text() == log_of(copy).read_text()
    assert "(c.log)" in left(tmp_path / "c.ipynb")[0]["data"]["text/markdown"]
    plain = executed(tmp_path / "d.ipynb")
    copy_with_log(plain, tmp_path / "e.ipynb")
    assert not (tmp_path / "e.log").exists()
    assert json.loads((tmp_path / "e.ipynb").read_text()) == json.loads(plain.read_text())
