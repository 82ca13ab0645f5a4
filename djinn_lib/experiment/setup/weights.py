"""Prepare the model folders of a profile: config.json, safetensors, and a tokenizer if known.

Every system reads the same folders. A folder appears only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from djinn_lib.engine.models.checkpoint import folder_config, load_pretrained
from djinn_lib.engine.models.hub import resolve_folder
from djinn_lib.engine.models.packaged import convert_gguf, packaged_gguf
from djinn_lib.engine.models.packing import pack
from djinn_lib.engine.models.spec import ModelSpec
from djinn_lib.errors import CheckpointError
from djinn_lib.experiment.profile import ModelEntry, Profile
from djinn_lib.experiment.setup.integrity import ensure_same_files, file_digests, weights_digest
from djinn_lib.files import write_json
from djinn_lib.systems.base import ModelFiles

_PROMPT = (
    "Why is the sky blue? Sunlight reaches the air as a mixture of all colours. The molecules of "
    "the air are much smaller than the wavelength of light, and they scatter short waves more "
    "strongly than long ones. Blue light is therefore sent in every direction, and wherever we "
    "look we see some of it. At sunset the light has crossed so much air that hardly any blue is "
    "left in the direct beam, and what reaches the eye is orange and red. "
)


def prepare_models(
    profile: Profile, folder: Path, progress: Callable[[str], None] = print
) -> dict[str, ModelFiles]:
    """Make the missing folders of all models of a profile.

    Args:
        profile: the profile, with models and dtype.
        folder: parent folder, with one folder for each model.
        progress: called with messages during longer steps.

    Raises:
        CheckpointError: a source is missing or broken.
    """
    files = {}
    for name, entry in profile.models.items():
        target = folder / f"{name}-{_fingerprint(entry, profile.dtype)}"
        if not target.exists():
            progress(f"preparing {name}")
            _prepare(entry, profile.dtype, target)
        source = _source_folder(entry, target)
        digests = _checked_digests(source, target)  # before anything is read from there
        files[name] = replace(describe(name, source), digests=digests)
    return files


def _checked_digests(folder: Path, target: Path) -> dict[str, str]:
    """Return digests of a model's files; files that were made here must be unchanged.

    A folder of the user may change between two set-ups.
    """
    record = target / "prepared.json"
    if folder == target and record.exists():
        digests = json.loads(record.read_text())
        ensure_same_files(folder, digests, f"delete {target} and run notebook 00_setup again")
        return digests
    return file_digests(folder)


def describe(name: str, folder: Path) -> ModelFiles:
    """Return the facts about a model folder that systems need."""
    model = load_pretrained(folder)
    layout, _ = pack(model)
    return ModelFiles(name, folder, layout.n_bytes, str(model.dtype).removeprefix("torch."))


def files_sha256(files: ModelFiles) -> str:
    """Read all weights files and return their digest."""
    return weights_digest(file_digests(files.folder))


def prompt_ids(files: ModelFiles, n_tokens: int, request: int) -> list[int]:
    """Return the prompt of a request: exactly `n_tokens` ids, the same for every system.

    With a tokenizer it is a passage of English, with the request's number before it so that no
    two requests share a prompt; without one it is seeded random ids.
    """
    if not (files.folder / "tokenizer_config.json").exists():
        generator = torch.Generator().manual_seed(request)
        vocab_size = folder_config(files.folder).get_text_config().vocab_size
        return torch.randint(0, vocab_size, (n_tokens,), generator=generator).tolist()
    passage = _PROMPT * (1 + n_tokens // 50)  # it has more than 50 words
    return _cut(_tokenizer(files.folder)(f"{request}. {passage}").input_ids, n_tokens)


@lru_cache(maxsize=8)
def _tokenizer(folder: Path) -> Any:
    """Read a tokenizer once for each process, because reading takes longer than a request."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _cut(ids: Sequence[int], n_tokens: int) -> list[int]:
    if len(ids) < n_tokens:
        raise CheckpointError(
            f"expected a tokenizer that makes at least {n_tokens} tokens of the passage, "
            f"got {len(ids)}: lower prompt_tokens"
        )
    return list(ids[:n_tokens])


def _fingerprint(entry: ModelEntry, dtype: str) -> str:
    text = json.dumps([entry.model_dump(exclude={"stands_for"}), dtype], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _source_folder(entry: ModelEntry, target: Path) -> Path:
    if entry.folder or entry.hub_id:
        return resolve_folder(Path(target.joinpath("source.txt").read_text()))
    return target


def _prepare(entry: ModelEntry, dtype: str, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if entry.folder or entry.hub_id:  # used where it is; only its place is noted
        folder = resolve_folder(entry.hub_id or Path(str(entry.folder)), entry.revision)
        partial.joinpath("source.txt").write_text(str(folder.resolve()))
    elif entry.gguf_package:
        convert_gguf(packaged_gguf(entry.gguf_package), dtype, partial)
    else:
        spec = ModelSpec(entry.config or {}, dtype, entry.seed)
        spec.build("cuda" if torch.cuda.is_available() else "cpu").save_pretrained(partial)
    if (partial / "config.json").exists():
        write_json(partial / "prepared.json", file_digests(partial))
    partial.rename(target)
