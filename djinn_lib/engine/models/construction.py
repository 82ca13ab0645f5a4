"""Construct transformers models without side effects on other threads.

transformers builds a model under process-wide settings: torch's default dtype, a replaced
`PreTrainedModel.tie_weights`, replaced functions of `torch.nn.init`. A module that another thread
makes at that time gets the wrong dtype, and two concurrent builds restore the wrong functions. Here
the same settings are torch function modes, which apply to one thread only.
"""

from __future__ import annotations

import copy
import inspect
import threading
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
    """Emulate `torch.set_default_dtype` for the calling thread only.

    A floating-point result has the default dtype if no argument is floating-point and none names a
    dtype. This mode converts such results to the given dtype.
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
    """Whether an argument decides a result's dtype, instead of the default."""
    if isinstance(argument, (list, tuple)):
        return any(map(_decides_dtype, argument))
    if isinstance(argument, torch.Tensor):
        return argument.is_floating_point() or argument.is_complex()
    return isinstance(argument, (torch.dtype, np.ndarray, np.generic))


class _OnMeta(DefaultDtype):
    """Construct on the meta device, count the tensors, and keep schedules readable.

    Code that comes with checkpoints calls `.item()` on a `torch.linspace` during construction. A
    tensor without data does not allow that, so `linspace` stays on the CPU, as in transformers.
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
    """Keep initialisation from overwriting tensors that were read from a checkpoint.

    transformers marks these tensors. Its own initialisers check the mark; those of `torch.nn.init`
    and of code that comes with a checkpoint do not.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__"):  # writes to its first argument
            target = args[0] if args else kwargs.get("tensor")
            if getattr(target, "_is_hf_initialized", False):
                return target
        return func(*args, **kwargs)


def isolated(
    model_class: type[PreTrainedModel], count: Callable[[], None] = lambda: None
) -> type[PreTrainedModel]:
    """Return a subclass that is constructed without side effects on other threads.

    Call `as_its_own` on the finished model to restore its original class.

    Args:
        model_class: a causal language model's class.
        count: called for each tensor that `from_pretrained` makes; an error in it aborts loading.
    """
    building = False

    @contextmanager
    def without_tying() -> Iterator[None]:
        # Keep all names of tied weights until it is known which of them the files hold.
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
    """Restore a model's original class and return it in inference mode (`eval`)."""
    model.__class__ = model_class
    for module in model.modules():
        if _asks_for_default_dtype(type(module)):
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.dtype == torch.get_default_dtype():
                    setattr(module, name, buffer.to(model.dtype))
    return model.eval()


@cache
def _asks_for_default_dtype(kind: type[nn.Module]) -> bool:
    """Whether its code calls `torch.get_default_dtype`, which no mode intercepts."""
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
        The class, and the configuration that it takes. For a multimodal checkpoint that is the
        text configuration.

    Raises:
        Exception: anything that transformers or the model's own code raises.
    """
    with torch.device("meta"), _OnMeta(torch.get_default_dtype(), count):
        chosen = AutoModelForCausalLM.from_config(
            without_dtype(config), trust_remote_code=trust_remote_code
        )
    is_same = isinstance(chosen.config, type(config))
    return type(chosen), config if is_same else config.get_text_config()


def without_dtype(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy without a dtype; transformers then keeps the process's default."""
    config = copy.deepcopy(config)
    config.dtype = None
    return config


def set_dtype(config: PretrainedConfig, dtype: torch.dtype) -> None:
    """Record the weights' dtype in a configuration and its parts."""
    config.dtype = dtype
    for key in config.sub_configs:
        if (part := getattr(config, key, None)) is not None:
            part.dtype = dtype


@contextmanager
def without_bars() -> Iterator[None]:
    """Silence transformers' bar: it counts tensors that are mapped, not bytes that are read.

    The setting is one for all threads: the first block saves it, and the last one restores it.
    """
    _BARS.enter()
    try:
        yield
    finally:
        _BARS.leave()


class _Bars:
    """Counts the blocks in which no bar is shown."""

    def __init__(self) -> None:
        self._lock, self._n_blocks, self._were_shown = threading.Lock(), 0, False

    def enter(self) -> None:
        with self._lock:
            if not self._n_blocks:
                self._were_shown = transformers_logging.is_progress_bar_enabled()
                transformers_logging.disable_progress_bar()
            self._n_blocks += 1

    def leave(self) -> None:
        with self._lock:
            self._n_blocks -= 1
            if not self._n_blocks and self._were_shown:
                transformers_logging.enable_progress_bar()


_BARS = _Bars()


def from_state(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    state: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> PreTrainedModel:
    """Return what `from_pretrained` makes of named tensors, without copying them."""
    with without_bars():
        model = isolated(model_class).from_pretrained(
            None, config=config, state_dict=dict(state), dtype=dtype
        )
    return as_its_own(model, model_class)
