"""The copy of a model that users get: modules and buffers of its own, over the same weights.

What a user does to it (adapters, hooks, other parameters, training mode) never reaches the module
that requests are computed with, and is undone when it is taken back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from djinn_lib.engine.lending.guarded import LentTensor, Loan, refuse_loading
from djinn_lib.engine.lending.pristine import Pristine
from djinn_lib.engine.models.place import Place


@dataclass
class Changes:
    """What was done to a twin while it was lent.

    Attributes:
        undone: names of what was replaced or added, and is as it was again.
        written: names of weights whose bytes were changed on the device.
        damaged: names of weights whose bytes were changed in their master copy.
        exposed: whether weights on the device can have been changed unnoticed.
    """

    undone: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    exposed: bool = False


class Twin:
    """A module like `original`, whose parameters are guarded and can be read while they are lent.

    It has the hooks and the generation configuration of the original.

    Args:
        name: of the model.
        original: what the library computes with, bound to its addresses.
        addresses: those that are paged; parameters elsewhere are read where their master is.
        closed: the loan of parameters that are not lent; says why they cannot be read.

    Attributes:
        module: the twin itself.
        paged, in_host: names of its parameters.
    """

    def __init__(
        self, name: str, original: PreTrainedModel, addresses: range, closed: Loan
    ) -> None:
        self._name, self._closed = name, closed
        sources = dict(original.named_parameters())
        self._places = {name: Place.of(source) for name, source in sources.items()}
        with torch.inference_mode(False):  # a user may be in it, and parameters are not made for it
            self._weights = {
                name: LentTensor.at(self._places[name], source, closed)
                for name, source in sources.items()
            }
            weight_of = {id(source): self._weights[name] for name, source in sources.items()}
            self.module = _copy_of(original, weight_of)
        self.paged = [name for name, at in self._places.items() if at.address in addresses]
        self.in_host = [name for name, at in self._places.items() if at.address not in addresses]
        self._loans: set[Loan] = set()
        self._changes = Changes()
        self._pristine: Pristine | None = None

    def seal(self) -> None:
        """Take note of how it is now, which is how it will be after each lease."""
        for module in self.module.modules():
            if module._parameters:
                module.register_load_state_dict_pre_hook(refuse_loading)
        self._pristine = Pristine(self.module)

    # -- loans -----------------------------------------------------------------------------

    def lend(self, names: Iterable[str]) -> Loan | None:
        """Let weights be read whose bytes are there; None if that was so already.

        Args:
            names: all of `paged` or all of `in_host`.
        """
        closed = [name for name in names if self._weights[name].loan.refusal is not None]
        if not closed:
            return None
        loan = Loan(self._name, replaceable=closed[0] not in self.in_host)
        with torch.inference_mode(False):
            for name in closed:
                loan.lend(name, self._weights[name], self._places[name])
        self._loans.add(loan)
        return loan

    def take_back(self, loan: Loan) -> None:
        """End a loan."""
        self._loans.discard(loan)
        changes, (written, replaced) = self._changes, loan.close(self._closed)
        changes.undone += replaced
        (changes.written if loan.replaceable else changes.damaged).extend(written)
        changes.exposed |= loan.exposed

    def take_back_all(self) -> Changes:
        """End the loans that are left, and restore the twin; returns what was done to it."""
        for loan in list(self._loans):
            self.take_back(loan)
        changes, self._changes = self._changes, Changes()
        if self._pristine:
            changes.undone += self._pristine.restore()
        return changes


def _copy_of(original: PreTrainedModel, weights: Mapping[int, LentTensor]) -> PreTrainedModel:
    """Copy modules and buffers; hooks and the generation configuration stay the same objects.

    Args:
        original: what is copied.
        weights: the parameters of the copy, by the `id` of those of the original.
    """
    kept: list[Any] = [original.generation_config]
    for module in original.modules():
        kept += [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return copy.deepcopy(original, {id(item): item for item in kept} | dict(weights))
