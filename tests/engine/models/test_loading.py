"""A model is what transformers' `from_pretrained` makes of its folder."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import architectures
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import CONFIGS, saved, spec
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

import djinn_lib as dj
from djinn_lib.engine.memory.masters import HostMasters
from djinn_lib.engine.models import packing
from djinn_lib.engine.models.construction import without_bars
from djinn_lib.engine.models.packing import bind, pack
from djinn_lib.engine.models.sources import open_source
from djinn_lib.engine.models.spec import ModelSpec
from djinn_lib.errors import CheckpointError, DjinnError


def as_served(folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model that `Djinn.add` makes of a folder, bound to its master copy."""
    opened, pool = open_source(folder, dtype), HostMasters()
    # Tracing only decides on an order, and takes longer than all else here.
    with mock.patch.object(packing, "observe", return_value=[]):
        layout, _ = pack(opened.module)
    pool.add("m", layout, opened.fill)
    bind(opened.module, layout.views(pool.master("m")), torch.device("cpu"))
    return opened.module


def differences(ours: PreTrainedModel, theirs: PreTrainedModel) -> list[str]:
    """Names of what is not the same: values, dtypes, ties, buffers, configurations."""
    found = [] if type(ours) is type(theirs) else ["class"]
    if ours.config.to_dict() != theirs.config.to_dict():
        found.append("config")
    if _generation(ours) != _generation(theirs):
        found.append("generation config")
    for kind in ("named_parameters", "named_buffers"):
        a, b = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (ours, theirs))
        found += sorted(a.keys() ^ b.keys())
        found += [name for name in a.keys() & b.keys() if not _same_bytes(a[name], b[name])]
        found += [
            f"ties of {name}" for name in a.keys() & b.keys() if _ties(a, name) != _ties(b, name)
        ]
    return found


def _generation(model: PreTrainedModel) -> dict[str, object]:
    return model.generation_config.to_dict() if model.generation_config else {}


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(*(t.detach().reshape(-1).view(torch.uint8) for t in (a, b)))


def _ties(named: dict[str, torch.Tensor], name: str) -> set[str]:
    return {other for other, tensor in named.items() if tensor is named[name]}


def save_tiny(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(architectures.tiny(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)


# Tensors kept in float32, sines as buffers, tied with a bias, converted names, persistent buffers.
FAST = ("deepseek_v3", "gpt_oss", "gptj", "modernbert-decoder", "rwkv", "llama-tied")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow])
        for name in architectures.NAMES
        if name not in architectures.NOT_MADE
    ],
)
def test_every_parameter_and_buffer_is_transformers_own(name, tmp_path):
    save_tiny(name, tmp_path)
    for dtype in (None, torch.float16) if name in FAST else (torch.float16,):
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype or "auto")
        assert differences(as_served(tmp_path, dtype), theirs) == []


# -- folders ---------------------------------------------------------------------------------


@st.composite
def folders(draw: st.DrawFn) -> dict[str, object]:
    """Checkpoint folders of one small model, as people have them."""
    return {
        "single": draw(st.booleans()),
        "shards": draw(st.integers(0, 3)),
        "lost shard": draw(st.booleans()),
        "strays": draw(st.booleans()),
        "prefix": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        "config dtype": draw(st.sampled_from([None, "float32", "bfloat16"])),
        "tied in config": draw(st.booleans()),
        "head": draw(st.sampled_from(["none", "own", "copy"])),
        "missing": draw(st.sampled_from([None, None, "model.layers.1.mlp.up_proj.weight"])),
    }


def write_folder(folder: Path, made: dict[str, object]) -> None:
    fields = CONFIGS["llama"].to_dict() | {"tie_word_embeddings": made["tied in config"]}
    fields["architectures"] = ["LlamaForCausalLM"]
    fields.pop("dtype", None)
    if made["config dtype"]:
        fields["dtype"] = made["config dtype"]
    (folder / "config.json").write_text(json.dumps(fields))

    def tensors(seed: int) -> dict[str, torch.Tensor]:
        state = spec("llama", seed=seed).build().state_dict()
        state = {k: t.to(made["dtype"]) for k, t in state.items() if k != made["missing"]}
        table = state["model.embed_tokens.weight"]
        head = {"own": state.pop("lm_head.weight", None), "copy": table.clone()}
        if made["head"] != "none":
            state["lm_head.weight"] = head[str(made["head"])]
        return state if made["prefix"] else {k.removeprefix("model."): t for k, t in state.items()}

    if made["single"]:
        save_file(tensors(1), folder / SAFE_WEIGHTS_NAME, {"format": "pt"})
    if n_shards := int(str(made["shards"])):
        state, weight_map = tensors(2), {}
        for i in range(n_shards):
            part = dict(list(state.items())[i::n_shards])
            weight_map |= dict.fromkeys(part, f"part-{i}.safetensors")
            if not (made["lost shard"] and i == n_shards - 1):
                save_file(part, folder / f"part-{i}.safetensors", {"format": "pt"})
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index))
    if made["strays"]:
        for name in ("optimizer", "adapter_model", "model.fp16", "a"):
            save_file({"model.norm.weight": torch.zeros(64)}, folder / f"{name}.safetensors")


