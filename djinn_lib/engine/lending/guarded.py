"""Weights as users get them: readable while they are lent, and refused in words at all other times.

Pages come and go under a weight's addresses. Reading an unmapped page ends the process (SIGSEGV),
or on a GPU all its use of the device; writing one would change what later requests compute. So
users never get the tensors that the library computes with. They get others of the same bytes,
of the type `LentTensor`: torch hands every operation on those to `__torch_function__`, which looks
at the `Loan` first. What an operation returns is such a tensor again if it shares the memory; what
leaves torch (NumPy, DLPack) is a copy.

Some reads bypass Python: the backward pass of a graph that was made while the weights were lent, a
storage that was kept, a tensor that was given the memory of a weight (`tensor.data = weight`). For
those each loan has storages of its own. When it ends, saved tensors are marked as changed, and the
storages lose their memory (see `_end_storage`).
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
    """The right to read some weights of a model, shared by all tensors over their memory.

    Args:
        model: its name.
        refusal: why the weights cannot be read; None while they can.
        replaceable: whether damage can be undone, since the memory holds a copy of a master.

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
            weight: not lent at present, whose bytes are there.
            place: of the weight.
        """
        view, storage = place.view()
        with DisableTorchFunctionSubclass():
            weight.data = view
            self._lent[name] = weight, storage, weight._version
        weight.loan = self

    def close(self, successor: Loan) -> tuple[list[str], list[str]]:
        """End the loan; `successor`, closed as well, is that of the weights from now on.

        Returns:
            Names of weights that were written to, and of those that were replaced.
        """
        self.refusal = (
            f"a tensor that shares memory with weights of {self.model!r} outlived the lease or the "
            "forward pass that it was made in: clone() it there, or make it again in a new lease"
        )
        written, replaced = [], []
        with DisableTorchFunctionSubclass():
            for name, (weight, storage, version) in self._lent.items():
                if type(weight) is not LentTensor:  # torch can swap one tensor for another
                    replaced.append(name)
                    weight.__class__, weight._is_param = LentTensor, True
                elif weight._version != version:
                    written.append(name)
                weight.requires_grad_(False)
                weight.grad, weight.loan = None, successor
                _end_storage(storage, self.refusal)
            # What a graph keeps for its backward pass is not to be read there.
            torch.autograd.graph.increment_version([lent[0] for lent in self._lent.values()])
        self._lent.clear()
        self._copies.clear()
        return written, replaced

    def in_storage_to_hand_out(self, tensor: Tensor) -> Tensor:
        """Return a tensor like `tensor` whose storage a user may have.

        Writes through it go unnoticed: a master itself is copied, once a loan; what can be loaded
        again is handed out, and is compared with its master afterwards.
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
    """Take the memory away from whatever still refers to a lent storage.

    Builds of torch with CUDA can have it refused, with a message. In those without, from 2.12 on, a
    storage can get other memory: a copy, where other tensors than the weight refer to it.
    """
    if hasattr(_C, "_set_storage_data_ptr_access_error_msg"):
        _C._set_storage_data_ptr_access_error_msg(storage._cdata, message)
    elif hasattr(storage, "_swap_data_ptr_"):
        is_kept = _C._storage_Use_Count(storage._cdata) > 2  # by more than the weight and us
        storage._swap_data_ptr_(storage.clone() if is_kept else UntypedStorage(0))


_LOANS: weakref.WeakSet[Loan] = weakref.WeakSet()


def _refuse_in_a_child() -> None:
    """A child process sees pages as they were when it began, whatever they hold later."""
    for loan in list(_LOANS):
        if loan.refusal is None:
            loan.refusal = (
                f"weights of {loan.model!r} can only be read in the process that leased it, and "
                "this is a forked child of that process: make a Djinn of its own here"
            )


os.register_at_fork(after_in_child=_refuse_in_a_child)


class LentTensor(Tensor):
    """A weight of a lent model, or a tensor that shares memory with one.

    Weights are parameters to torch (`isinstance(weight, nn.Parameter)`), by its convention for
    parameters of other types. Their loans change, with each lease of the model; that of a tensor
    made from one stays what it was, so that it cannot be read in a later lease.

    Attributes:
        loan: whether the tensor can be read, and why not.
    """

    loan: Loan

    def __new__(cls, data: Any = None, requires_grad: bool = True) -> Tensor:  # type: ignore[misc]
        """Libraries call the type of a parameter to make another: a plain one, then."""
        return nn.Parameter(data, requires_grad)

    @classmethod
    def at(cls, place: Place, source: nn.Parameter, loan: Loan) -> LentTensor:
        """Return a weight in the place of a parameter, with that one's attributes."""
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
        """A copy has memory of its own, and is a plain tensor or parameter."""
        if id(self) not in memo:
            memo[id(self)] = self._copy()
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle such a copy."""
        return self._copy().__reduce_ex__(protocol)

    def _copy(self) -> Tensor:
        self.loan.ensure_open()
        with DisableTorchFunctionSubclass():
            copied = self.detach().clone()
            is_parameter = isinstance(self, nn.Parameter)
            return nn.Parameter(copied, self.requires_grad) if is_parameter else copied


def refuse_loading(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """As a hook of `module`, have `load_state_dict` raise `LeaseError` before it writes to weights.

    torch would make a `RuntimeError` of what a single parameter raises.
    """
    for name, parameter in module._parameters.items():
        if isinstance(parameter, LentTensor) and prefix + name in state:
            raise _refused_write(module.load_state_dict, parameter)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation with lent tensors among its arguments, if their loans allow it."""
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
    """Have what shares memory with a lent tensor be lent as well."""
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
    """Whether this is `tensor.data = tensor`, which `module.to(...)` ends in if nothing changes."""
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
    """Export a copy: nobody could tell the other side that the loan has ended."""
    exported = func(args[0].clone(), *args[1:], **kwargs)
    if hasattr(exported, "setflags"):
        exported.setflags(write=False)  # of NumPy: whoever writes is to know that it is in vain
    return exported


def _storage(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(args[0].loan.in_storage_to_hand_out(args[0]), *args[1:], **kwargs)


def _address(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    interface = func(*args, **kwargs)  # raises what it does for tensors of the CPU
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
