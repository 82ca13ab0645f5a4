"""The parameters of a `Djinn`: checked and resolved once, before anything is allocated."""

import inspect
from dataclasses import fields

import pytest
import torch

import djinn_lib as dj
from djinn_lib.engine.memory.policies import LFU, Lookahead
from djinn_lib.engine.serving.options import EngineOptions
from djinn_lib.errors import CapacityError, ConfigError


def test_a_djinn_takes_every_option_and_no_other():
    parameters = list(inspect.signature(dj.Djinn).parameters)
    assert parameters == [field.name for field in fields(EngineOptions) if field.init]
    with pytest.raises(TypeError, match="polcy"):
        dj.Djinn("1MiB", "cpu", polcy="lru")
    with pytest.raises(TypeError, match="expected a capacity"):
        dj.Djinn(device="cpu")  # type: ignore[call-arg]


def test_what_defaults_stand_for():
    options = EngineOptions("3MiB", "cpu")
    assert (options.torch_device, options.decode_mode) == (torch.device("cpu"), "eager")
    assert (options.capacity_bytes, options.page_bytes) == (3 << 20, 1 << 20)
    assert options.tables == "host"
    assert EngineOptions("3MiB", "cpu", host_capacity="1MiB").tables == "ring"


def test_looking_ahead_is_one_option():
    assert isinstance(EngineOptions("1MiB", "cpu", policy="lfu").victims, Lookahead)
    assert type(EngineOptions("1MiB", "cpu", policy="lfu", lookahead=False).victims) is LFU
    with pytest.raises(ConfigError, match="leave one of them out"):
        EngineOptions("1MiB", "cpu", policy="lookahead", lookahead=False)


def test_a_ring_too_large_for_the_host_says_why_it_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CapacityError, match=r"the capacity \(device='cpu', because no usable GPU"):
        dj.Djinn("1000TiB", page="1TiB")
    with pytest.raises(CapacityError, match=r"lower the capacity$"):
        dj.Djinn("1000TiB", "cpu", page="1TiB")
    with pytest.raises(CapacityError, match=r"choose smaller pages$"):
        dj.Djinn("1KiB")


@pytest.mark.parametrize(
    "wrong",
    [{"order": "lifo"}, {"max_overtaken": -1}, {"decode": "fast"}, {"max_model_len": 1},
     {"overlap": 1}, {"lookahead": "no"}, {"progress": None}, {"embeddings": "disk"},
     {"policy": "fifo"}, {"page": "large"}, {"capacity": "much"}, {"device": "tpu"}],
    ids=str,
)  # fmt: skip
def test_what_has_no_meaning_is_refused(wrong):
    with pytest.raises(ConfigError, match="expected"):
        EngineOptions(**{"capacity": "1TiB", "device": "cpu", **wrong})
