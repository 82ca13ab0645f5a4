"""Classify torch operations by what they do with the bytes of their arguments."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto
from typing import Any, cast

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

_METHODS = (
    Tensor.size, Tensor.stride, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement,
    Tensor.element_size, Tensor.storage_offset, Tensor.is_contiguous, Tensor.is_floating_point,
    Tensor.is_complex, Tensor.is_signed, Tensor.is_conj, Tensor.is_neg, Tensor.is_inference,
    Tensor.is_same_size, Tensor.get_device, Tensor.dim_order, Tensor.__len__, Tensor._is_view,
    Tensor.requires_grad_, Tensor.register_hook, Tensor.register_post_accumulate_grad_hook,
    Tensor.retain_grad, torch.is_floating_point, torch.is_complex, torch.is_same_size, torch.numel,
)  # fmt: skip
_ATTRIBUTES = (
    "shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "requires_grad", "is_leaf",
    "grad", "grad_fn", "is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "is_quantized",
    "is_sparse", "is_sparse_csr", "is_mkldnn", "is_nested", "output_nr", "retains_grad",
    "_version", "_backward_hooks", "_post_accumulate_grad_hooks",
)  # fmt: skip
_SET = ("requires_grad", "grad", "_backward_hooks", "_post_accumulate_grad_hooks")


def _accessors() -> Iterable[Any]:
    for name in _ATTRIBUTES:
        if hasattr(Tensor, name):  # depends on the version of torch
            yield getattr(Tensor, name).__get__
    for name in _SET:
        yield getattr(Tensor, name).__set__


_FORM: frozenset[Any] = frozenset([*_METHODS, *_accessors()])
_EXPORTS: frozenset[Any] = frozenset(
    [Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.untyped_storage, Tensor.storage,
     Tensor._typed_storage, cast(Any, Tensor.__cuda_array_interface__).__get__]
)  # fmt: skip
_IN_PLACE = frozenset(
    ["__setitem__", "__setstate__"]
    + [f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow",
                                   "and", "or", "xor", "lshift", "rshift")]
)  # fmt: skip


class Use(Enum):
    """What an operation may do with its tensor arguments.

    FORM: neither read nor write their bytes, nor return a tensor that shares them.
    READ: write only to explicit targets (`out=`, `inplace=True`).
    EXPORT: hand their memory out.
    WRITE: write to some of them.
    """

    FORM = auto()
    READ = auto()
    EXPORT = auto()
    WRITE = auto()


N_REMEMBERED = 10_000  # operations; more than torch has, but users can define any number
_USES: dict[Any, Use] = {}


def use_of(func: Any) -> Use:
    """Return what an operation may do with its arguments, from its name and schema."""
    if torch.compiler.is_compiling():  # the compiler would guard on the table
        return _classify(func)
    use = _USES.get(func)
    if use is None:
        use = _classify(func)
        if len(_USES) < N_REMEMBERED:
            _USES[func] = use
    return use


def _classify(func: Any) -> Use:
    if func in _FORM:
        return Use.FORM
    if func in _EXPORTS:
        return Use.EXPORT
    is_operator = isinstance(func, (OpOverload, OpOverloadPacket))
    return Use.WRITE if is_operator or _writes_first(func) else Use.READ


def written_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments that an operation writes to: tensors, or lists of them.

    The source is its schema, if it has one, else torch's conventions: a name that ends in `_`,
    `out=`, `inplace=True`. Other writes are found by the tensor's version when the lease ends.
    """
    written = []
    if kwargs.get("out") is not None:
        written.append(kwargs["out"])
    if _writes_first(func) or kwargs.get("inplace"):
        written += args[:1] or list(kwargs.values())[:1]
    if isinstance(func, (OpOverload, OpOverloadPacket)):
        written += _written_by_schema(func, args, kwargs)
    return written


def _writes_first(func: Any) -> bool:
    """Whether the name says that the first argument is written to."""
    name = getattr(func, "__name__", "").partition(".")[0]
    return (
        name == "__set__" or name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    )


def _written_by_schema(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    overloads = [func] if isinstance(func, OpOverload) else [
        getattr(func, name) for name in func.overloads()
    ]  # fmt: skip
    written = []
    for overload in overloads:
        for i, argument in enumerate(overload._schema.arguments):
            if argument.alias_info and argument.alias_info.is_write:
                if i < len(args) and not argument.kwarg_only:
                    written.append(args[i])
                elif argument.name in kwargs:
                    written.append(kwargs[argument.name])
    return written
