"""Load a checkpoint through transformers with its tensors still in their files.

`from_pretrained` defines the model: which files are read, how names are converted, which weights
are tied, the dtype of each tensor, and the buffers. On the CPU it reads no weights: a tensor that
needs no conversion is a view of its memory-mapped file. `tensor_files.fill_from` later reads these
tensors directly into their final memory.

Only safetensors are accepted. Loading a pickle checkpoint (``*.bin``, ``*.pt``) can run code.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from djinn_lib.engine.models.construction import as_its_own, causal_class, isolated, without_bars
from djinn_lib.engine.models.folder_kinds import explain_folder
from djinn_lib.engine.models.spec import check_dtype
from djinn_lib.errors import CheckpointError, ConfigError, DjinnError, first_line

_WANTED = "a decoder-only language model in safetensors"
# Errors that the checkpoint does not cause, or that already explain themselves.
_NOT_OURS = (DjinnError, KeyboardInterrupt, SystemExit, MemoryError, torch.OutOfMemoryError)
# transformers' lazy imports and class registries are not thread-safe.
_LOADING = threading.RLock()


def weight_files(folder: Path) -> list[Path]:
    """List the files that transformers reads a checkpoint's weights from.

    A single file takes precedence over an index of shards. Other files are ignored.

    Raises:
        CheckpointError: there are no weights, only pickles, or a shard of the index is missing.
    """
    named = _read_json(folder / "config.json").get("transformers_weights")
    for name in [str(named)] if named else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]:
        if not (folder / name).is_file():
            continue
        if not name.endswith(".index.json"):
            return [folder / name]
        files = [folder / shard for shard in sorted(set(_weight_map(folder / name).values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise CheckpointError(
                f"{folder / name} lists shards that do not exist: {missing}; download them again"
            )
        return files
    raise CheckpointError(_no_weights(folder))


def _no_weights(folder: Path) -> str:
    """Explain why a folder has no usable weights."""
    if explanation := explain_folder(folder):
        return f"expected {_WANTED} in {folder}, got {explanation}"
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    remedy = "check the folder"
    if others:
        remedy = f"transformers does not load {', '.join(others[:5])}; rename or download it again"
    return f"{folder} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}: {remedy}"


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, unreadable or holds another JSON type.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}: check the folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({first_line(error)}): download it again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object: download it again")
    return value


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no 'weight_map': download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(
                f"{index} names {name!r}, which is not a file next to it: download it again"
            )
    return weight_map


def folder_config(folder: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read the configuration in a checkpoint folder.

    Raises:
        CheckpointError: the configuration is missing or unreadable, or describes anything but a
            decoder-only language model without quantisation.
    """
    if explanation := explain_folder(folder):
        raise CheckpointError(f"expected {_WANTED} in {folder}, got {explanation}")
    fields = _read_json(folder / "config.json")
    try:
        with _LOADING:
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except _NOT_OURS:
        raise
    except BaseException as error:  # a panic in Rust code is not an Exception
        raise CheckpointError(
            f"transformers cannot use {folder / 'config.json'} "
            f"({type(error).__name__}: {first_line(error)}): {_remedy(fields, trust_remote_code)}"
        ) from error


def _remedy(fields: Mapping[str, Any], trust_remote_code: bool) -> str:
    if fields.get("auto_map") and not trust_remote_code:
        return "it comes with Python code; read it, then pass trust_remote_code=True to run it"
    return "correct the file or download it again"


def load_pretrained(
    folder: Path, dtype: str | torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a folder with `from_pretrained`, on the CPU.

    The tensors are views of memory-mapped files, except those that had to be converted.

    Args:
        folder: config.json and safetensors.
        dtype: of the weights; default is that of the configuration, else of the files.
        trust_remote_code: allow Python code that comes with the checkpoint.

    Raises:
        CheckpointError: something in the folder cannot be used.
        ConfigError: transformers has no decoder-only model of that type, or not of that dtype.
    """
    wanted = None if dtype is None else check_dtype(dtype)
    config = folder_config(folder, trust_remote_code)
    count = _bound(folder, weight_files(folder))
    with _LOADING, without_bars():
        model_class, config = _causal_class(folder, config, trust_remote_code, count)
        try:
            made: Any = isolated(model_class, count).from_pretrained(
                folder,
                config=config,
                dtype=wanted or "auto",
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
        except _NOT_OURS:
            raise
        except BaseException as error:  # a panic in Rust code is not an Exception
            raise CheckpointError(_why_unloadable(folder, config, error)) from error
    model, report = made
    _check_whole(folder, model, report)
    _check_generation(folder, model)
    return as_its_own(model, model_class)


def _causal_class(
    folder: Path, config: PretrainedConfig, trust_remote_code: bool, count: Callable[[], None]
) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    try:
        return causal_class(config, trust_remote_code, count)
    except _NOT_OURS:
        raise
    except BaseException as error:
        if explanation := explain_folder(folder, refused=True):
            raise CheckpointError(f"expected {_WANTED} in {folder}, got {explanation}") from error
        raise ConfigError(
            f"transformers cannot make a decoder-only language model of type "
            f"{config.model_type!r} from {folder} ({type(error).__name__}: {first_line(error)}): "
            f"{_remedy(vars(config), trust_remote_code)}"
        ) from error


def _bound(folder: Path, files: list[Path]) -> Callable[[], None]:
    """Return a function that counts tensors and refuses far more than are stored.

    A damaged configuration may ask for a million layers. Without a limit, it takes hours to fail.
    """
    n_stored = 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                n_stored += len(tensors.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{file} ({file.stat().st_size} bytes) is truncated or corrupt "
                f"({first_line(error)}): download it again"
            ) from error
    n_made, limit = 0, 10 * n_stored + 1000

    def count() -> None:
        nonlocal n_made
        n_made += 1
        if n_made > limit:
            raise CheckpointError(
                f"{folder / 'config.json'} describes a model of more than {limit} tensors, but "
                f"its files hold {n_stored}: config and weights do not belong together"
            )

    return count


def _why_unloadable(folder: Path, config: PretrainedConfig, error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    misshapen = next((line for line in lines if "size mismatch" in line or "MISMATCH" in line), "")
    return (
        f"transformers cannot load the weights of a {config.model_type} from {folder} "
        f"({type(error).__name__}: {misshapen or first_line(error)}): config and weights do not "
        "belong together, or a file is damaged; download the checkpoint again"
    )


def _check_whole(folder: Path, model: PreTrainedModel, report: dict[str, Any]) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    absent = sorted(name for name in report["missing_keys"] if name in parameters)
    absent += sorted(name for name, p in parameters.items() if p.is_meta and name not in absent)
    if absent:
        raise CheckpointError(
            f"{folder} has no tensors for {len(absent)} weights of a {model.config.model_type}, "
            f"such as {absent[:5]}: download it again"
        )


def _check_generation(folder: Path, model: PreTrainedModel) -> None:
    """Refuse a damaged generation_config.json; transformers would skip it silently."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    try:
        config = model.generation_config = GenerationConfig.from_pretrained(folder)
        for name in ("num_beams", "num_return_sequences"):  # else `generate` fails midway
            if getattr(config, name, None) is not None and getattr(config, name) < 1:
                raise ValueError(f"{name} is {getattr(config, name)}, but must be at least 1")
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot use {path} ({type(error).__name__}: {first_line(error)}): "
            "correct or delete it"
        ) from error
