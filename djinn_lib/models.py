"""Models without weights of their own: packing order, and binding parameters to views.

Nothing here knows an architecture. The order of execution is observed by running the model once on
fake tensors (shapes without data), so that packing follows what the model does, not how its
classes happen to be written. A *unit* is what waits for its bytes as one: each decoder layer, and
each module outside the layers that owns parameters.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from accelerate import init_empty_weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from djinn_lib.errors import CheckpointError, ConfigError
from djinn_lib.swap_pool import Layout

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return a floating-point dtype that weights may have.

    Raises:
        ConfigError: any other dtype.
    """
    found = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(dtype)
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
        init: "transformers" initialises the whole model as transformers does, beside the copy that
            is kept; "plain" tensor by tensor, for models that host memory holds only once: normal
            with the configuration's initializer_range, ones for the weights of norms, else zeros.
    """

    config: PretrainedConfig | Mapping[str, Any]
    dtype: str = "float32"
    seed: int = 0
    init: Literal["transformers", "plain"] = "transformers"

    def resolve_config(self) -> PretrainedConfig:
        """Return the configuration as transformers' own object.

        Raises:
            ConfigError: ``model_type`` is missing or unknown to transformers.
        """
        if isinstance(self.config, PretrainedConfig):
            return copy.deepcopy(self.config)
        fields = dict(self.config)
        try:
            return AutoConfig.for_model(fields.pop("model_type"), **fields)
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"expected a model_type that transformers knows, got {self.config!r} ({error})"
            ) from error

    def build(self, device: str | torch.device = "cpu") -> PreTrainedModel:
        """Return the model with its random weights, initialised as transformers does."""
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(self.seed)
            model = AutoModelForCausalLM.from_config(
                self.resolve_config(), dtype=parse_dtype(self.dtype)
            )
        return model.eval()


def folder_config(folder: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return the configuration in a checkpoint folder.

    Raises:
        CheckpointError: it is missing, unreadable or asks for quantised weights.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"expected config.json in {folder}, got none: check the folder")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"expected a config.json that transformers can read, got {folder} "
            f"({type(error).__name__}: {error})"
        ) from error
    if getattr(config, "quantization_config", None):
        raise CheckpointError(
            f"expected weights in float32, float16 or bfloat16, got a quantised checkpoint in "
            f"{folder}: dequantise it first"
        )
    return config


def skeleton(
    config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the model with parameters on the meta device (no memory) and real buffers.

    Raises:
        ConfigError: transformers has no decoder-only model of that type.
    """
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except ValueError as error:
        raise ConfigError(
            f"expected a decoder-only model type, got {config.model_type!r} "
            f"({str(error).splitlines()[0]})"
        ) from error
    model.tie_weights()
    return model.eval()


@dataclass(frozen=True)
class Unit:
    """A module that may run once the first `end_byte` bytes of the packed model are there."""

    module: str
    end_byte: int


Embeddings = Literal["host", "ring"]


def choose_embeddings(embeddings: str | None, host_keeps_all: bool) -> Embeddings:
    """Return where lookup tables are to be: as asked for, or what suits the host.

    Raises:
        ConfigError: there is no such place, or the host does not keep all master copies.
    """
    chosen = embeddings or ("host" if host_keeps_all else "ring")
    if chosen not in get_args(Embeddings):
        raise ConfigError(
            f"expected embeddings to be one of {get_args(Embeddings)}, got {embeddings!r}"
        )
    if chosen == "host" and not host_keeps_all:
        raise ConfigError(
            "expected embeddings='ring' with host_capacity, got 'host': leave one of them out"
        )
    return cast("Embeddings", chosen)


