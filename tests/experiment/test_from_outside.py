"""What comes from outside: names, parameters, code in checkpoints. Nothing runs, nothing strays."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from profile_factory import tiny_profile
from tiny import PROMPT, spec

import djinn_lib as dj
from djinn_lib.errors import CheckpointError, ConfigError, TraceError
from djinn_lib.experiment.bench import set_up
from djinn_lib.experiment.execution.notebooks import check_parameters
from djinn_lib.experiment.parameters import folder, one_of
from djinn_lib.experiment.run_folder import RunFolder
from djinn_lib.paths import NOTEBOOKS
from djinn_lib.trace import Request, Trace, read_trace, write_trace

# -- names -----------------------------------------------------------------------------------


def test_the_longest_names_make_files_that_can_be_made(tmp_path):
    label = "x" * 64
    profile = tiny_profile(
        traces={label: {"kind": "zipf", "n": 1, "alpha": 1.0, "seed": 1, "rate_per_s": 1.0}},
        capacities={label: "64MiB"},
        systems={label: {"system": "djinn"}},
        cells=[
            {"traces": [label], "capacities": [label], "systems": [label], "mode": "concurrent"}
        ],
    )
    (cell,) = profile.all_cells()
    files = RunFolder(tmp_path).cell(cell.id)
    longest = [f"{files.task}.partial.ipynb", f"{files.manifest.name}.partial"]
    for name in longest:
        (tmp_path / name).touch()
        assert (tmp_path / name).is_file()


def test_models_of_a_trace_on_the_disk_name_no_files(tmp_path):
    profile = tiny_profile()
    bench = set_up(profile, tmp_path / "run", tmp_path / "models", progress=lambda step: None)
    bench.write_traces()
    before = sorted(tmp_path.rglob("*"))
    trace = Trace("zipf", {}, (Request(0, 0.0, "../../stray"),))
    write_trace(trace, bench.run.trace("zipf"))
    assert read_trace(bench.run.trace("zipf")) == trace
    with pytest.raises(TraceError, match="stray"):
        from djinn_lib.experiment.cells.cell import run_cell

        run_cell(bench, profile.cell("zipf", "all", "djinn"))
    assert sorted(tmp_path.rglob("*")) == before


# -- parameters of notebooks -----------------------------------------------------------------


def test_folders(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="got the file"):
        folder(str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="that exists as study_dir"):
        folder(tmp_path / "none", "study_dir", must_exist=True)
    assert folder(str(tmp_path / "none")) == tmp_path / "none"
    assert one_of("a", ["a", "b"], "grid") == "a"
    for value in ("c", 1, None, ["a"]):
        with pytest.raises(ConfigError, match=r"expected grid out of \['a', 'b'\]"):
            one_of(value, ["a", "b"], "grid")


@pytest.mark.parametrize("name", sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
def test_every_parameter_has_a_type_that_is_checked(name):
    notebook = NOTEBOOKS / f"{name}.ipynb"
    cells = json.loads(notebook.read_text())["cells"]
    tagged = next(c for c in cells if c["metadata"].get("tags") == ["parameters"])
    kinds = dict(
        re.match(r"(\w+): (str|int|float|bool) = ", line).groups() for line in tagged["source"]
    )
    assert kinds
    for parameter, kind in kinds.items():
        for value in ({"str": 25, "int": "25", "float": "0.5", "bool": "yes"}[kind], None, ["a"]):
            message = f"{parameter!r} of {name}.* to be of type {kind}"
            with pytest.raises(ConfigError, match=message):
                check_parameters(notebook, {parameter: value})


# -- code in checkpoints ---------------------------------------------------------------------

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({mark!r}).touch()
class Config(LlamaConfig):
    model_type = {model_type!r}
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(params=["custom-llama", "llama"])
def with_code(request, tmp_path) -> tuple[Path, Path]:
    """A checkpoint that brings Python along, and the mark that running it would leave."""
    source, mark = tmp_path / "model", tmp_path / "code ran"
    spec("llama").build().save_pretrained(source)
    source.joinpath("custom.py").write_text(CODE.format(mark=str(mark), model_type=request.param))
    config = json.loads((source / "config.json").read_text())
    config |= {
        "model_type": request.param,
        "auto_map": {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"},
    }
    (source / "config.json").write_text(json.dumps(config))
    return source, mark


def test_code_of_a_checkpoint_does_not_run_unless_asked_for(with_code, monkeypatch):
    source, mark = with_code
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # not even where somebody would agree
    known = json.loads((source / "config.json").read_text())["model_type"] == "llama"
    with dj.Djinn("1MiB", page="16KiB") as djinn:
        if known:  # transformers has code of its own for it
            djinn.add("m", source)
        else:
            with pytest.raises(CheckpointError, match="trust_remote_code"):
                djinn.add("m", source)
        assert not mark.exists()


def test_code_of_a_checkpoint_runs_when_asked_for(with_code, tmp_path, monkeypatch):
    source, mark = with_code
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    monkeypatch.syspath_prepend(str(tmp_path / "c"))
    monkeypatch.setattr("builtins.input", None)  # to have been asked once is enough
    with dj.Djinn("1MiB", page="16KiB") as djinn:
        djinn.add("m", source, trust_remote_code=True)
        assert len(djinn.generate("m", PROMPT, 2, ignore_eos=True).token_ids) == 2
    assert mark.exists()


def test_code_of_a_profile_s_model_never_runs(with_code, tmp_path, monkeypatch):
    source, mark = with_code
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    profile = tiny_profile({"m": {"stands_for": "phi-2", "folder": str(source)}})
    if json.loads((source / "config.json").read_text())["model_type"] == "llama":
        set_up(profile, tmp_path / "run", tmp_path / "models", progress=lambda step: None)
    else:
        with pytest.raises(CheckpointError, match="trust_remote_code"):
            set_up(profile, tmp_path / "run", tmp_path / "models", progress=lambda step: None)
    assert not mark.exists()
