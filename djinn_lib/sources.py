"""Where a model comes from: a folder, a hub id or a `ModelSpec`, opened for loading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from djinn_lib.checkpoint import fill_views, resolve_folder
from djinn_lib.models import ModelSpec, folder_config, parse_dtype, skeleton
from djinn_lib.swap_pool import Fill
from djinn_lib.tokenizer import Tokenizer, read_tokenizer


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A skeleton, a function that fills views of its parameters, and its tokenizer, if any."""

    module: PreTrainedModel
    fill: Fill
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
        ConfigError: the architecture or dtype cannot be used.
    """
    if isinstance(source, ModelSpec):
        module = skeleton(source.resolve_config(), parse_dtype(dtype or source.dtype))
        return OpenedModel(module, _fill_from_spec(source), None)
    folder = resolve_folder(source, revision)
    config = folder_config(folder, trust_remote_code)
    weights_dtype = parse_dtype(dtype or config.dtype or torch.float32)
    module = skeleton(config, weights_dtype, trust_remote_code)
    if (folder / "generation_config.json").exists():
        module.generation_config = GenerationConfig.from_pretrained(folder)
    return OpenedModel(
        module,
        _fill_from_folder(module, folder, trust_remote_code),
        read_tokenizer(folder, trust_remote_code),
    )


def _fill_from_spec(spec: ModelSpec) -> Fill:
    def fill(views: Mapping[str, torch.Tensor]) -> None:
        parameters = dict(spec.build().named_parameters())
        for name, view in views.items():
            view.copy_(parameters[name].detach())

    def fill_plainly(views: Mapping[str, torch.Tensor]) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(device).manual_seed(spec.seed)
        deviation = float(getattr(spec.resolve_config(), "initializer_range", 0.02))
        for name, view in sorted(views.items()):  # the same weights, however they are packed
            if view.dim() > 1:
                drawn = torch.empty(view.shape, dtype=view.dtype, device=device)
                view.copy_(drawn.normal_(0.0, deviation, generator=generator))
            else:
                view.fill_(1.0 if name.endswith("weight") else 0.0)

    return fill if spec.init == "transformers" else fill_plainly


def _fill_from_folder(module: PreTrainedModel, folder: Path, trust_remote_code: bool) -> Fill:
    """Fill the views, and the module's persistent buffers, which live outside the ring."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    buffers = {name: t for name, t in module.state_dict().items() if name not in parameters}

    def fill(views: Mapping[str, torch.Tensor]) -> None:
        fill_views({**views, **buffers}, module, folder, trust_remote_code=trust_remote_code)

    return fill
