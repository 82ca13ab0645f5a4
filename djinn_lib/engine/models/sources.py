"""Open a model from a folder, a hub id or a `ModelSpec`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from djinn_lib.arguments import flag
from djinn_lib.engine.models.checkpoint import load_pretrained, weight_files
from djinn_lib.engine.models.hub import resolve_folder
from djinn_lib.engine.models.spec import ModelSpec, check_dtype, fill_from_spec, skeleton
from djinn_lib.engine.models.tensor_files import CountedFill, fill_from
from djinn_lib.engine.models.tokenizer import Tokenizer, read_tokenizer
from djinn_lib.errors import ConfigError, shown


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model, a function that fills views of its parameters, and a tokenizer.

    The model is complete except for the values of its parameters. `tokenizer` may be None.
    """

    module: PreTrainedModel
    fill: CountedFill
    tokenizer: Tokenizer | None


def open_source(
    source: str | Path | ModelSpec,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> OpenedModel:
    """Open a model without reading its weights yet.

    Args:
        source: a folder with config.json and safetensors, a hub id, or a `ModelSpec`.
        dtype: of the weights; default is that of the source.
        revision: commit, tag or branch of a hub id.
        trust_remote_code: allow Python code that comes with the checkpoint.

    Raises:
        CheckpointError: config or weights are missing or of a refused kind.
        ConfigError: the architecture or dtype cannot be used, or an argument has the wrong type.
    """
    trust_remote_code = flag(trust_remote_code, "trust_remote_code")
    if revision is not None and not (isinstance(revision, str) and revision.strip()):
        raise ConfigError(f"expected a revision as text, got {shown(revision)}")
    if isinstance(source, ModelSpec):
        module = skeleton(
            source.resolve_config(), check_dtype(source.dtype if dtype is None else dtype)
        )
        return OpenedModel(module, fill_from_spec(source, module), None)
    folder = resolve_folder(source, revision, trust_remote_code)
    module = load_pretrained(folder, dtype, trust_remote_code)
    return OpenedModel(
        module,
        fill_from(module, weight_files(folder)),
        read_tokenizer(folder, trust_remote_code),
    )
