"""Lend a model to users: control when its weights can be read, and undo changes.

Users get a `Twin` of the module that serves requests. The twin is made for the first lease and
lives as long as the model. So a reference that a user has kept works again in the next lease.

A model can be lent before all its bytes are on the device. A model larger than the ring never has
them all on the device, because its layers share a window of frames. In both cases, a weight can be
read only while a unit that needs it runs. So forward passes work, and direct reads are refused.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from djinn_lib.engine.lending.guarded import Loan
from djinn_lib.engine.lending.twin import Changes, Twin
from djinn_lib.engine.models.hooks import Hook
from djinn_lib.engine.models.packing import Unit
from djinn_lib.errors import DjinnError, LeaseError

N_NAMED = 5  # changes listed in a message


class Lending:
    """Leases of one model to users.

    Args:
        name: of the model.
        module: the library's own module, bound to its addresses.
        units: of the module.
        addresses: the paged range.
        streamed: whether the model is larger than the ring.
        is_intact: whether the model's bytes on the device equal their master; may take as long as
            loading.
    """

    def __init__(
        self,
        name: str,
        module: PreTrainedModel,
        units: Sequence[Unit],
        addresses: range,
        streamed: bool,
        is_intact: Callable[[], bool],
    ) -> None:
        self._name, self._module, self._units = name, module, units
        self._addresses, self._streamed, self._is_intact = addresses, streamed, is_intact
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._closed = Loan(name, self._when_ended())
        self._twin: Twin | None = None
        self._n_leases = 0
        self._running: dict[str, tuple[int, Loan]] = {}  # per unit: running calls, and their loan
        self._is_stale = False

    @contextmanager
    def lend(self) -> Iterator[PreTrainedModel]:
        """Lend the model for a block; until `now_whole`, only for forward passes.

        The caller must hold a lease of the pager. Changes are undone at the end of the block, with
        a warning.

        Raises:
            LeaseError: weights were written to in a way that could not be refused beforehand.
            DjinnError: the architecture's modules cannot be copied.
        """
        twin = self._begin()
        try:
            yield twin.module
        except BaseException:
            self._end(warnings.warn)  # keep the user's error
            raise
        self._end(_raise)

    def now_whole(self) -> None:
        """Make all weights readable until the lease ends, once all bytes are loaded."""
        with self._lock:
            if self._twin and self._n_leases and not self._streamed:
                self._twin.lend(self._twin.paged)

    def take_stale(self) -> bool:
        """Return and reset whether bytes on the device differ from their master."""
        stale, self._is_stale = self._is_stale, False
        return stale

    def retire(self, why: str) -> None:
        """Refuse the weights for the reason `why` from now on; the model was removed."""
        with self._lock:
            self._closed.refusal = f"weights of {self._name!r} can no longer be read: {why}"
            self._twin = None

    def _begin(self) -> Twin:
        with self._lock:
            twin = self._twin = self._twin or self._make_twin()
            self._n_leases += 1
            if self._n_leases == 1:
                self._closed.refusal = self._when_partial()
                twin.lend(twin.in_host)
            return twin

    def _end(self, complain: Callable[[str], None]) -> None:
        """End a lease; `complain` is called with a message if weights were written to."""
        with self._lock:
            self._n_leases -= 1
            if self._n_leases or not self._twin or os.getpid() != self._process:
                return
            if self._module.device.type == "cuda":  # the user may have work on any stream
                torch.cuda.synchronize(self._module.device)
            self._closed.refusal = self._when_ended()
            self._running.clear()
            changes = self._twin.take_back_all()
            if changes.exposed and not changes.written and not self._is_intact():
                changes.written.append("through a storage")
            self._is_stale |= bool(changes.written)
        self._report(changes, complain)

    def _report(self, changes: Changes, complain: Callable[[str], None]) -> None:
        if changes.undone:
            warnings.warn(
                f"changes of {self._name!r} end with its lease and were undone "
                f"({_some(changes.undone)}): to keep them, change a copy (copy.deepcopy(model))",
                stacklevel=2,
            )
        if changes.damaged:
            complain(
                f"weights of {self._name!r} in host memory were written to "
                f"({_some(changes.damaged)}): remove the model and add it again"
            )
        elif changes.written:
            complain(
                f"weights of {self._name!r} were written to ({_some(changes.written)}): that is "
                "undone, and they will be loaded again; change a copy (copy.deepcopy(model))"
            )

    # -- refusals, and the twin's hooks ------------------------------------------------------

    def _when_ended(self) -> str:
        return (
            f"weights of {self._name!r} can only be read while it is leased: use the model inside "
            f"`with djinn.lease({self._name!r}) as model:`, and clone() what is needed later"
        )

    def _when_partial(self) -> str:
        if self._streamed:
            return (
                f"weights of {self._name!r} cannot be read directly, because it is larger than "
                "the ring and its layers share the same memory: call the model, or raise the "
                "capacity"
            )
        return (
            f"weights of {self._name!r} may not be loaded yet: call "
            f"djinn.wait({self._name!r}) before reading them directly"
        )

    def _make_twin(self) -> Twin:
        try:
            twin = Twin(self._name, self._module, self._addresses, self._closed)
        except Exception as error:  # of any kind: it comes from the architecture's own code
            raise DjinnError(
                f"{self._name!r} cannot be leased, since its modules cannot be copied "
                f"({type(error).__name__}: {error}): use generate()"
            ) from error
        twin.module.register_forward_pre_hook(Hook(self._ensure_leased), prepend=True)
        for unit in self._units:
            module = twin.module.get_submodule(unit.module)
            module.register_forward_pre_hook(Hook(self._ensure_leased), prepend=True)
            module.register_forward_pre_hook(
                Hook(self._begin_unit, unit.module, sorted(unit.parameters))
            )
            if self._streamed:
                module.register_forward_hook(Hook(self._end_unit, unit.module), always_call=True)
        twin.seal()
        return twin

    def _ensure_leased(self) -> None:
        if os.getpid() != self._process:
            raise LeaseError(
                f"{self._name!r} can only be used in the process that leased it, and this is a "
                "forked child of that process: create another Djinn here"
            )
        if not self._n_leases:
            raise LeaseError(str(self._closed.refusal))

    def _begin_unit(self, unit: str, names: Sequence[str]) -> None:
        """Lend a unit's weights; an earlier hook has waited for their bytes."""
        with self._lock:
            if not self._twin:
                return
            if unit in self._running:
                n_running, loan = self._running[unit]
                self._running[unit] = n_running + 1, loan
            elif (loan := self._twin.lend(names)) and self._streamed:
                self._running[unit] = 1, loan

    def _end_unit(self, unit: str) -> None:
        with self._lock:
            if unit not in self._running or not self._twin:
                return
            n_running, loan = self._running.pop(unit)
            if n_running > 1:
                self._running[unit] = n_running - 1, loan
            else:
                self._twin.take_back(loan)


def _raise(message: str) -> None:
    raise LeaseError(message)


def _some(names: Sequence[str]) -> str:
    """List the first names for a message."""
    more = f" and {len(names) - N_NAMED} more" if len(names) > N_NAMED else ""
    return ", ".join(names[:N_NAMED]) + more
