"""Models with random weights: an architecture and a seed instead of files."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from djinn_lib.arguments import whole_number
from djinn_lib.engine.memory.layout import Advance
from djinn_lib.engine.models.construction import (
    DefaultDtype,
    as_its_own,
    causal_class,
    from_state,
    isolated,
    set_dtype,
    without_dtype,
)
from djinn_lib.engine.models.tensor_files import CountedFill, ignore
from djinn_lib.errors import ConfigError, DjinnError, first_line, shown

_SEEDED = threading.Lock()  # held while torch's own generator, which threads share, is seeded

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return `dtype` as a torch dtype that weights may have.

    Raises:
        ConfigError: any other dtype.
    """
    found = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(str(dtype))
    if found is None or found not in DTYPES.values():
        raise ConfigError(f"expected a dtype out of {list(DTYPES)}, got {dtype!r}")
    return found


@dataclass(frozen=True)
class ModelSpec:
    """A model with random weights: an architecture and a seed.

    Args:
        config: a transformers configuration, or a mapping with ``model_type`` and its fields.
        dtype: "float32", "float16" or "bfloat16".
        seed: the same seed gives the same weights on the same device type and torch version.
        init: "transformers" initialises the whole model as transformers does, in a second copy
            next to the packed one. "plain" initialises one tensor at a time, for models of which
            host memory holds only one copy: normal with the configuration's initializer_range, ones
            for 1-D tensors whose name ends in "weight" (norms), zeros for other 1-D tensors.

    Raises:
        ConfigError: `seed` or `init` has another value.
    """

    config: PretrainedConfig | Mapping[str, Any]
    dtype: str = "float32"
    seed: int = 0
    init: Literal["transformers", "plain"] = "transformers"

    def __post_init__(self) -> None:
        whole_number(self.seed, "the seed", 0, 2**63 - 1)
        if self.init not in ("transformers", "plain"):
            raise ConfigError(f"expected init of 'transformers' or 'plain', got {shown(self.init)}")

    def resolve_config(self) -> PretrainedConfig:
        """Return the configuration as transformers' own object.

        Raises:
            ConfigError: ``model_type`` is missing or unknown, or a field is invalid.
        """
        if isinstance(self.config, PretrainedConfig):
            return copy.deepcopy(self.config)
        try:
            fields = dict(self.config)
            return AutoConfig.for_model(fields.pop("model_type"), **fields)
        except Exception as error:
            raise ConfigError(
                f"expected a model_type that transformers knows, and its fields, got "
                f"{self.config!r} ({type(error).__name__}: {first_line(error)})"
            ) from error

    def build(self, device: str | torch.device = "cpu") -> PreTrainedModel:
        """Build the model with random weights, initialised as transformers does.

        Raises:
            ConfigError: transformers has no decoder-only model of that configuration.
        """
        dtype = check_dtype(self.dtype)
        model_class, config = _causal_class(self.resolve_config())
        with _SEEDED, torch.random.fork_rng(devices=[]), torch.device(device), DefaultDtype(dtype):
            torch.manual_seed(self.seed)
            model = isolated(model_class)._from_config(without_dtype(config))
        set_dtype(model.config, dtype)
        return as_its_own(model, model_class)


def _causal_class(config: PretrainedConfig) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    try:
        return causal_class(config)
    except (DjinnError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ConfigError(
            f"transformers cannot make a decoder-only language model of type "
            f"{config.model_type!r} ({type(error).__name__}: {first_line(error)})"
        ) from error


def skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build a model with dtypes, ties and buffers, whose parameters take no memory.

    It equals what `from_pretrained` makes of a checkpoint whose weights are all 0.

    Raises:
        ConfigError: transformers has no decoder-only model of that configuration.
    """
    model_class, config = _causal_class(config)
    with torch.device("meta"), DefaultDtype(dtype):
        shapes = isolated(model_class)._from_config(without_dtype(config))
    zeros = {
        name: torch.zeros((), dtype=p.dtype).expand(p.shape)
        for name, p in shapes.named_parameters()
    }
    return from_state(model_class, config, zeros, dtype)


def fill_from_spec(spec: ModelSpec, model: PreTrainedModel) -> CountedFill:
    """Return a function that fills a skeleton's buffers and views of its parameters."""

    def fill(views: Mapping[str, torch.Tensor], advance: Advance = ignore) -> None:
        built = spec.build()
        parameters = dict(built.named_parameters(remove_duplicate=False))
        for name, view in views.items():
            view.copy_(parameters[name].detach())
            advance(view.nbytes)
        _take_buffers(model, built)

    def fill_plainly(views: Mapping[str, torch.Tensor], advance: Advance = ignore) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(device).manual_seed(spec.seed)
        deviation = float(getattr(spec.resolve_config(), "initializer_range", 0.02))
        for name, view in sorted(views.items()):  # weights must not depend on the packing order
            if view.dim() > 1:
                drawn = torch.empty(view.shape, dtype=view.dtype, device=device)
                view.copy_(drawn.normal_(0.0, deviation, generator=generator))
            else:
                view.fill_(1.0 if name.endswith("weight") else 0.0)
            advance(view.nbytes)

    return fill if spec.init == "transformers" else fill_plainly


def _take_buffers(model: nn.Module, built: nn.Module) -> None:
    """Copy the buffers that a checkpoint of the built model would hold."""
    saved = built.state_dict()
    for name, buffer in model.named_buffers():
        if name in saved:
            buffer.copy_(saved[name])
