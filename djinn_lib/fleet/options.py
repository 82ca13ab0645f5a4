"""Options of a vLLM engine on a ring: defaults, and checks of options that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from djinn_lib.engine.models.hub import resolve_folder
from djinn_lib.engine.models.tokenizer import Tokenizer, read_tokenizer
from djinn_lib.errors import ConfigError, shown

KV_CACHE_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
WORKERS = {
    "cpu": "djinn_lib.fleet.vllm_worker.RingCPUWorker",
    "cuda": "djinn_lib.fleet.vllm_worker.RingWorker",
}
ON_ONE_DEVICE = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def engine_options(
    name: str, source: str | Path, device: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options of `vllm.LLM`.

    Args:
        name: name of the model.
        source: a folder or a hub id.
        device: "cpu" or "cuda".
        options: options of the user, which override the defaults here.

    Raises:
        ConfigError: the folder has no model, or an option cannot be used with a ring.
    """
    for option in ON_ONE_DEVICE:
        if options.get(option, 1) != 1:
            raise ConfigError(
                f"{option}={shown(options[option])} cannot be used: a model on the ring runs on "
                "one device; leave it out"
            )
    if "worker_cls" in options:
        raise ConfigError("worker_cls is the ring's own: leave it out")
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ConfigError(f"{folder} holds no model: name a folder with a config.json")
    has_tokenizer = not folder.is_dir() or any((folder / one).exists() for one in _TOKENIZERS)
    return {
        "model": str(source),
        "served_model_name": [name],
        "skip_tokenizer_init": not has_tokenizer,
        "disable_log_stats": True,
        **defaults_on(device),
        **options,
        "worker_cls": WORKERS[device],
    }


def defaults_on(device: str) -> dict[str, Any]:
    """Return the defaults of every engine on a ring that differ from vLLM's.

    By default vLLM sizes its KV cache by the free memory, which does not work next to a ring and
    other engines. So the size of the KV cache is fixed.
    """
    options: dict[str, Any] = {"kv_cache_memory_bytes": KV_CACHE_BYTES[device]}
    if device == "cpu":
        return {**options, "enforce_eager": True}  # compiling for a CPU takes a minute
    return {
        **options,
        "gpu_memory_utilization": 0.05,
    }  # vLLM only checks that it is free


def engine_tokenizer(options: Mapping[str, Any]) -> Tokenizer | None:
    """Read the tokenizer that an engine with these options uses.

    Raises:
        CheckpointError: its files are broken, or cannot be fetched.
    """
    trusted = bool(options.get("trust_remote_code"))
    revision = options.get("tokenizer_revision") or options.get("revision")
    source = options.get("tokenizer") or options["model"]
    return read_tokenizer(resolve_folder(source, revision, trusted), trusted)


def engine_environment(socket: Path, masters: str) -> dict[str, str]:
    """Return the environment variables of an engine's process."""
    return {
        "DJINN_RING": str(socket),
        "DJINN_MASTERS": masters,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_RPC_BASE_PATH": str(socket.parent),
    }
