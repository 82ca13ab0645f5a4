"""README.md and docs/: limits, links, names of files, commands and options, and code that runs."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
from forked import run_script

import djinn_lib as dj
from djinn_lib.cli import app
from djinn_lib.paths import REFERENCE, REPO

README = REPO / "README.md"
DOCS = REPO / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
# Files that a run makes.
OF_A_RUN = {"index.html", "trace.json"}
_NOT_IN_GIT = (".venv", "data/runs", "data/models", "data/parts")
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FILE = re.compile(r"[\w-]+\.(py|ipynb|md|yml|toml|cff|lock|txt|json|jsonl|parquet|html)")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))


# -- what a page is made of ------------------------------------------------------------------


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return _FENCE.sub("", page.read_text())


def blocks(page: Path, language: str) -> Iterator[tuple[str, str]]:
    """The words after the language and the code of each block of a language."""
    for head, code in _FENCE.findall(page.read_text()):
        words = head.split()
        if words and words[0] == language:
            yield " ".join(words[1:]), code


def spans(page: Path) -> list[str]:
    """Inline code, less that of the paper's repository (the first column of its tables)."""
    text = prose(page)
    if page.name == "from-the-paper.md":
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)
    if page == README:
        text = re.sub(r"^\| `\w+\.py.*?\|", "|", text, flags=re.MULTILINE)
    return _SPAN.findall(text)


def commands(page: Path, program: str) -> list[str]:
    """What follows a program's name in inline code and in shell blocks, a command each."""
    lines = [*spans(page)]
    for _, code in blocks(page, "bash"):
        lines += code.replace("\\\n", " ").splitlines()
    begins = re.compile(rf"(?:^|&& |^timeout \d+ )(?:\S+/)?{program} (?=[a-z])([^#;&|]+)")
    return [found for line in lines for found in begins.findall(line)]


