"""The PyTorch baselines: whole models moved with plain tensor copies.

All keep a host copy of every model and give its parameters device storage for a request. They
differ in the kind of host memory, in what happens to the device copy afterwards, and in whether
some models may stay.

On the CPU "device" storage is a second allocation in the same memory: the copies and their bytes
are real, but pinning is not (there is nothing to pin for), so that rows carry a note.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from djinn_lib.engine.decode.eager import Tokens, generate_eager
from djinn_lib.engine.decode.modes import parse_decode
from djinn_lib.errors import CapacityError
from djinn_lib.systems.base import Served, SystemUnderTest, load_ordinarily
from djinn_lib.systems.stable_weights import StableWeights


class _PyTorchSystem(SystemUnderTest):
    """Loads the requested model, generates, then does with it what the subclass says.

    Options:
        decode: decode as Djinn does ("eager", "graph" or "compiled"), with the weights in a
            `StableWeights`; default is transformers' own `generate`, with plain tensors.
    """

    option_names = frozenset({"decode"})
    pins = True

    def notes(self) -> list[str]:
        """Say what the CPU cannot show."""
        note = "no CUDA: pinning is a no-op, host and device memory are the same"
        return [note] if self.device.type == "cpu" else []

    def start(self, progress: Callable[[str], None] = lambda step: None) -> None:
        """Read every model into host memory, pinned where that means something."""
        self.host: dict[str, PreTrainedModel] = {}
        self.masters: dict[str, list[torch.Tensor]] = {}
        self.stable: StableWeights | None = None
        if decode := self.options.get("decode"):
            self.stable = StableWeights(
                self.device, parse_decode(str(decode)), self.most_bytes, len(self.models), progress
            )
            for name, files in self.models.items():
                progress(f"reading {name} into host memory")
                self.stable.add(files)
            return
        for name, files in self.models.items():
            progress(f"reading {name} into host memory")
            model = self.host[name] = load_ordinarily(files)
            pin = self.pins and self.device.type == "cuda"
            self.masters[name] = [
                p.data.pin_memory() if pin else p.data for p in model.parameters()
            ]
            for parameter, master in zip(model.parameters(), self.masters[name], strict=True):
                parameter.data = master

    @property
    def most_bytes(self) -> int:
        """Device memory for weights that it needs at most: for one model."""
        return max(files.n_bytes for files in self.models.values())

    def load(self, name: str) -> int:
        """Give every parameter device storage and fill it; returns the bytes copied."""
        if self.stable:
            self.stable.load(name)
            return self.models[name].n_bytes
        model = self.host[name]
        for parameter, master in zip(model.parameters(), self.masters[name], strict=True):
            device_copy = torch.empty_like(master, device=self.device)
            parameter.data = device_copy.copy_(master, non_blocking=self.pins)
        self._move_buffers(model)
        return self.models[name].n_bytes

    def write_back(self, name: str) -> int:
        """Copy every parameter to its master; returns the bytes copied."""
        if self.stable:
            self.stable.write_back(name)
        else:
            pairs = zip(self.host[name].parameters(), self.masters[name], strict=True)
            for parameter, master in pairs:
                master.copy_(parameter.data, non_blocking=self.pins)
        self.synchronize()
        return self.models[name].n_bytes

    def drop(self, name: str) -> int:
        """Free the device storage; returns its size in bytes."""
        if self.stable:
            self.stable.drop(name)
            return self.models[name].n_bytes
        model = self.host[name]
        for parameter, master in zip(model.parameters(), self.masters[name], strict=True):
            parameter.data = master
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self.models[name].n_bytes

    @contextmanager
    def undone_if_it_fails(self, name: str) -> Iterator[None]:
        """Leave nothing of the model on the device when the block raises, half a load included."""
        try:
            yield
        except BaseException:
            self.drop(name)
            raise

    def _move_buffers(self, model: PreTrainedModel) -> None:
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))

    def generate(self, name: str, prompt_ids: Sequence[int], max_new_tokens: int) -> Tokens:
        """Decode with transformers' own `generate`, or as `decode` says."""
        if self.stable:
            return self.stable.generate(name, prompt_ids, max_new_tokens)
        return generate_eager(self.host[name], prompt_ids, max_new_tokens, ignore_eos=True)

    def close(self) -> None:
        """Drop all tensors."""
        self.host, self.masters = {}, {}
        if stable := getattr(self, "stable", None):
            self.stable = None
            stable.close()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class PyTorchPinned(_PyTorchSystem):
    """The seed's baseline: load all from pinned memory, generate, copy all back, free."""

    writes_back = True

    def serve(self, model: str, prompt_ids: Sequence[int], max_new_tokens: int) -> Served:
        """Load, generate, offload."""
        self.known(model)
        begin_s = self.clock_s()
        with self.undone_if_it_fails(model):
            loaded_bytes = self.load(model)
            loaded_s = self.clock_s()
            tokens = self.generate(model, prompt_ids, max_new_tokens)
        done_s = self.clock_s()
        writeback_bytes = self.write_back(model) if self.writes_back else 0
        evicted_bytes = self.drop(model)
        end_s = self.clock_s()
        return Served(
            tokens.token_ids,
            switch_ms=(loaded_s - begin_s + end_s - done_s) * 1e3,
            ttft_ms=(loaded_s - begin_s + tokens.first_s) * 1e3,
            decode_ms=(tokens.last_s - tokens.first_s) * 1e3,
            total_ms=(end_s - begin_s) * 1e3,
            loaded_bytes=loaded_bytes,
            evicted_bytes=evicted_bytes,
            writeback_bytes=writeback_bytes,
            resident_bytes=dict.fromkeys(self.models, 0),
        )


