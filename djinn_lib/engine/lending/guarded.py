"""Guard the weights that users get: readable while lent, else refused.

The pager maps and unmaps the pages under a weight's addresses. Reading an unmapped page kills the
process (SIGSEGV) or, on a GPU, the process's CUDA context. Writing to a page would change later
results. So users never get the library's own tensors. They get tensors over the same bytes of type
`LentTensor`. torch passes every operation on them to `__torch_function__`, which checks the `Loan`
first. A result that shares the memory is a `LentTensor` too. What leaves torch (NumPy, DLPack) is a
copy.

Some reads bypass Python. Examples are the backward pass of a graph built during the lease, a kept
storage, and a tensor with a weight's memory (`tensor.data = weight`). For these, each loan has its
own storages. When the loan ends, saved tensors are marked as modified, and the storages lose their
memory (see `_end_storage`).
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, UntypedStorage, nn
from torch._C import DisableTorchFunctionSubclass

from djinn_lib.engine.lending.guarded_operations import Use, use_of, written_arguments
from djinn_lib.engine.models.place import Place
from djinn_lib.errors import LeaseError

_C: Any = torch._C


class Loan:
    """The right to read some weights of a model, shared by all tensors over them.

    Args:
        model: its name.
        refusal: why the weights cannot be read; None while they can.
        replaceable: whether damage can be undone by loading the master copy again.

    Attributes:
        exposed: whether memory was handed out in a form in which writes go unnoticed.
    """

    def __init__(self, model: str, refusal: str | None = None, replaceable: bool = True) -> None:
        self.model, self.refusal, self.replaceable = model, refusal, replaceable
        self.exposed = False
        self._lent: dict[str, tuple[LentTensor, UntypedStorage, int]] = {}
        self._copies: dict[int, UntypedStorage] = {}
        _LOANS.add(self)

    def ensure_open(self) -> None:
        """Raise `LeaseError` unless the weights can be read."""
        if self.refusal is not None:
            raise LeaseError(self.refusal)

    def lend(self, name: str, weight: LentTensor, place: Place) -> None:
        """Make a weight readable: give it its memory, through a storage of this loan.

        Args:
            name: of the weight, for reports.
            weight: not lent at present; its bytes are mapped.
            place: of the weight.
        """
        view, storage = place.view()
        with DisableTorchFunctionSubclass():
            weight.data = view
            self._lent[name] = weight, storage, weight._version
        weight.loan = self

    def close(self, successor: Loan) -> tuple[list[str], list[str]]:
        """End the loan and attach the weights to `successor`, a closed loan.

        Returns:
            Names of weights that were written to, and of those that were replaced.
        """
        self.refusal = (
            f"a tensor that shares memory with weights of {self.model!r} outlived the lease or the "
            "forward pass that made it: clone() it there, or make it again in a new lease"
        )
        written, replaced = [], []
        with DisableTorchFunctionSubclass():
            for name, (weight, storage, version) in self._lent.items():
                if type(weight) is not LentTensor:  # `torch.utils.swap_tensors` was used on it
                    replaced.append(name)
                    weight.__class__, weight._is_param = LentTensor, True
                elif weight._version != version:
                    written.append(name)
                weight.requires_grad_(False)
                weight.grad, weight.loan = None, successor
                _end_storage(storage, self.refusal)
            # The version makes torch refuse a backward pass that reads a saved weight.
            torch.autograd.graph.increment_version([lent[0] for lent in self._lent.values()])
        self._lent.clear()
        self._copies.clear()
        return written, replaced

    def in_storage_to_hand_out(self, tensor: Tensor) -> Tensor:
        """Return a tensor like `tensor` whose storage the user may have.

        Writes through a storage go unnoticed. Replaceable memory is handed out, and compared with
        its master afterwards. A master itself is copied instead, once per loan.
        """
        if self.replaceable:
            self.exposed = True
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._copies:
            self._copies[storage.data_ptr()] = storage.clone()
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        copied: Any = self._copies[storage.data_ptr()]
        return empty.set_(copied, tensor.storage_offset(), tensor.shape, tensor.stride())


def _end_storage(storage: Any, message: str) -> None:
    """Take the memory away from all remaining references to a lent storage.

    CUDA builds of torch can refuse access to a storage, with a message. Other builds (from 2.12 on)
    can exchange its memory: for a copy if anything besides the weight refers to it, else for none.
    """
    if hasattr(_C, "_set_storage_data_ptr_access_error_msg"):
        _C._set_storage_data_ptr_access_error_msg(storage._cdata, message)
    elif hasattr(storage, "_swap_data_ptr_"):
        is_kept = _C._storage_Use_Count(storage._cdata) > 2  # by others than weight and loan
        storage._swap_data_ptr_(storage.clone() if is_kept else UntypedStorage(0))


_LOANS: weakref.WeakSet[Loan] = weakref.WeakSet()


def _refuse_in_a_child() -> None:
    """Refuse reads in a forked child: its mappings stay while the frames are reused."""
    for loan in list(_LOANS):
        if loan.refusal is None:
            loan.refusal = (
                f"weights of {loan.model!r} can only be read in the process that leased it, and "
                "this is a forked child of that process: create another Djinn here"
            )


os.register_at_fork(after_in_child=_refuse_in_a_child)


class LentTensor(Tensor):
    """A weight of a lent model, or a tensor that shares memory with one.

    Weights count as parameters (`isinstance(weight, nn.Parameter)`), by torch's convention for
    custom parameter types. A weight gets a new loan with each lease of its model. A tensor made
    from a weight keeps its loan, so it cannot be read in a later lease.

    Attributes:
        loan: whether the tensor can be read, and why not.
    """

    loan: Loan

    def __new__(cls, data: Any = None, requires_grad: bool = True) -> Tensor:  # type: ignore[misc]
        """Make a plain parameter; libraries call a parameter's type to make another one."""
        return nn.Parameter(data, requires_grad)

    @classmethod
    def at(cls, place: Place, source: nn.Parameter, loan: Loan) -> LentTensor:
        """Return a weight in the place of a parameter, with that parameter's attributes."""
        weight = Tensor._make_subclass(cls, place.view()[0], False)
        vars(weight).update(vars(source), loan=loan, _is_param=True)
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation of torch on lent tensors, if their loans allow it."""
        with DisableTorchFunctionSubclass():
            return _run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Copy to a plain tensor or parameter with its own memory."""
        if id(self) not in memo:
            memo[id(self)] = self._copy()
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle a plain copy."""
        return self._copy().__reduce_ex__(protocol)

    def _copy(self) -> Tensor:
        self.loan.ensure_open()
        with DisableTorchFunctionSubclass():
            copied = self.detach().clone()
            is_parameter = isinstance(self, nn.Parameter)
            return nn.Parameter(copied, self.requires_grad) if is_parameter else copied


def refuse_loading(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Raise `LeaseError` before `load_state_dict` writes to weights; a module hook.

    An error from a single parameter would reach the user as torch's `RuntimeError` instead.
    """
    for name, parameter in module._parameters.items():
        if isinstance(parameter, LentTensor) and prefix + name in state:
            raise _refused_write(module.load_state_dict, parameter)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation with lent arguments, if their loans allow it."""
    use = use_of(func)
    if use is Use.FORM:
        return func(*args, **kwargs)
    lent = _lent_among(args)
    if kwargs:
        lent += _lent_among(kwargs.values())
    for tensor in lent:
        tensor.loan.ensure_open()
    if use is not Use.READ or "out" in kwargs or "inplace" in kwargs:
        for tensor in _lent_among(written_arguments(func, args, kwargs)):
            if not _is_same(func, tensor, args):
                raise _refused_write(func, tensor)
            return None
        if func in _EXPORTS:
            return _EXPORTS[func](func, args, kwargs)
    return _marked(func(*args, **kwargs), lent)


def _lent_among(values: Iterable[Any]) -> list[LentTensor]:
    found: list[LentTensor] = []
    for value in values:
        if isinstance(value, LentTensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, LentTensor)]
    return found


def _marked(result: Any, lent: list[LentTensor]) -> Any:
    """Mark results that share memory with a lent tensor as lent."""
    if type(result) is Tensor:
        for tensor in lent:
            if _C._has_storage(result) and _C._is_alias_of(result, tensor):
                result.__class__ = LentTensor
                result.loan = tensor.loan  # type: ignore[attr-defined]
                break
    elif isinstance(result, (list, tuple)):
        for item in result:
            _marked(item, lent)
    return result


def _is_same(func: Any, tensor: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether this is `tensor.data = tensor`, as in a `module.to` without effect."""
    value = args[1] if func == _SET_DATA else None
    return (
        isinstance(value, Tensor)
        and (value.device, value.dtype, value.shape) == (tensor.device, tensor.dtype, tensor.shape)
        and value.data_ptr() == tensor.data_ptr()
    )


