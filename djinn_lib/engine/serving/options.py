"""How a `Djinn` serves its models: all its parameters, checked and resolved once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import Signature, signature
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import torch

from djinn_lib.arguments import flag, whole_number
from djinn_lib.engine.decode.modes import Decode, default_decode, parse_decode
from djinn_lib.engine.decode.sampling import MOST_TOKENS
from djinn_lib.engine.device import DEFAULT_PAGE_BYTES, parse_device
from djinn_lib.engine.memory.opening import MastersForm, choose_masters
from djinn_lib.engine.memory.policies import Lookahead, Policy, make_policy, sparing_what_waits
from djinn_lib.engine.memory.ring import Eviction
from djinn_lib.engine.models.packing import Embeddings, choose_embeddings
from djinn_lib.engine.serving.progress import Show, check_show
from djinn_lib.engine.serving.queue import Order, RequestQueue
from djinn_lib.errors import ConfigError, did_you_mean
from djinn_lib.units import parse_bytes

MIN_MODEL_LEN = 8


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The parameters of a `Djinn`.

    Args:
        capacity: device memory for weights, in bytes or as text ("25GiB").
        device: "cuda", or "cpu" (Linux); default is a GPU where there is one.
        page: size of a page; default 64 MiB on a GPU, 1 MiB on the CPU.
        policy: who loses pages when the ring is full: "lru", or a `Policy`.
        eviction: "pages" evicts only what is needed; "models" evicts entire models.
        overlap: start computing while later layers still load; else wait for all of them first.
        decode: "eager" is transformers' own `generate`; "graph" records the same kernels once a
            model as CUDA graphs (on the CPU it runs them as they are); "compiled" also has
            kernels of its own for the step, or those of `torch.compile`, once made. Default
            is "compiled" on a GPU, "eager" on the CPU. A model that cannot be recorded is served
            eagerly, with a warning.
        max_model_len: tokens of a prompt and its continuation together, where decoding is not
            eager; device memory for keys and values is set aside for as many.
        order: of requests that wait: "fifo", or "affinity", which serves the oldest one whose model
            is resident first.
        max_overtaken: with "affinity", by how many later requests one is overtaken at most.
        lookahead: look at the requests that wait: load what they miss while another one computes,
            and evict their models last.
        embeddings: "host" leaves lookup tables (embeddings that are not tied to the head) in host
            memory, from where the device reads a row a token; "ring" pages them like all else.
            Default is "host", but "ring" with `host_capacity`.
        host_capacity: host memory for master copies, in bytes or as text; the rest is kept on disk
            and read when it is needed. Default is as much as all models need.
        swap_dir: where, with `host_capacity`; default DJINN_SWAP_DIR, or the user's cache.
        masters: "compressed" keeps master copies of 16-bit weights in about 0.67 (bfloat16) or 0.86
            (float16) of their bytes, without loss, and decodes them on the device, so that fewer
            bytes cross the link. "auto" does so for models that get smaller by 5% or more.
        progress: whether `add` shows a bar while it reads and prepares a model, if that takes
            longer than a moment; or a function that is told the steps.

    Attributes:
        torch_device, capacity_bytes, page_bytes: what `device`, `capacity` and `page` stand for.
        decode_mode: how new models decode.
        victims: the policy, which spares models that wait, with `lookahead`.
        tables: where lookup tables are.
        master_form: how masters are kept.

    Raises:
        ConfigError: a parameter has no meaning.
        PlatformError: compressed masters on a GPU without triton.
    """

    capacity: int | str
    device: str | torch.device | None = None
    page: int | str | None = None
    policy: str | Policy = "lru"
    eviction: Eviction = "pages"
    overlap: bool = True
    decode: Decode | None = None
    max_model_len: int = 512
    order: Order = "fifo"
    max_overtaken: int = 8
    lookahead: bool = True
    embeddings: Embeddings | None = None
    host_capacity: int | str | None = None
    swap_dir: str | Path | None = None
    masters: MastersForm = "plain"
    progress: Show = True
    torch_device: torch.device = field(init=False)
    capacity_bytes: int = field(init=False)
    page_bytes: int = field(init=False)
    decode_mode: Decode = field(init=False)
    victims: Policy = field(init=False)
    tables: Embeddings = field(init=False)
    master_form: MastersForm = field(init=False)

    def __post_init__(self) -> None:
        device = parse_device(self.device)
        page = DEFAULT_PAGE_BYTES[device.type] if self.page is None else self.page
        decode = default_decode(device.type) if self.decode is None else self.decode
        resolved: dict[str, object] = {
            "torch_device": device,
            "decode_mode": parse_decode(decode),
            "max_model_len": whole_number(
                self.max_model_len, "max_model_len", MIN_MODEL_LEN, MOST_TOKENS
            ),
            "overlap": flag(self.overlap, "overlap"),
            "lookahead": flag(self.lookahead, "lookahead"),
            "progress": check_show(self.progress),
        }
        RequestQueue(self.order, self.max_overtaken)  # which refuses what it cannot do
        resolved |= {
            "victims": self._victims(),
            "tables": choose_embeddings(self.embeddings, self.host_capacity is None),
            "master_form": choose_masters(self.masters, device),
            "capacity_bytes": parse_bytes(self.capacity),
            "page_bytes": parse_bytes(page),
        }
        for name, value in resolved.items():
            object.__setattr__(self, name, value)

    def _victims(self) -> Policy:
        policy = make_policy(self.policy)
        if self.lookahead:
            return sparing_what_waits(policy)
        if isinstance(policy, Lookahead):
            raise ConfigError(
                "the policy 'lookahead' looks at requests that wait, which lookahead=False rules "
                "out: leave one of them out"
            )
        return policy


P = ParamSpec("P")
_Init = Callable[[Any, EngineOptions], None]


def _takes(
    options: Callable[P, EngineOptions],
) -> Callable[[_Init], Callable[Concatenate[Any, P], None]]:
    def decorate(init: _Init) -> Callable[Concatenate[Any, P], None]:
        known = list(signature(options).parameters)

        def __init__(self: Any, *args: P.args, **kwargs: P.kwargs) -> None:
            for name in kwargs:
                if name not in known:
                    raise TypeError(
                        f"{type(self).__name__} has no option {name!r}: "
                        + did_you_mean(name, known, f"its options are {', '.join(known)}")
                    )
            if not args and "capacity" not in kwargs:
                raise TypeError("expected a capacity, such as dj.Djinn('25GiB')")
            init(self, options(*args, **kwargs))

        own = list(signature(init).parameters.values())[:1]
        parameters = signature(options).parameters.values()
        __init__.__signature__ = Signature([*own, *parameters])  # type: ignore[attr-defined]
        return __init__

    return decorate


# Gives an `__init__` the parameters of `EngineOptions`, for callers, editors and type checkers.
takes_options = _takes(EngineOptions)
