"""Making transformers models without changing what other threads see.

transformers builds a model under settings of the whole process: torch's default dtype, a replaced
`PreTrainedModel.tie_weights`, replaced functions of `torch.nn.init`. A thread that makes a module
meanwhile gets the wrong dtype, and two builds at once put the wrong function back. The same
settings are made here as torch function modes, which belong to one thread.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

_CASTS = frozenset({torch.Tensor.float, torch.Tensor.double, torch.Tensor.type, torch.from_numpy})


class DefaultDtype(TorchFunctionMode):
    """What `torch.set_default_dtype` does, for the calling thread only.

    A floating-point result without floating-point input and without a dtype that was asked for has
    the default dtype; here it is given another one.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (
            self.dtype != torch.get_default_dtype()
            and isinstance(result, torch.Tensor)
            and result.dtype == torch.get_default_dtype()
            and func not in _CASTS
            and not any(map(_decides_dtype, [*args, *kwargs.values()]))
        ):
            return result.to(self.dtype)
        return result


def _decides_dtype(argument: Any) -> bool:
    """Whether a result has its dtype from this argument, and not from the default."""
    if isinstance(argument, (list, tuple)):
        return any(map(_decides_dtype, argument))
    if isinstance(argument, torch.Tensor):
        return argument.is_floating_point() or argument.is_complex()
    return isinstance(argument, (torch.dtype, np.ndarray, np.generic))


class _OnMeta(DefaultDtype):
    """Construction on the meta device: also bounds it, and keeps schedules readable.

    Code that comes with checkpoints calls `.item()` on a `torch.linspace` while it is set up, which
    a tensor without data does not allow; transformers makes the same exception.
    """

    def __init__(self, dtype: torch.dtype, count: Callable[[], None]) -> None:
        super().__init__(dtype)
        self._count = count

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.linspace:
            kwargs = {"device": "cpu", **kwargs}
        elif func is torch.empty:
            self._count()
        return super().__torch_function__(func, types, args, kwargs)


class _KeepLoaded(TorchFunctionMode):
    """Initialisation leaves tensors alone that were read from a checkpoint.

    transformers marks them; its own initialisers look at the mark, those of `torch.nn.init` and of
    code that comes with a checkpoint do not.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__"):  # it writes to its first argument
            target = args[0] if args else kwargs.get("tensor")
            if getattr(target, "_is_hf_initialized", False):
                return target
        return func(*args, **kwargs)


def isolated(
    model_class: type[PreTrainedModel], count: Callable[[], None] = lambda: None
) -> type[PreTrainedModel]:
    """Return a subclass whose `from_pretrained` and `_from_config` keep to the calling thread.

    Give the model its own class back with `as_its_own` when it is made.

    Args:
        model_class: a causal language model's class.
        count: called for each tensor that `from_pretrained` makes; what it raises ends it.
    """
    building = False

    @contextmanager
    def without_tying() -> Iterator[None]:
        # All names of tied weights are wanted until it is known which of them the files hold.
        nonlocal building
        building = True
        try:
            yield
        finally:
            building = False

    class Isolated(model_class):
        @classmethod
        def get_init_context(
            cls, dtype: torch.dtype, *_: Any, **__: Any
        ) -> list[AbstractContextManager[Any]]:
            return [without_tying(), torch.device("meta"), _OnMeta(dtype, count)]

        def tie_weights(self, *args: Any, **kwargs: Any) -> None:
            if not building:
                super().tie_weights(*args, **kwargs)

        @torch.no_grad()
        def initialize_weights(self) -> None:
            with _KeepLoaded():
                inspect.unwrap(model_class.initialize_weights)(self)

    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Isolated, attribute, getattr(model_class, attribute))
    return Isolated


def as_its_own(model: PreTrainedModel, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """Give a model of an isolated class its own class back, and return it for inference."""
    model.__class__ = model_class
    for module in model.modules():
        if _asks_for_default_dtype(type(module)):
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.dtype == torch.get_default_dtype():
                    setattr(module, name, buffer.to(model.dtype))
    return model.eval()


@cache
def _asks_for_default_dtype(kind: type[nn.Module]) -> bool:
    """Whether a module's own code calls `torch.get_default_dtype`, which no mode can answer."""
    functions = (getattr(member, "__func__", member) for member in vars(kind).values())
    codes = (getattr(function, "__code__", None) for function in functions)
    return any(code and "get_default_dtype" in code.co_names for code in codes)


def causal_class(
    config: PretrainedConfig,
    trust_remote_code: bool = False,
    count: Callable[[], None] = lambda: None,
) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """Return the class that `AutoModelForCausalLM` chooses for a configuration.

    Args:
        config: of the checkpoint.
        trust_remote_code: allow Python code that comes with it.
        count: see `isolated`.

    Returns:
        The class, and the configuration that it takes: of a multimodal checkpoint, the text's.

    Raises:
        Exception: whatever transformers or the model's own code raises.
    """
    with torch.device("meta"), _OnMeta(torch.get_default_dtype(), count):
        chosen = AutoModelForCausalLM.from_config(
            without_dtype(config), trust_remote_code=trust_remote_code
        )
    is_same = isinstance(chosen.config, type(config))
    return type(chosen), config if is_same else config.get_text_config()


def without_dtype(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy that names no dtype: transformers then leaves the process's default alone."""
    config = copy.deepcopy(config)
    config.dtype = None
    return config


def set_dtype(config: PretrainedConfig, dtype: torch.dtype) -> None:
    """Note the dtype of the weights in a configuration and its parts, as transformers does."""
    config.dtype = dtype
    for key in config.sub_configs:
        if (part := getattr(config, key, None)) is not None:
            part.dtype = dtype


@contextmanager
def without_bars() -> Iterator[None]:
    """Silence transformers' bar: it counts tensors that are mapped, not bytes that are read."""
    shown = transformers_logging.is_progress_bar_enabled()
    if shown:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def from_state(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    state: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> PreTrainedModel:
    """Return the model that `from_pretrained` makes of tensors by name; it copies none of them."""
    with without_bars():
        model = isolated(model_class).from_pretrained(
            None, config=config, state_dict=dict(state), dtype=dtype
        )
    return as_its_own(model, model_class)