def anchors(page: Path) -> set[str]:
    """The anchors that code hosts give the headings of a page."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", head.lower()) for head in heads]
    return {head.strip().replace(" ", "-") for head in kept}


@cache
def file_names() -> set[str]:
    """Names of all files of the repository."""
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO)
    return {Path(line).name for line in listed.decode().splitlines()}


# -- limits ----------------------------------------------------------------------------------


def test_the_index_lists_every_page():
    listed = {(DOCS / link).resolve() for link in _LINK.findall((DOCS / "README.md").read_text())}
    assert {page for page in PAGES if page != DOCS / "README.md"} <= listed


# Claims whose measured values stand in the prose, and how.
SAID = {
    README: {
        "paper-p50-vs-pinned-like-for-like": "**{:.2f}x**", "paper-p50-vs-pinned": "{:.2f}x",
        "paper-p50-vs-pinned-mean-pace": "**{:.2f}x**", "ours-zipf-mean-vs-sleep": "**{:.2f}x**",
        "ours-mean-vs-sleep": "**{:.2f}x**", "ours-p90-vs-sleep": "{:.2f}x",
    },
    DOCS / "from-the-paper.md": {
        "paper-runtime-djinn": "{:.2f} s", "paper-runtime-pytorch": "{:.1f} s",
        "paper-runtime-vllm": "{:.0f} s", "paper-runtime-serverless": "{:.1f} s",
        "paper-total-size": "{:.2f} GiB",
    },
}  # fmt: skip


@pytest.mark.parametrize("page", SAID, ids=lambda page: page.name)
def test_numbers_in_the_prose_are_those_of_the_reference(page):
    claims = json.loads((REFERENCE / "claims.json").read_text())
    measured = {claim["id"]: claim["measured"] for claim in claims}
    text = prose(page)
    wanted = {name: form.format(measured[name]) for name, form in SAID[page].items()}
    assert {name: said for name, said in wanted.items() if said not in text} == {}


# -- links and names -------------------------------------------------------------------------


@every_page
def test_links_lead_somewhere(page):
    for link in _LINK.findall(prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links {link}"


@every_page
def test_files_and_modules_exist(page):
    for span in spans(page):
        if span.startswith("djinn_lib."):
            assert find_spec(span), f"{page.name}: {span}"
        elif re.fullmatch(r"\d\d_\w+", span):
            assert (REPO / "notebooks" / f"{span}.ipynb").exists(), f"{page.name}: {span}"
        elif re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?", span) and (REPO / span.split("/")[0]).is_dir():
            assert (REPO / span).exists() or span.startswith(_NOT_IN_GIT), f"{page.name}: {span}"
        elif _FILE.fullmatch(span):
            assert span in file_names() | OF_A_RUN, f"{page.name}: {span}"


# -- commands --------------------------------------------------------------------------------


@every_page
def test_make_has_the_targets_and_variables(page):
    text = (REPO / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE))
    variables = set(re.findall(r"\b([A-Z_]+) \?=", text)) | {"PY"}
    for command in commands(page, "make"):
        words = command.split()
        assert words[0] in targets, f"{page.name}: make {command}"
        named = [word.split("=")[0] for word in words[1:] if re.match(r"[A-Z_]+=", word)]
        assert set(named) <= variables, f"{page.name}: make {command}"


@every_page
def test_no_command_needs_an_environment_that_is_not_there(page):
    text = "\n".join([*spans(page), *(code for _, code in blocks(page, "bash"))])
    assert not re.findall(r"(?<!\.venv/bin/)\bpython3? (?:-m|\w+/)", text)


@cache
def command_line() -> Any:
    """The click group behind `djinn`."""
    return typer.main.get_command(app)


@every_page
def test_djinn_has_the_commands_and_options(page):
    for command in commands(page, "djinn"):
        name, *words = command.split()
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        existing = command_line().commands
        assert name in existing, f"{page.name}: djinn {command}"
        if existing[name].ignore_unknown_options:
            continue  # its options are those of another parser
        known = {option for one in existing[name].params for option in one.opts} | {"--help"}
        assert options <= known, f"{page.name}: djinn {command}"


# -- Python ----------------------------------------------------------------------------------


def parameters(function: Any) -> set[str] | None:
    """Names that a function takes, those of `**options: Unpack[...]` among them; None for any."""
    names = set()
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            hint = get_type_hints(inspect.unwrap(function))[name]
            if hint is Any:
                return None
            (unpacked,) = hint.__args__
            names |= set(unpacked.__annotations__)
        else:
            names.add(name)
    return names


def owner(node: ast.expr) -> Any:
    """What `dj`, `djinn` and `fleet` stand for in the examples, else None."""
    known = {"dj": dj, "djinn": dj.Djinn, "fleet": getattr(dj, "Fleet", None)}
    return known.get(node.id) if isinstance(node, ast.Name) else None


def wrong_names(code: str) -> list[str]:
    """Attributes of `dj` and `djinn`, and their keywords, that do not exist."""
    wrong = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and (of := owner(node.value)):
            if not hasattr(of, node.attr):
                wrong.append(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            function = getattr(owner(node.func.value), node.func.attr, None)
            known = parameters(function) if function else None
            if known is not None:
                wrong += [k.arg for k in node.keywords if k.arg and k.arg not in known]
    return wrong


@every_page
def test_python_names_what_there_is(page):
    for _, code in blocks(page, "python"):
        assert not wrong_names(code), f"{page.name}: {code}"
    for span in spans(page):
        if re.match(r"(dj|djinn)\.\w+($|\()", span):
            assert not wrong_names(span), f"{page.name}: {span}"


@every_page
def test_options_named_in_the_text_exist(page):
    functions = [dj.Djinn, dj.Djinn.add, dj.Djinn.generate, dj.simulate]
    known = set().union(*(parameters(function) or () for function in functions))
    for span in spans(page):
        if found := re.fullmatch(r"([a-z_]+)=(\"\w+\"|\d+|True|False)?", span):
            assert found[1] in known, f"{page.name}: {span}"


RUNNABLE = [
    (page, code) for page in PAGES for words, code in blocks(page, "python") if words == "run"
]


def test_a_name_that_does_not_exist_is_found():
    assert wrong_names("djinn.generate('a', [1], max_tokens=3)") == ["max_tokens"]
    assert wrong_names("dj.Jinn()") == ["Jinn"]
    assert not wrong_names("djinn.generate('a', [1], max_new_tokens=3, top_p=0.5)")


@pytest.mark.slow
def test_runnable_examples_run(tmp_path):
    """All in one process, each with names of its own."""
    assert README in {page for page, _ in RUNNABLE} and len(RUNNABLE) >= 5
    program = tmp_path / "program.py"
    program.write_text(
        "\n".join(
            f"exec(compile({code!r}, {page.name!r}, 'exec'), {{'__name__': '__main__'}})"
            for page, code in RUNNABLE
        )
    )
    ran = run_script(program)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "MiB loaded" in ran.stdout
