"""Reading weights: safetensors only, from a local folder or a hub id, sharded or not.

Pickle checkpoints (``*.bin``, ``*.pt``) are refused, because loading one runs code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from djinn_lib.errors import CheckpointError

_HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja"]
_BLOCK_BYTES = 16 << 20  # what one thread reads at a time
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve_folder(source: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint: `source` itself, or a snapshot of that hub id.

    Raises:
        CheckpointError: no such folder, and the hub does not answer with it either.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    looks_like_path = isinstance(source, Path) or str(source).startswith((".", "/", "~"))
    if looks_like_path or str(source).count("/") > 1:
        raise CheckpointError(
            f"expected a folder with config.json and *.safetensors, got {str(source)!r}, "
            "which does not exist: check the path"
        )
    from huggingface_hub import snapshot_download  # only a hub id needs the network

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:
        raise CheckpointError(
            f"expected a local folder or a hub id that can be fetched, got {str(source)!r} "
            f"({type(error).__name__}: {str(error).splitlines()[0]}): check the name, the "
            "revision and, for a gated model, your access token"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint folder: the shards of its index, or all.

    Raises:
        CheckpointError: there are none, only pickles, or a shard of the index is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = [folder / name for name in sorted(set(_weight_map(index).values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if missing := [file.name for file in files if not file.exists()]:
        raise CheckpointError(
            f"expected every shard that {index} lists, got no {missing}: download them again"
        )
    if not files:
        pickles = [file.name for pattern in _PICKLES for file in sorted(folder.glob(pattern))]
        raise CheckpointError(
            f"expected *.safetensors in {folder}, got "
            + (f"only pickles ({', '.join(pickles)}), which can run code when loaded: convert "
               "them with transformers' save_pretrained" if pickles else "none: check the folder")
        )  # fmt: skip
    return files


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"expected a JSON index with 'weight_map' in {index}, got {error!r}: download it again"
        ) from error
    if outside := [name for name in weight_map.values() if Path(name).name != name]:
        raise CheckpointError(f"expected shards beside {index}, got {outside[0]!r}")
    return weight_map


def fill_views(
    views: Mapping[str, torch.Tensor], model: PreTrainedModel, folder: Path, **load_options: bool
) -> None:
    """Write the checkpoint's tensors into `views`, one per parameter of `model`.

    Tensors whose names fit are read straight from the files. Checkpoints in another naming or
    layout (older or fused formats) go through transformers' own conversion, at the price of a
    second copy in host memory meanwhile.

    Args:
        views: tensors to fill, by parameter name.
        model: a skeleton of the architecture; its parameter names and shapes are the goal.
        folder: the checkpoint.
        load_options: passed on to `from_pretrained` where it is needed.

    Raises:
        CheckpointError: a file is truncated or corrupt, or a tensor is missing or misshapen.
    """
    files = weight_files(folder)
    keys: dict[str, Path] = {}
    for file in files:
        with _open(file) as tensors:
            keys.update(dict.fromkeys(tensors.keys(), file))
    if names := _match(views, keys, model.base_model_prefix):
        _read_straight(views, keys, names)
    else:
        _read_converted(views, folder, model, **load_options)


@contextmanager
def _open(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"expected a whole safetensors file, got {file} ({file.stat().st_size} bytes), which "
            f"is truncated or corrupt ({error}): download it again"
        ) from error


def _match(
    views: Mapping[str, torch.Tensor], keys: Mapping[str, Path], prefix: str
) -> dict[str, str] | None:
    """Map parameter names to checkpoint names, with or without the base model's prefix."""
    for rename in (
        str,
        lambda name: name.removeprefix(f"{prefix}."),
        lambda name: f"{prefix}.{name}",
    ):
        names = {name: name if name in keys else rename(name) for name in views}
        if all(key in keys for key in names.values()):
            return names
    return None


