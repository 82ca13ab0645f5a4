"""Run a model on shapes alone, to find which tables it reads and how far.

Weights are tensors without data (the meta device), so a model of any size runs at once and without
memory. Everything that does not depend on weights is computed: positions, masks, rotary
frequencies. So indices into tables are known and can be compared with the size of the table. On
shapes only they would be unknown. On a GPU an index beyond a table makes the CUDA context unusable.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from djinn_lib.engine.decode.cuda_graphs import reads_on_host

LARGEST = 1 << 22  # elements of a tensor to compute; a larger one remains a shape
MOST_OPERATORS = 200_000  # limit for models that run a loop over tokens

_aten = torch.ops.aten
_EMPTY_FACTORIES = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}


class OutsideTable(IndexError):
    """An index beyond the end of the table that it looks up."""


class ShapesOnly(TorchDispatchMode):
    """Run operators on tensors without data as shapes, and all others on the CPU.

    Attributes:
        reads: for each lookup, the size of the table and the largest index into it.
        cuts: for each slice, the size before and after.

    Raises:
        OutsideTable: inside, when an index is beyond its table.
        RecursionError: inside, after `MOST_OPERATORS`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: set[tuple[int, int]] = set()
        self.cuts: set[tuple[int, int]] = set()
        self._n_operators = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self._n_operators += 1
        if self._n_operators > MOST_OPERATORS:
            raise RecursionError(f"more than {MOST_OPERATORS} operators in one forward pass")
        self._note_lookups(func, args)
        result = self._run(func, args, kwargs or {})
        if func is _aten.slice.Tensor:
            whole, dim = args[0], args[1] if len(args) > 1 else 0
            self.cuts.add((whole.shape[dim], result.shape[dim]))
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        # The host needs values that are unknown: compute with zeros, keep integers as answers.
        if reads_on_host(func, args) and any(t.is_meta for t in tensors):
            known = _on("cpu", func, *tree_map(_zeros_for, (args, kwargs)))
            return tree_map(lambda x: _shape_of(x) if _is_float(x) else x, known)
        if func in _EMPTY_FACTORIES or any(t.is_meta for t in tensors):
            return _on("meta", func, args, kwargs)
        try:
            shaped = _on("meta", func, args, kwargs)
        except (RuntimeError, NotImplementedError):  # depends on values, which are known here
            return _on("cpu", func, args, kwargs)
        sizes = [t.numel() for t in tree_leaves(shaped) if isinstance(t, torch.Tensor)]
        return shaped if max(sizes, default=0) > LARGEST else _on("cpu", func, args, kwargs)

    def _note_lookups(self, func: Any, args: tuple[Any, ...]) -> None:
        for size, index in _lookups(func, args):
            if not index.is_meta and index.numel():
                largest = int(index.max())
                self.reads.add((size, largest))
                if largest >= size:
                    raise OutsideTable(f"index {largest} into a table of {size}")


def _lookups(func: Any, args: tuple[Any, ...]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the size of each looked-up dimension, and its indices (of any shape)."""
    if func is _aten.embedding.default:
        yield args[0].shape[0], args[1]
    elif func in (_aten.index_select.default, _aten.gather.default):
        yield args[0].shape[args[1]], args[2]
    elif func is _aten.index.Tensor:
        yield from (
            (args[0].shape[dim], index)
            for dim, index in enumerate(args[1])
            if index is not None and index.dtype not in (torch.bool, torch.uint8)
        )


def _on(device: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an operator with its inputs and outputs on one device."""
    if device == "meta":
        args, kwargs = tree_map(_shape_of, (args, kwargs))
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    makes = not any(isinstance(a, torch.Tensor) for a in tree_leaves((args, kwargs)))
    if makes or "device" in kwargs:
        kwargs["device"] = torch.device(device)
    return func(*args, **kwargs)


def _zeros_for(value: Any) -> Any:
    """Replace an unknown tensor by zeros, which may select experts, say."""
    unknown = isinstance(value, torch.Tensor) and value.is_meta
    return torch.zeros(value.shape, dtype=value.dtype) if unknown else value


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _shape_of(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def on_shapes(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model in bfloat16, whose weights have no data.

    It uses the model's class directly, because a lookup would ask to trust its code again. It uses
    bfloat16, because every operator of a mixture of experts supports shapes of that dtype.

    Raises:
        Exception: an error of its own code.
    """
    with ShapesOnly(), torch.device("meta"), torch.no_grad():
        twin = type(model)(copy.deepcopy(model.config))
        return twin.bfloat16().eval()


def run_on_shapes(twin: PreTrainedModel, n_tokens: int) -> tuple[ShapesOnly, Exception | None]:
    """Run a prompt of `n_tokens` through a model from `on_shapes`.

    Returns:
        The mode, with the reads and cuts until the end or the error, and the error.
    """
    mode = ShapesOnly()
    padding = getattr(twin.config.get_text_config(), "pad_token_id", None)
    token = 1 if padding == 0 else 0  # the lowest id that is not padding
    try:
        with mode, torch.no_grad():
            twin(input_ids=torch.full((1, n_tokens), token), use_cache=False)
    except Exception as error:  # the architecture's own code may raise anything
        return mode, error
    return mode, None