@given(folders())
def test_folders_give_what_from_pretrained_gives_or_are_refused(made):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(folder, made)
        try:
            theirs, report = AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True
            )
        except Exception:
            theirs, report = None, {"missing_keys": set()}
        try:
            ours = as_served(folder)
        except CheckpointError:
            # transformers makes random weights up for what is missing, and goes on.
            assert theirs is None or report["missing_keys"]
            return
        assert theirs is not None and not report["missing_keys"]
        assert differences(ours, theirs) == []


# -- other threads ---------------------------------------------------------------------------


def process_state(kind: str = "folder") -> tuple[object, ...]:
    """What transformers changes while it loads a model.

    While it draws random weights it also replaces torch's initialisers, by ones that do the same
    for tensors of others.
    """
    initialisers = (nn.init.normal_, nn.init.kaiming_uniform_) if kind == "folder" else ()
    return (
        *initialisers,
        torch.get_default_dtype(),
        nn.Module.register_parameter,
        torch.linspace,
        PreTrainedModel.tie_weights,
        nn.Linear(2, 2).weight.dtype,
        nn.Linear(2, 2).weight.device,
    )


@pytest.mark.parametrize("kind", ["folder", "spec"])
def test_other_threads_see_nothing_of_a_model_that_is_added(tmp_path, kind):
    source = spec("qwen2-tied", "bfloat16")
    if kind == "folder":
        source.build().save_pretrained(tmp_path)
    before, seen, done = process_state(kind), set(), threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.add(process_state(kind))

    with dj.Djinn("4MiB", page="16KiB") as djinn, ThreadPoolExecutor(1) as other:
        watching = other.submit(watch)
        try:
            for i in range(2):
                djinn.add(f"m{i}", tmp_path if kind == "folder" else source)
        finally:
            done.set()
        watching.result()
    assert seen == {before}


def test_no_bar_is_shown_before_the_last_thread_has_loaded():
    assert transformers_logging.is_progress_bar_enabled()
    first, second = without_bars(), without_bars()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not transformers_logging.is_progress_bar_enabled()
    second.__exit__(None, None, None)
    assert transformers_logging.is_progress_bar_enabled()


def test_models_may_be_added_from_many_threads(tmp_path):
    for seed in range(2):
        spec("llama", seed=seed).build().save_pretrained(tmp_path / str(seed))
    before = process_state()
    with dj.Djinn("8MiB", page="16KiB") as djinn:
        with ThreadPoolExecutor(4) as pool:
            added = [pool.submit(djinn.add, f"m{i}", tmp_path / str(i % 2)) for i in range(4)]
            again = [pool.submit(djinn.add, "same", tmp_path / "0") for _ in range(3)]
        assert not any(future.exception() for future in added)
        refused = [e for future in again if (e := future.exception())]
        assert len(refused) == 2 and all(isinstance(e, DjinnError) for e in refused)
        djinn.check()
        alike = {djinn.sha256(f"m{i}") for i in (0, 2)}
        assert len(alike) == 1 and djinn.sha256("m1") not in alike
    assert process_state() == before


def test_a_config_of_a_million_layers_is_refused_soon(tmp_path):
    shutil.copytree(saved("llama"), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text()) | {"num_hidden_layers": 1_000_000}
    path.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="do not belong together"):
        open_source(tmp_path)


def test_a_spec_in_half_precision_is_what_saving_and_loading_it_gives(tmp_path):
    """Buffers of positions in float32, whatever the dtype; the weights themselves are the same."""
    config = architectures.tiny("gptj")
    built = ModelSpec(config, "bfloat16", seed=3).build()
    built.save_pretrained(tmp_path)
    opened, pool = open_source(ModelSpec(config, "bfloat16", seed=3)), HostMasters()
    pool.add("m", layout := pack(opened.module)[0], opened.fill)
    bind(opened.module, layout.views(pool.master("m")), torch.device("cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(differences(opened.module, theirs)) <= {"config", "generation config"}
