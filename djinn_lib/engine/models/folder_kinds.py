"""Explain what a folder holds if it is not a decoder-only model in safetensors.

Users pass adapters, folders of other libraries and other kinds of models. This module names what
was found and what to do with it. It looks at file names and small JSON files only. It loads no
weights and imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from os.path import isfile  # False, not an error, in a folder that may not be read
from pathlib import Path
from typing import Any

_PROCESSOR = r"(pre)?processor_config\.json"
_MOST_JSON_BYTES = 16 << 20
_POINTER = b"version https://git-lfs"
_HEADS_THAT_CLASSIFY = re.compile(
    r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|Reward\w*|"
    r"ProcessReward\w*|\w*Regression|ImageClassification|AudioClassification|NextSentence\w*)$|"
    r"RewardModel$"
)
_SENSE = re.compile(r"(?:mm_)?(vision|audio|speech|video)_(?:config|tower)")  # in config.json


@dataclass(frozen=True)
class _Folder:
    """The names and small JSON files of a folder; unreadable ones count as absent."""

    path: Path

    @cached_property
    def names(self) -> list[str]:
        try:
            return sorted(path.name for path in self.path.iterdir())
        except OSError:
            return []

    def matching(self, pattern: str) -> list[str]:
        return [name for name in self.names if re.fullmatch(pattern, name)]

    def json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        try:
            if name in self.names and file.stat().st_size <= _MOST_JSON_BYTES:
                read = json.loads(file.read_bytes())
                return read if isinstance(read, dict) else {}
        except (OSError, ValueError, RecursionError):
            pass
        return {}

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.json("config.json")

    @cached_property
    def architecture(self) -> str:
        """The class that was saved, or ""."""
        names = self.config.get("architectures")
        first = names[0] if isinstance(names, list) and names else ""
        return first if isinstance(first, str) else ""

    @cached_property
    def has_weights(self) -> bool:
        return bool(self.matching(r"(?!adapter_).*\.safetensors"))

    @property
    def what(self) -> str:
        return self.architecture or str(self.config.get("model_type", "of unknown type"))


def explain_folder(folder: Path, refused: bool = False) -> str | None:
    """Explain what a folder or file holds; None if nothing speaks against it.

    Args:
        folder: where a model is expected.
        refused: whether transformers has refused it as a decoder-only model. Some kinds, such as
            vision models, may also work as one, and are reported only after a refusal.

    Returns:
        A phrase for after "got ", such as "a LoRA adapter for 'base': merge it into that model".
    """
    if folder.is_file():
        return _explain_file(folder)
    found = _Folder(folder)
    for kind in (*_CERTAIN, *(_IF_REFUSED if refused else ())):
        if explanation := kind(found):
            return explanation
    return None


def _explain_file(file: Path) -> str | None:
    match file.suffix.lower():
        case ".gguf":
            return _GGUF.format(file.name)
        case ".bin" | ".pt" | ".pth" | ".ckpt" | ".pkl":
            return _PICKLES.format(file.name)
    return f"the file {file.name}: pass the folder that holds it and its config.json"


_GGUF = (
    "a GGUF file ({}): convert it with transformers' from_pretrained(folder, gguf_file=...) and "
    "save_pretrained, or serve it with llama.cpp"
)
_PICKLES = (
    "pickled weights ({}), which can run code when loaded: convert them with transformers' "
    "from_pretrained and save_pretrained"
)


# -- folders that never hold a decoder-only model ------------------------------------------------


def _adapter(folder: _Folder) -> str | None:
    if "adapter_config.json" not in folder.names:
        return None
    adapter = folder.json("adapter_config.json")
    kind = adapter.get("peft_type")
    kind = {"LORA": "LoRA", "PROMPT_TUNING": "prompt tuning"}.get(str(kind), kind) or "PEFT"
    base = adapter.get("base_model_name_or_path")
    whose = f" for {base!r}" if isinstance(base, str) and base else ""
    weights = " and model weights that may or may not include it" if folder.has_weights else ""
    return (
        f"a {kind} adapter (adapter_config.json){whose}{weights}: merge it into its base model "
        "(merge_and_unload and save_pretrained of peft), or load the base model"
    )


def _diffusion(folder: _Folder) -> str | None:
    pipeline, config = folder.json("model_index.json"), folder.config
    if "model_index.json" in folder.names:
        name = pipeline.get("_class_name", "model_index.json")
        return f"a diffusers pipeline ({name}): it generates no text; load it with diffusers"
    if "_diffusers_version" in config:
        name = config.get("_class_name", "config.json")
        return f"a part of a diffusers pipeline ({name}): it generates no text; use diffusers"
    return None


def _embedding(folder: _Folder) -> str | None:
    marks = {"modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"}
    if marks := sorted(marks & {*folder.names}):
        return (
            f"an embedding model ({marks[0]} of sentence-transformers): it returns vectors, not "
            "text; load it with sentence-transformers"
        )
    return None


def _classifier(folder: _Folder) -> str | None:
    if _HEADS_THAT_CLASSIFY.search(folder.architecture):
        return (
            f"a classifier or reward model ({folder.architecture}): it returns scores, not text; "
            "load it with its own class of transformers"
        )
    return None


def _encoder_decoder(folder: _Folder) -> str | None:
    if folder.config.get("is_encoder_decoder") is True:
        return (
            f"an encoder-decoder ({folder.what}): only decoder-only models are served; load it "
            "with its own class of transformers"
        )
    return None


def _quantised(folder: _Folder) -> str | None:
    config = folder.config
    inner = config.get("text_config")
    inner = inner if isinstance(inner, Mapping) else {}
    keys = ("quantization_config", "compression_config", "quantization")
    own = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
    for where, found in (
        *(("config.json", part.get(key)) for part in (config, inner) for key in keys),
        *((name, folder.json(name) or None) for name in own if name in folder.names),
    ):
        if isinstance(found, Mapping) and found:
            method = found.get("quant_method") or found.get("quant_algo") or found.get("format")
            what = f"{method}, {where}" if isinstance(method, str) else where
            return (
                f"a quantised checkpoint ({what}): serve it with vLLM, or load the one that it was "
                "made from, in float32, float16 or bfloat16"
            )
    return None


def _cache_of_the_hub(folder: _Folder) -> str | None:
    if {"snapshots", "refs"} <= {*folder.names} and not folder.has_weights:
        snapshots = _Folder(folder.path / "snapshots").names
        which = f"snapshots/{snapshots[-1]}" if snapshots else "a folder below snapshots"
        return f"a cache folder of the hub: pass {which} in it, or the model's hub id"
    return None


def _pointers(folder: _Folder) -> str | None:
    for name in folder.matching(r".*\.(safetensors|json|model)"):
        try:
            with (folder.path / name).open("rb") as file:
                if file.read(len(_POINTER)) == _POINTER:
                    return f"a clone without its large files ({name}): run `git lfs pull` in it"
        except OSError:
            continue
    return None


def _other_weights(folder: _Folder) -> str | None:
    """Detect weights in other formats, where safetensors are missing."""
    if folder.has_weights and "config.json" in folder.names:
        return None
    if folder.matching(r"consolidated.*\.safetensors") and "params.json" in folder.names:
        return (
            "weights in Mistral's own format (params.json): download the files for transformers, "
            "config.json and model*.safetensors"
        )
    if folder.has_weights:
        return None
    if ggufs := folder.matching(r".*\.gguf"):
        return _GGUF.format(ggufs[0])
    if pickles := folder.matching(r"consolidated\.\d+\.pth"):
        return (
            f"weights in Meta's own format ({pickles[0]}): download those for transformers, or "
            "convert them with its convert_llama_weights_to_hf.py"
        )
    if parts := folder.matching(r".*\.distcp|zero_pp_rank_.*|global_step\d+"):
        return f"parts of a distributed training run ({parts[0]}): merge them with its own tool"
    if "config.json" not in folder.names:
        return None  # these names occur in any folder: `_another_folder` explains them
    for pattern, library in _LIBRARIES.items():
        if files := folder.matching(pattern):
            return f"weights for {library} ({files[0]}): convert or download them as safetensors"
    if pickles := folder.matching(_PICKLED):
        return _PICKLES.format(pickles[0])
    return None


_PICKLED = r"(?!training_args|optimizer|scheduler|rng_state).*\.(bin|pth?|ckpt)"
_LIBRARIES = {
    r"tf_model.*\.h5": "TensorFlow",
    r"flax_model.*\.msgpack": "Flax",
    r".*\.onnx": "ONNX",
}


def _another_folder(folder: _Folder) -> str | None:
    """Detect a parent or sibling of the model's folder."""
    if "config.json" in folder.names or folder.has_weights:
        return None
    if steps := folder.matching(r"checkpoint-\d+"):
        last = max(steps, key=lambda name: int(name.rpartition("-")[2]))
        return f"a folder of checkpoints: pass one of them, such as {last} in it"
    below = [n for n in folder.names if isfile(folder.path / n / "config.json")]
    if below:
        return f"a folder of models: pass one of them, such as {below[0]} in it"
    for pattern in (_PICKLED, *_LIBRARIES):
        if files := folder.matching(pattern):
            return (
                f"a folder without config.json, so it is no checkpoint (it has {files[0]}): check "
                "the path, or download all files of the model"
            )
    if processors := folder.matching(_PROCESSOR):
        return f"a processor without a model ({processors[0]}): pass the folder of the model"
    if tokenizers := folder.matching(r"tokenizer.*|vocab\..*"):
        return f"a tokenizer without a model ({tokenizers[0]}): pass the folder of the model"
    return None if folder.names else "an empty folder: check the path"