_SET_DATA = cast(Any, Tensor.data).__set__


def _refused_write(func: Any, tensor: Any) -> LeaseError:
    name = getattr(func, "__name__", str(func))
    return LeaseError(
        f"weights of {tensor.loan.model!r} cannot be written to ({name}), since all requests share "
        "them: copy the model first (copy.deepcopy(model)), and change the copy"
    )


def _from_a_copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Export a copy, because the receiver cannot learn when the loan ends."""
    exported = func(args[0].clone(), *args[1:], **kwargs)
    if hasattr(exported, "setflags"):
        exported.setflags(write=False)  # a write to the NumPy copy would silently be lost
    return exported


def _storage(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(args[0].loan.in_storage_to_hand_out(args[0]), *args[1:], **kwargs)


def _address(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    interface = func(*args, **kwargs)  # raises torch's own error for CPU tensors
    raise LeaseError(
        f"a weight of {args[0].loan.model!r} with shape {interface['shape']} cannot be handed to "
        "another library, which would not know when the lease ends: clone() it first"
    )


_EXPORTS: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    Tensor.numpy: _from_a_copy,
    Tensor.__array__: _from_a_copy,
    Tensor.__dlpack__: _from_a_copy,
    Tensor.untyped_storage: _storage,
    Tensor.storage: _storage,
    Tensor._typed_storage: _storage,
    cast(Any, Tensor.__cuda_array_interface__).__get__: _address,
}
