"""Parameters packed in the order of use and bound to other memory."""

import gc
import weakref

import pytest
import torch
from torch import nn

from djinn_lib.errors import ConfigError
from djinn_lib.fleet.parameters import PackedParameters


class Layer(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, n))
        self.transposed = nn.Parameter(torch.randn(n, n).t())
        self.part = nn.Parameter(torch.randn(4, n)[1:3], requires_grad=False)
        self.empty = nn.Parameter(torch.empty(0))
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x):
        return (x @ self.weight @ self.transposed + self.part.sum()) * self.scale


class Model(nn.Module):
    def __init__(self, n=16):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(8, n))
        self.layers = nn.ModuleList(Layer(n) for _ in range(3))
        self.norm = nn.Parameter(torch.randn(n).half())
        self.head = nn.Linear(n, 8, bias=False)
        self.head.weight = self.embedding  # tied
        self.alias = self.layers[1].weight.data[:2]  # a plain attribute over the same memory
        self.layers[2].shared = self.layers[0].weight  # of another layer

    def forward(self, ids):
        x = self.embedding[ids]
        for layer in self.layers:
            x = layer(x)
        return self.head(x * self.norm) + self.alias.sum()


def moved(model):
    """Bind a model to pages of its own; returns these."""
    packed = PackedParameters(model, list(model.layers))
    master = torch.zeros(packed.layout.n_bytes, dtype=torch.uint8)
    packed.fill(packed.layout.views(master))
    packed.bind(master)
    return packed, master


def test_what_a_model_computes_stays_and_so_does_all_sharing():
    torch.manual_seed(0)
    model, ids = Model(), torch.tensor([1, 2, 3])
    before = model(ids)
    strides = {name: p.stride() for name, p in model.named_parameters()}
    _, master = moved(model)
    assert torch.equal(model(ids), before)
    assert {name: p.stride() for name, p in model.named_parameters()} == strides
    assert model.head.weight is model.embedding
    assert model.layers[2].shared is model.layers[0].weight
    inside = range(master.data_ptr(), master.data_ptr() + len(master))
    for tensor in [*(p for p in model.parameters() if p.numel()), model.alias]:
        assert tensor.data_ptr() in inside
    assert all(layer.scale.data_ptr() not in inside for layer in model.layers)
    master.zero_()
    assert not model(ids).any(), "it reads the pages, and nothing else"


def test_layers_end_where_their_last_byte_is_and_what_is_outside_comes_first():
    model = Model()
    packed, _ = moved(model)
    slots = {slot.name: slot for slot in packed.layout.slots}
    outside = {"embedding", "norm"}
    assert {name for name in slots if not name.startswith("layers")} == outside
    assert packed.outside_end == max(slots[name].end for name in outside)
    assert min(s.offset for n, s in slots.items() if n not in outside) >= packed.outside_end
    assert packed.outside_end < packed.layer_ends[0] < packed.layer_ends[1] < packed.layer_ends[2]
    assert packed.layer_ends[-1] == packed.layout.n_bytes
    assert all(slot.offset % 256 == 0 for slot in slots.values())


def test_the_memory_of_before_is_freed():
    model = Model()
    old = weakref.ref(model.norm.data.untyped_storage())
    moved(model)
    gc.collect()
    assert old() is None


def test_a_module_without_parameters():
    with pytest.raises(ConfigError, match="no parameters to page"):
        PackedParameters(nn.ReLU())
