"""The copy of a model for users: its own modules and buffers, the same weights.

User changes (adapters, hooks, other parameters, training mode) never reach the module that serves
requests. They are undone when the lease ends.
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
    """The user's changes to a twin while it was lent.

    Attributes:
        undone: names of what was replaced or added, and has been restored.
        written: names of weights whose bytes were changed on the device.
        damaged: names of weights whose bytes were changed in their master copy.
        exposed: whether weights on the device may have been changed unnoticed.
    """

    undone: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    exposed: bool = False


class Twin:
    """A copy of `original` with guarded parameters, readable only while lent.

    It shares the hooks and the generation configuration of the original.

    Args:
        name: of the model.
        original: the library's own module, bound to its addresses.
        addresses: the paged range; parameters outside it are read directly from their master.
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
        with torch.inference_mode(False):  # parameters cannot be made in the user's inference mode
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
        """Record the current state, which is restored after each lease."""
        for module in self.module.modules():
            if module._parameters:
                module.register_load_state_dict_pre_hook(refuse_loading)
        self._pristine = Pristine(self.module)

    # -- loans -----------------------------------------------------------------------------

    def lend(self, names: Iterable[str]) -> Loan | None:
        """Lend weights whose bytes are mapped; None if they are lent already.

        Args:
            names: all of `paged`, all of `in_host`, or the paged weights of one unit.
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
        """End all remaining loans, restore the twin, and return what was changed."""
        for loan in list(self._loans):
            self.take_back(loan)
        changes, self._changes = self._changes, Changes()
        if self._pristine:
            changes.undone += self._pristine.restore()
        return changes


def _copy_of(original: PreTrainedModel, weights: Mapping[int, LentTensor]) -> PreTrainedModel:
    """Copy modules and buffers, but share hooks and the generation configuration.

    Args:
        original: the module to copy.
        weights: the copy's parameters, by the `id` of the original's.
    """
    kept: list[Any] = [original.generation_config]
    for module in original.modules():
        kept += [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return copy.deepcopy(original, {id(item): item for item in kept} | dict(weights))