class PyTorchPinnedReadonly(PyTorchPinned):
    """The same without the copy back, since weights never change: the best simple baseline."""

    writes_back = False


class PyTorchPageable(PyTorchPinned):
    """`model.to(device)` and `model.to("cpu")`: ordinary host memory, new every time.

    Options: none, for its weights are new tensors after every request.
    """

    option_names = frozenset()
    pins = False

    def load(self, name: str) -> int:
        """Move the module as `Module.to` does; on the CPU a copy stands for the transfer."""
        model = self.host[name]
        self._move_parameters(model, self.device)
        self._move_buffers(model)
        return self.models[name].n_bytes

    def _move_parameters(self, model: PreTrainedModel, device: torch.device) -> None:
        # Not with Module.to itself: it visits tied parameters twice, and would copy them twice.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(device, copy=self.device.type == "cpu")

    def write_back(self, name: str) -> int:
        """Move the module back into fresh host memory, which becomes the master."""
        model = self.host[name]
        self._move_parameters(model, torch.device("cpu"))
        self.masters[name] = [parameter.data for parameter in model.parameters()]
        return self.models[name].n_bytes


class PyTorchLRU(_PyTorchSystem):
    """Whole models stay on the device while they fit the capacity; least recently used go."""

    def start(self, progress: Callable[[str], None] = lambda step: None) -> None:
        """Read every model; none is on the device yet."""
        self.resident: OrderedDict[str, int] = OrderedDict()
        super().start(progress)

    @property
    def most_bytes(self) -> int:
        """All of the capacity, or the largest model to record its decoder."""
        return max(self.capacity_bytes, super().most_bytes)

    def serve(self, model: str, prompt_ids: Sequence[int], max_new_tokens: int) -> Served:
        """Evict until the model fits, load it unless it is there, generate."""
        self.known(model)
        begin_s = self.clock_s()
        resident_before_bytes = self.resident.get(model, 0)
        evicted_bytes = 0 if resident_before_bytes else self._make_room(model)
        with self.undone_if_it_fails(model):
            loaded_bytes = 0 if resident_before_bytes else self.load(model)
        self.resident[model] = self.models[model].n_bytes
        self.resident.move_to_end(model)
        loaded_s = self.clock_s()
        tokens = self.generate(model, prompt_ids, max_new_tokens)
        return Served(
            tokens.token_ids,
            switch_ms=(loaded_s - begin_s) * 1e3,
            ttft_ms=(loaded_s - begin_s + tokens.first_s) * 1e3,
            decode_ms=(tokens.last_s - tokens.first_s) * 1e3,
            total_ms=(self.clock_s() - begin_s) * 1e3,
            loaded_bytes=loaded_bytes,
            evicted_bytes=evicted_bytes,
            resident_before_bytes=resident_before_bytes,
            resident_bytes={name: self.resident.get(name, 0) for name in self.models},
        )

    def reset(self) -> None:
        """Drop every model."""
        for name in self.resident:
            self.drop(name)
        self.resident.clear()

    def _make_room(self, model: str) -> int:
        n_bytes, evicted_bytes = self.models[model].n_bytes, 0
        if n_bytes > self.capacity_bytes:
            raise CapacityError(
                f"expected a model of at most {self.capacity_bytes} bytes, got {model!r} with "
                f"{n_bytes}: raise the capacity"
            )
        while sum(self.resident.values()) + n_bytes > self.capacity_bytes:
            victim, _ = self.resident.popitem(last=False)
            evicted_bytes += self.drop(victim)
        return evicted_bytes
