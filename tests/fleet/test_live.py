"""The picture of a ring that is drawn again while a cell of a notebook runs."""

import itertools
import threading
from types import SimpleNamespace

import IPython.core.getipython
import IPython.display
import pytest

from djinn_lib.errors import DjinnError
from djinn_lib.fleet.live import drawn_again


@pytest.fixture
def pictures(monkeypatch):
    """What a notebook would show, one after the other."""
    shown = []

    def display(html, display_id):
        shown.append(html.data)
        return SimpleNamespace(update=lambda html: shown.append(html.data))

    monkeypatch.setattr(IPython.core.getipython, "get_ipython", object)
    monkeypatch.setattr(IPython.display, "display", display)
    return shown


def test_it_is_drawn_at_once_while_the_block_runs_and_at_the_end(pictures):
    numbers, drawn = itertools.count(), threading.Event()

    def html():
        if (number := next(numbers)) == 3:
            drawn.set()
        return f"picture {number}"

    with drawn_again(html, 0.01):
        assert pictures[0] == "picture 0"
        assert drawn.wait(20)
    n_drawn = len(pictures)
    assert n_drawn >= 4 and pictures[-1] == f"picture {n_drawn - 1}"
    assert not [one for one in threading.enumerate() if one.name == "djinn-live"]


def test_what_is_gone_is_not_drawn_and_no_error_of_the_block(pictures):
    gone = threading.Event()

    def html():
        if gone.is_set():
            raise DjinnError("this fleet was closed")
        return "picture"

    with drawn_again(html, 0.01):
        gone.set()
    assert set(pictures) == {"picture"}


def test_an_error_of_the_block_ends_the_drawing(pictures):
    with pytest.raises(ValueError, match="of the block"), drawn_again(lambda: "picture", 60):
        raise ValueError("of the block")
    assert pictures == ["picture"] * 2


def test_outside_of_a_notebook_nothing_is_shown(capsys):
    with drawn_again(lambda: pytest.fail("nobody looks"), 0.01):
        pass
    assert capsys.readouterr().out == ""
