"""The PyTorch baselines: whole models moved with plain tensor copies.

All keep a host copy of every model and give its parameters device storage for a request. They
differ in where weights are (`PlainWeights`, `PageableWeights`, `StableWeights`), in what happens to
the device copy afterwards, and in whether some models may stay.

On the CPU "device" storage is a second allocation in the same memory: the copies and their bytes
are real, but pinning is not (there is nothing to pin for), so that rows carry a note.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from djinn_lib.engine.decode.eager import Tokens, generate_eager
from djinn_lib.engine.decode.modes import parse_decode
from djinn_lib.systems.base import ModelFiles, Served, SystemUnderTest, load_ordinarily
from djinn_lib.systems.stable_weights import StableWeights


class PlainWeights:
    """Masters in pinned host memory; a load allocates device storage, and a drop frees it."""

    pins = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host: dict[str, PreTrainedModel] = {}
        self.masters: dict[str, list[torch.Tensor]] = {}

    def add(self, files: ModelFiles) -> None:
        """Read a model into its masters, pinned where that means something."""
        model = self.host[files.name] = load_ordinarily(files)
        pin = self.pins and self.device.type == "cuda"
        self.masters[files.name] = [
            p.data.pin_memory() if pin else p.data for p in model.parameters()
        ]
        self.drop(files.name)

    def load(self, name: str) -> None:
        """Give every parameter device storage, and start to fill it."""
        for parameter, master in zip(self.host[name].parameters(), self.masters[name], strict=True):
            device_copy = torch.empty_like(master, device=self.device)
            parameter.data = device_copy.copy_(master, non_blocking=True)
        self._move_buffers(name)

    def write_back(self, name: str) -> None:
        """Start to copy every parameter to its master."""
        for parameter, master in zip(self.host[name].parameters(), self.masters[name], strict=True):
            master.copy_(parameter.data, non_blocking=True)

    def drop(self, name: str) -> None:
        """Free the device storage of a model, if it has any."""
        for parameter, master in zip(self.host[name].parameters(), self.masters[name], strict=True):
            parameter.data = master
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _move_buffers(self, name: str) -> None:
        for module in self.host[name].modules():
            for buffer_name, buffer in module.named_buffers(recurse=False):
                setattr(module, buffer_name, buffer.to(self.device))

    def generate(self, name: str, prompt_ids: Sequence[int], max_new_tokens: int) -> Tokens:
        """Decode with transformers' own `generate`."""
        return generate_eager(self.host[name], prompt_ids, max_new_tokens, ignore_eos=True)

    def close(self) -> None:
        """Drop all tensors."""
        self.host, self.masters = {}, {}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class PageableWeights(PlainWeights):
    """`model.to(device)` and `model.to("cpu")`: ordinary host memory, new every time."""

    pins = False

    def load(self, name: str) -> None:
        """Move the module as `Module.to` does; on the CPU a copy stands for the transfer."""
        self._move_parameters(name, self.device)
        self._move_buffers(name)

    def write_back(self, name: str) -> None:
        """Move the module back into fresh host memory, which becomes the master."""
        self._move_parameters(name, torch.device("cpu"))
        self.masters[name] = [parameter.data for parameter in self.host[name].parameters()]

    def _move_parameters(self, name: str, device: torch.device) -> None:
        # Not with Module.to itself: it visits tied parameters twice, and would copy them twice.
        for parameter in self.host[name].parameters():
            parameter.data = parameter.data.to(device, copy=self.device.type == "cpu")


