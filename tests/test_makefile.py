"""The Makefile: how it finds Python, builds the environment, refuses bad input and cleans up.

A stand-in for Python writes down what it is asked to do, so nothing is installed or fetched here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from djinn_lib.paths import REPO

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")

# Makes "environments" that hold copies of itself, logs every call of pip, and fails when an
# argument of pip contains $FAIL_ON.
STAND_IN = """#!/bin/sh
case "$*" in
  "-m venv"*) for d; do :; done; rm -rf "$d"; mkdir -p "$d/bin"; touch "$d/pyvenv.cfg"
              cp "$0" "$d/bin/python"; echo "venv" >> "$LOG" ;;
  "-m pip"*) echo "pip" >> "$LOG"
             if [ -n "$FAIL_ON" ]; then case "$*" in *"$FAIL_ON"*) exit 1 ;; esac; fi ;;
esac
"""

TOOLS = "sh cat grep sha256sum cut uname mkdir mktemp cp rm ls touch awk find xargs id"
COMMANDS = "help reproduce test lab vllm figures lint format clean setup"


class Tree:
    """A copy of what the Makefile reads, with a search path of its own."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin, self.log = root / "tree", root / "bin", root / "log"
        for folder in ("requirements", "params"):
            shutil.copytree(REPO / folder, self.root / folder)
        shutil.copy(REPO / "Makefile", self.root)
        for profile in ("cpu", "gpu", "smoke"):
            (self.root / "params" / f"{profile}.yml").touch()
        self.bin.mkdir()
        for tool in TOOLS.split():
            (self.bin / tool).symlink_to(shutil.which(tool) or tool)

    def command(self, name: str, text: str) -> None:
        """Put an executable of this text on the search path."""
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def make(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run make here, away from the variables of a make around this test."""
        environment = {"PATH": str(self.bin), "LOG": str(self.log), "FAIL_ON": "", **variables}
        make = shutil.which("make") or "make"
        return subprocess.run(
            [make, *arguments], cwd=self.root, env=environment, capture_output=True, text=True
        )

    def calls(self) -> list[str]:
        """What the stand-in was asked for since the last look."""
        lines = self.log.read_text().split() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines

    def stamps(self) -> list[Path]:
        return list((self.root / ".venv").glob(".stamp-*"))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    made = Tree(tmp_path)
    made.command("python3", STAND_IN)
    return made


def test_help_is_the_default_and_lists_every_command(tree: Tree) -> None:
    said = tree.make().stdout
    for command in COMMANDS.split():
        assert re.search(rf"^  make {command} ", said, flags=re.M), command


def test_setup_installs_once(tree: Tree) -> None:
    assert tree.make("setup").returncode == 0
    assert tree.calls() == ["venv", *["pip"] * 4]
    assert len(tree.stamps()) == 1
    assert tree.make("setup").returncode == 0
    assert tree.calls() == []


def test_changed_lock_is_installed_into_the_same_environment(tree: Tree) -> None:
    tree.make("setup")
    (old,) = tree.stamps()
    tree.calls()
    with (tree.root / "requirements" / "cpu.lock").open("a") as lock:
        lock.write("# changed\n")
    assert tree.make("setup").returncode == 0
    assert tree.calls() == ["pip"] * 4
    assert tree.stamps() != [old] and len(tree.stamps()) == 1


@pytest.mark.parametrize("step", ["torch==", "-e"])
def test_interrupted_install_is_started_again_from_nothing(tree: Tree, step: str) -> None:
    assert tree.make("setup", FAIL_ON=step).returncode != 0
    assert tree.stamps() == []
    tree.calls()
    assert tree.make("setup").returncode == 0
    assert tree.calls() == ["venv", *["pip"] * 4]


def test_folder_that_is_no_environment_is_left_alone(tree: Tree) -> None:
    precious = tree.root / "notes" / "thesis.tex"
    precious.parent.mkdir()
    precious.touch()
    refused = tree.make("setup", "VENV=notes")
    assert refused.returncode == 2
    assert "notes" in refused.stderr and "VENV=" in refused.stderr
    assert precious.exists() and tree.calls() == []


def test_python_that_does_not_start_is_passed_over(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.command("python3", "#!/bin/sh\necho 'command not found' >&2; exit 127\n")
    tree.command("python3.13", "#!/bin/sh\nexit 127\n")
    tree.command("python3.12", STAND_IN)
    assert tree.make("-s", "print-python").stdout.strip() == str(tree.bin / "python3.12")


@pytest.mark.parametrize("arguments", [(), ("PYTHON=/no/such/python",)])
def test_no_python_is_one_clear_error(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    refused = Tree(tmp_path).make("setup", *arguments)
    assert refused.returncode == 2
    assert "expected Python >= 3.11" in refused.stderr and "PYTHON=" in refused.stderr


@pytest.mark.parametrize(
    ("target", "variable", "value"),
    [("reproduce", "PROFILE", "cpu gpu"), ("clean", "PROFILE", "../data/reference"),
     ("clean", "PROFILE", ""), ("reproduce", "EXECUTOR", ""), ("study", "EXECUTOR", "local ray")],
)  # fmt: skip
def test_an_unknown_value_is_refused_before_anything_is_built(
    tree: Tree, target: str, variable: str, value: str
) -> None:
    refused = tree.make(target, f"{variable}={value}")
    assert refused.returncode == 2
    assert f"{variable}: expected one of" in refused.stderr and f"'{value}'" in refused.stderr
    assert tree.calls() == []


def test_paths_of_any_characters_reach_the_command_as_they_are(tmp_path: Path) -> None:
    named = tmp_path / 'a {b} "c" $HOME `d` \\ [x]\'s'
    tree = Tree(named)
    python = tree.bin / "p $y"
    tree.command(python.name, '#!/bin/sh\nprintf "%s\\n" "$@" >> "$LOG"\n')
    wanted = ["-m", "djinn_lib.cli", "figures", f"{named}/run"]
    done = tree.make("figures", f"FROM={wanted[-1]}", f"PY={python}")
    assert done.returncode == 0, done.stderr
    assert tree.log.read_text().splitlines() == wanted
    tree.log.unlink()
    assert tree.make("lab", f"PY={python}").returncode == 0
    assert f"--ServerApp.root_dir={tree.root}" in tree.log.read_text().splitlines()


@pytest.mark.parametrize(
    ("fails", "said"), [("pyright", "types"), ("pytest", "tests"), ("nothing", "")]
)
def test_types_are_checked_beside_the_tests_and_either_may_fail(tree, fails, said) -> None:
    python = tree.bin / "p"
    tree.command(python.name, '#!/bin/sh\ncase "$*" in *"-m $FAIL_ON"*) exit 1 ;; esac\n')
    done = tree.make("test", f"PY={python}", FAIL_ON=fails)
    assert bool(done.returncode) == bool(said), done.stderr
    assert f"make: failed: {said}" in done.stderr or not said
    assert "==> types" in done.stdout and "==> tests" in done.stdout


def test_profile_and_lock_follow_the_gpu(tree: Tree) -> None:
    assert tree.make("-s", "print-profile").stdout.strip() == "cpu"
    assert "requirements/cpu.lock" in tree.make("-n", "setup").stdout
    tree.command("nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'\n")
    assert tree.make("-s", "print-profile").stdout.strip() == "gpu"
    assert "requirements/gpu.txt" in tree.make("-n", "setup").stdout


def test_given_python_is_used_and_nothing_is_built(tree: Tree) -> None:
    said = tree.make("-n", "reproduce", "PY=/opt/py", "PROFILE=cpu").stdout
    assert '"/opt/py" -m djinn_lib.cli reproduce --profile cpu' in said
    assert "venv" not in said and "pip" not in said


def test_clean_deletes_the_run_and_never_the_reference(tree: Tree) -> None:
    run = tree.root / "data" / "runs" / "cpu"
    kept = [tree.root / "data" / "reference" / "rows.parquet", run.parent / "gpu" / "rows.parquet"]
    for path in (run / "claims.json", *kept):
        path.parent.mkdir(parents=True)
        path.touch()
    assert tree.make("clean", "PROFILE=cpu").returncode == 0
    assert not run.exists()
    assert all(path.exists() for path in kept)
    assert tree.make("distclean", "PROFILE=cpu").returncode == 0
    assert all(path.exists() for path in kept)


def test_modules_that_commands_run_do_something():
    """Python runs a module without a main part too, says nothing, and succeeds."""
    texts = [
        REPO / "Makefile",
        REPO / ".ci" / "run",
        REPO / "README.md",
        *(REPO / "docs").glob("*.md"),
    ]
    named = {
        name for text in texts for name in re.findall(r"-m (djinn_lib[.\w]*\w)", text.read_text())
    }
    assert {"djinn_lib.cli", "djinn_lib.publishing.pages"} <= named
    for name in named:
        source = (REPO / name.replace(".", "/")).with_suffix(".py").read_text()
        assert 'if __name__ == "__main__":' in source, f"{name} does nothing when it is run"
