"""Find a checkpoint's folder: a local path, or a snapshot of a hub id."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from djinn_lib.engine.models.folder_kinds import explain_folder
from djinn_lib.errors import CheckpointError, first_line

_SMALL_FILES = [
    "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "*.bpe", "tokenizer*",
    "additional_chat_templates/*",
]  # fmt: skip
_CODE = ["*.py", "custom_generate/*"]
# Other formats and duplicates of the weights are in subfolders (original/, onnx/, ...).
_FOLDERS = ["original/*", "onnx/*", "openvino/*", "gguf/*", "coreml/*", "mlx/*", "runs/*"]

# Errors of the hub's HTTP client, by name: which library that is depends on its version.
_NO_NETWORK = ("ConnectError", "ConnectTimeout", "ReadTimeout", "PoolTimeout", "ProxyError")


def resolve_folder(
    source: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> Path:
    """Return the folder of a checkpoint: `source`, or a snapshot of that hub id.

    From the hub, only the files that transformers reads are fetched, without duplicate weights.

    Args:
        source: a folder (``~`` is the home folder), or "organisation/model".
        revision: commit, tag or branch of a hub id.
        trust_remote_code: fetch the Python code of the checkpoint as well.

    Raises:
        CheckpointError: the folder does not exist, and the hub has no such model or is unreachable.
    """
    folder = _as_path(source)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"expected the folder of a model, got {explain_folder(folder)}")
    looks_like_path = isinstance(source, Path) or str(source).startswith((".", "/", "~"))
    if looks_like_path or str(source).count("/") > 1:
        raise CheckpointError(
            f"the folder {str(source)!r} does not exist: check the path (a checkpoint has "
            "config.json and *.safetensors)"
        )
    return _fetch(str(source), revision, trust_remote_code)


def _as_path(source: str | Path) -> Path:
    if not isinstance(source, (str, Path)):
        raise CheckpointError(
            f"a model comes from a folder, a hub id or a ModelSpec, not from a "
            f"{type(source).__name__}"
        )
    if not str(source).strip():
        raise CheckpointError(
            "the source of a model is empty: pass a folder, a hub id or a ModelSpec"
        )
    try:
        path = Path(source).expanduser()
        path.exists()  # raises for a NUL byte or a name that is too long
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{str(source)!r} is not a path ({first_line(error)})") from error
    return path


def _fetch(repo: str, revision: str | None, trust_remote_code: bool) -> Path:
    def snapshot(patterns: Iterable[str]) -> Path:
        from huggingface_hub import snapshot_download  # only a hub id needs the network

        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=_FOLDERS
            )
        )

    try:
        folder = snapshot(_SMALL_FILES + (_CODE if trust_remote_code else []))
        for name in _weight_names(folder):
            folder = snapshot([name])
            if (folder / name).exists():
                break
        else:
            folder = snapshot(_shards(folder))
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{repo!r} is neither a local folder nor a hub id that can be fetched "
            f"({type(error).__name__}: {first_line(error)}): {_remedy(error)}"
        ) from None  # a traceback of the hub's client takes hundreds of lines in a notebook
    return folder


def _remedy(error: BaseException) -> str:
    """Say what to do about an error of the hub's client."""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ == "OfflineModeIsEnabled":
            return "pass a local folder, or unset HF_HUB_OFFLINE"
        if isinstance(cause, ConnectionError | TimeoutError) or type(cause).__name__ in _NO_NETWORK:
            return "no network: pass a local folder, or set HF_HUB_OFFLINE=1 with a full cache"
        cause = cause.__cause__ or cause.__context__
    return "check the name, the revision and, for a gated model, your access token"


def _weight_names(folder: Path) -> list[str]:
    """List single weight files in transformers' order of precedence."""
    named = _fields(folder / "config.json").get("transformers_weights")
    if not named:
        return [SAFE_WEIGHTS_NAME]
    return [] if str(named).endswith(".index.json") else [str(named)]


def _shards(folder: Path) -> list[str]:
    named = _fields(folder / "config.json").get("transformers_weights")
    weight_map = _fields(folder / str(named or SAFE_WEIGHTS_INDEX_NAME)).get("weight_map")
    shards = weight_map.values() if isinstance(weight_map, dict) else ()
    # With nothing to fetch, `checkpoint.weight_files` raises the error that says what is missing.
    return sorted({str(name) for name in shards}) or ["config.json"]


def _fields(path: Path) -> dict[str, object]:
    """Read a JSON object; {} if it is missing or damaged (`checkpoint` reports that)."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}