def _read_straight(
    views: Mapping[str, torch.Tensor], keys: Mapping[str, Path], names: Mapping[str, str]
) -> None:
    for file in sorted(set(keys.values())):
        here = [(names[name], views[name]) for name in views if keys[names[name]] == file]
        as_they_are = []
        with _open(file) as tensors:
            for key, view in here:
                if _has_same_bytes(tensors, key, view, file):
                    as_they_are.append((key, view))
                else:
                    _write(view, tensors.get_tensor(key), key, file)
        read_tensors(file, as_they_are)


def _has_same_bytes(tensors: safe_open, key: str, view: torch.Tensor, file: Path) -> bool:
    """Whether a tensor's bytes can be read into a view as they are."""
    stored = tensors.get_slice(key)
    _check_shape(view, tuple(stored.get_shape()), key, file)
    same_type = _DTYPES.get(stored.get_dtype()) == view.dtype
    return same_type and view.is_contiguous() and view.device.type == "cpu"


def read_tensors(file: Path, views: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Read tensors of a safetensors file into views, blocks of them on all cores at once.

    A mapped file, as `safe_open` has it, is read page by page by whoever first touches it: with
    one thread that gives a fraction of what memory and disk can, and a file that is cut short
    meanwhile ends the process.

    Args:
        file: whose header has been checked, as `safe_open` does.
        views: with their names in the file; contiguous, in host memory, of the stored type and
            shape.

    Raises:
        CheckpointError: the file is shorter than its header says.
    """
    with file.open("rb", buffering=0) as opened:
        blocks = list(_blocks(_data_offsets(file), views))
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "djinn-checkpoint") as threads:
            if not all(threads.map(lambda block: _read_block(opened.fileno(), *block), blocks)):
                raise CheckpointError(
                    f"expected a whole safetensors file, got {file} ({file.stat().st_size} bytes), "
                    "which ends before its tensors do: download it again"
                )


def _data_offsets(file: Path) -> dict[str, int]:
    """Where each tensor begins in a file: https://github.com/huggingface/safetensors#format."""
    with file.open("rb") as opened:
        n_header_bytes = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(n_header_bytes))
    return {
        name: 8 + n_header_bytes + entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _blocks(
    offsets: Mapping[str, int], views: Sequence[tuple[str, torch.Tensor]]
) -> Iterator[tuple[memoryview, int]]:
    for name, view in views:
        target = view.reshape(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(target), _BLOCK_BYTES):
            yield target[begin : begin + _BLOCK_BYTES], offsets[name] + begin


def _read_block(descriptor: int, target: memoryview, offset: int) -> bool:
    """Fill `target` from a file; returns whether there was enough."""
    done = 0
    while done < len(target):
        if not (n_bytes := os.preadv(descriptor, [target[done:]], offset + done)):
            return False
        done += n_bytes
    return True


def _write(view: torch.Tensor, tensor: torch.Tensor, name: str, file: Path) -> None:
    _check_shape(view, tuple(tensor.shape), name, file)
    view.copy_(tensor)


def _check_shape(view: torch.Tensor, shape: tuple[int, ...], name: str, file: Path) -> None:
    if tuple(view.shape) != shape:
        raise CheckpointError(
            f"expected {name!r} of shape {tuple(view.shape)} (from config.json), got {shape} in "
            f"{file}: config and weights do not belong together"
        )


def _read_converted(
    views: Mapping[str, torch.Tensor], folder: Path, model: PreTrainedModel, **load_options: bool
) -> None:
    try:
        pair: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=model.dtype,
            use_safetensors=True,
            output_loading_info=True,
            **load_options,
        )
    except Exception as error:
        raise CheckpointError(
            f"expected weights of a {model.config.model_type} in {folder}, got "
            f"{type(error).__name__}: {error}"
        ) from error
    loaded, report = pair
    if report["missing_keys"]:
        raise CheckpointError(
            f"expected all tensors of a {model.config.model_type} in {folder}, got none for "
            f"{sorted(report['missing_keys'])[:5]}: download it again"
        )
    parameters = dict(loaded.named_parameters(remove_duplicate=False))
    for name, view in views.items():
        _write(view, parameters[name].detach(), name, folder)