def pack(
    model: PreTrainedModel, embeddings: Embeddings = "ring"
) -> tuple[Layout, tuple[Unit, ...]]:
    """Return how to pack a model's parameters in execution order, and its units.

    Tied parameters are packed once, where they are first used. With embeddings in the host, lookup
    tables come last and belong to no unit: nobody waits for them.
    """
    owners = _executed_modules(model)
    layers = _decoder_layers(model)
    rank = {name: i for i, name in reversed(list(enumerate(owners)))}
    in_host = _lookup_tables(model, layers) if embeddings == "host" else set()
    parameters = []
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0]
        unit = _unit(module, layers, rank)
        order = rank.get(unit, -1), rank.get(module, -1)
        parameters.append((order, (name, tuple(parameter.shape), parameter.dtype)))
    parameters.sort(key=lambda entry: entry[0])
    layout = Layout.pack(
        [shaped for _, shaped in parameters if shaped[0] not in in_host],
        [shaped for _, shaped in parameters if shaped[0] in in_host],
    )
    return layout, _units(model, layout, layers, rank)


def _lookup_tables(model: PreTrainedModel, layers: Sequence[str]) -> set[str]:
    """Names of parameters of which a forward pass reads single rows, and only those.

    They belong to embeddings alone: tied to the head, say, a table is read whole.
    """
    readers: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            readers.setdefault(id(parameter), []).append((name, module))

    def looks_up(name: str, module: nn.Module) -> bool:
        inside = any(name.startswith(f"{layer}.") for layer in layers)
        # With max_norm it would write: rows are scaled where they are.
        return isinstance(module, nn.Embedding) and module.max_norm is None and not inside

    return {
        name
        for name, parameter in model.named_parameters()
        if all(looks_up(*reader) for reader in readers[id(parameter)])
    }


def _executed_modules(model: PreTrainedModel) -> list[str]:
    """Names of modules in the order of their calls in one forward pass on fake tensors."""
    called: list[str] = []
    try:
        with FakeTensorMode(), torch.no_grad():
            # bfloat16 whatever the weights are: the order is the same, and every operator of a
            # mixture of experts has a fake implementation for it.
            # The class is at hand: to look it up again would ask the user to trust its code again.
            twin = type(model)._from_config(copy.deepcopy(model.config), dtype=torch.bfloat16)
            for name, module in twin.named_modules():
                module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
            twin(input_ids=torch.zeros((1, 4), dtype=torch.long), use_cache=False)
    except Exception as error:  # whatever custom code may raise: only the overlap is at stake
        logging.getLogger(__name__).warning(
            "%s cannot be traced (%s): packed in order of definition, which costs overlap only",
            model.config.model_type,
            error,
        )
        called = [name for name, _ in model.named_modules()]
    return called


def _decoder_layers(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the decoder layers: the children of the ModuleList with the most parameters."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    if not lists:
        return ()
    stack = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return tuple(f"{stack}.{name}" for name, _ in lists[stack].named_children())


def _unit(module: str, layers: tuple[str, ...], rank: Mapping[str, int]) -> str:
    """The unit that a module belongs to; the whole model when it is never called itself."""
    for layer in layers:
        if module == layer or module.startswith(f"{layer}."):
            return layer
    return module if module in rank else ""


def _units(
    model: PreTrainedModel, layout: Layout, layers: tuple[str, ...], rank: Mapping[str, int]
) -> tuple[Unit, ...]:
    ends = {slot.name: slot.end for slot in layout.slots}
    first_name = {id(p): name for name, p in model.named_parameters()}
    end_of_unit: dict[str, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        unit = _unit(name.rpartition(".")[0], layers, rank)
        end = ends[first_name[id(parameter)]]
        if end <= layout.paged_bytes:
            end_of_unit[unit] = max(end, end_of_unit.get(unit, 0))
    return tuple(Unit(unit, end) for unit, end in end_of_unit.items())


def bind(model: PreTrainedModel, views: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Make every parameter of a skeleton a view of the packed model, for life.

    Raises:
        ConfigError: a parameter ended up elsewhere; the model would then not see its pages.
    """
    model.load_state_dict(dict(views), assign=True, strict=False)
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    model.requires_grad_(False)
    addresses = {view.data_ptr() for view in views.values()}
    astray = [name for name, p in model.named_parameters() if p.data_ptr() not in addresses]
    if astray:
        raise ConfigError(
            f"expected every parameter of {model.config.model_type} bound to the ring, got "
            f"{astray[:5]} elsewhere: this architecture copies parameters while it is set up"
        )