# -- folders that may work as a decoder-only model; reported only after a refusal ----------------


def _senses(folder: _Folder) -> str | None:
    senses = sorted({found[1] for key in folder.config if (found := _SENSE.fullmatch(key))})
    if senses or folder.matching(_PROCESSOR):
        return (
            f"a model of {' and '.join(senses) or 'more than text'} ({folder.what}): only text "
            "models are served; load it with its own class of transformers"
        )
    return None


def _encoder(folder: _Folder) -> str | None:
    if folder.architecture.endswith(("ForMaskedLM", "ForPreTraining")):
        return (
            f"an encoder ({folder.architecture}): it fills in masked tokens and cannot continue "
            "text; load it with its own class of transformers"
        )
    return None


def _headless(folder: _Folder) -> str | None:
    if re.search(r"(?<!LMHead)(Model|Encoder)$", folder.architecture):
        return (
            f"a model without a language-model head ({folder.architecture}), such as an embedding "
            "model: load the one with a head, or this one with transformers' AutoModel"
        )
    return None


_Kind = Callable[[_Folder], str | None]
_CERTAIN: tuple[_Kind, ...] = (
    _adapter, _diffusion, _embedding, _classifier, _encoder_decoder, _quantised, _cache_of_the_hub,
    _pointers, _other_weights, _another_folder,
)  # fmt: skip
_IF_REFUSED: tuple[_Kind, ...] = (_senses, _encoder, _headless)