class _PyTorchSystem(SystemUnderTest):
    """Loads the requested model, generates, then does with it what the subclass says.

    Options:
        decode: decode as Djinn does ("eager", "graph" or "compiled"), with the weights in a
            `StableWeights`; default is transformers' own `generate`, with plain tensors.
    """

    option_names = frozenset({"decode"})
    plain: ClassVar[type[PlainWeights]] = PlainWeights

    def notes(self) -> list[str]:
        """Say what the CPU cannot show."""
        note = "no CUDA: pinning is a no-op, host and device memory are the same"
        return [note] if self.device.type == "cpu" else []

    def start(self, progress: Callable[[str], None] = lambda step: None) -> None:
        """Read every model into host memory."""
        self.weights: PlainWeights | StableWeights
        if decode := self.options.get("decode"):
            self.weights = StableWeights(
                self.device, parse_decode(str(decode)), self.most_bytes, len(self.models), progress
            )
        else:
            self.weights = self.plain(self.device)
        for name, files in self.models.items():
            progress(f"reading {name} into host memory")
            self.weights.add(files)

    @property
    def most_bytes(self) -> int:
        """Device memory for weights that it needs at most: for one model."""
        return max(files.n_bytes for files in self.models.values())

    def decoding(self) -> dict[str, dict[str, Any]]:
        """How Djinn's decoders decode, if they are used."""
        return self.weights.decoding() if isinstance(self.weights, StableWeights) else {}

    @contextmanager
    def undone_if_it_fails(self, name: str) -> Iterator[None]:
        """Leave nothing of the model on the device when the block raises, half a load included."""
        try:
            yield
        except BaseException:
            self.weights.drop(name)
            raise

    def close(self) -> None:
        """Drop all tensors."""
        if hasattr(self, "weights"):
            self.weights.close()


class PyTorchPinned(_PyTorchSystem):
    """The seed's baseline: load all from pinned memory, generate, copy all back, free."""

    writes_back = True

    def serve(self, model: str, prompt_ids: Sequence[int], max_new_tokens: int) -> Served:
        """Load, generate, offload."""
        self.known(model)
        begin_s = self.clock_s()
        with self.undone_if_it_fails(model):
            self.weights.load(model)
            loaded_s = self.clock_s()
            tokens = self.weights.generate(model, prompt_ids, max_new_tokens)
        done_s = self.clock_s()
        if self.writes_back:
            self.weights.write_back(model)
            self.synchronize()
        self.weights.drop(model)
        end_s = self.clock_s()
        times_s = loaded_s - begin_s, end_s - begin_s, end_s - done_s
        written_back = [model] if self.writes_back else []
        return self.served(model, tokens, *times_s, evicted=[model], written_back=written_back)


class PyTorchPinnedReadonly(PyTorchPinned):
    """The same without the copy back, since weights never change: the best simple baseline."""

    writes_back = False


class PyTorchPageable(PyTorchPinned):
    """The same with pageable host memory.

    Options: none, for its weights are new tensors after every request.
    """

    option_names = frozenset()
    plain = PageableWeights


class PyTorchLRU(_PyTorchSystem):
    """Whole models stay on the device while they fit the capacity; least recently used go."""

    def start(self, progress: Callable[[str], None] = lambda step: None) -> None:
        """Read every model; none is on the device yet."""
        self.resident: list[str] = []  # least recently used first
        super().start(progress)

    @property
    def most_bytes(self) -> int:
        """All of the capacity, or the largest model to record its decoder."""
        return max(self.capacity_bytes, super().most_bytes)

    def serve(self, model: str, prompt_ids: Sequence[int], max_new_tokens: int) -> Served:
        """Evict until the model fits, load it unless it is there, generate."""
        self.known(model)
        begin_s = self.clock_s()
        found, victims = model in self.resident, []
        if found:
            self.resident.remove(model)
        else:
            victims = self.victims(model, self.resident)
            for victim in victims:
                self.resident.remove(victim)
                self.weights.drop(victim)
            with self.undone_if_it_fails(model):
                self.weights.load(model)
        self.resident.append(model)
        loaded_s = self.clock_s()
        tokens = self.weights.generate(model, prompt_ids, max_new_tokens)
        times_s = loaded_s - begin_s, self.clock_s() - begin_s
        return self.served(
            model, tokens, *times_s, found=found, evicted=victims, resident=self.resident
        )

    def resize(self, capacity_bytes: int) -> None:
        """Go on with another capacity and no model.

        Raises:
            CapacityError: a model is larger.
        """
        super().resize(capacity_bytes)
        for name in self.models:
            self.victims(name, ())

    def reset(self) -> None:
        """Drop every model."""
        while self.resident:
            self.weights.drop(self.resident.pop())
