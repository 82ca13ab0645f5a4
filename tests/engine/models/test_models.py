"""Packing follows execution; binding keeps parameters in the ring."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import pytest
import torch
from odd_model import OddConfig, OddModel
from tiny import CONFIGS, PROMPT, spec
from torch import nn

import djinn_lib as dj
from djinn_lib.engine.memory.devices import base
from djinn_lib.engine.memory.layout import ALIGNMENT_BYTES
from djinn_lib.engine.models.packing import bind, pack
from djinn_lib.engine.models.spec import ModelSpec, check_dtype, skeleton
from djinn_lib.errors import ConfigError


@cache
def packed(name):
    """A model without weights, its layout and its units; nobody may change them."""
    model = skeleton(CONFIGS[name], torch.float32)
    return model, *pack(model)


KINDS = ["gpt2", "gpt-neox", "llama", "opt", "qwen2-tied"]


@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_is_packed_once_and_belongs_to_a_unit(name):
    model, layout, units = packed(name)
    slots = {slot.name: slot for slot in layout.slots}
    assert slots.keys() == dict(model.named_parameters()).keys()
    for slot in layout.slots:
        assert slot.shape == tuple(model.get_parameter(slot.name).shape)
    owners = {id(m) for unit in units for m in model.get_submodule(unit.module).modules()}
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            assert id(module) in owners


@pytest.mark.parametrize("name", KINDS)
def test_units_need_no_more_than_what_runs_up_to_them(name):
    """In order of execution, the bytes that units wait for only grow, layer by layer."""
    model, layout, units = packed(name)
    layers = [unit.end_byte for unit in units if unit.module.rpartition(".")[2].isdigit()]
    assert len(layers) == 3
    assert layers == sorted(layers)
    steps = [b - a for a, b in pairwise(layers)]
    one_layer = sum(p.numel() * 4 for p in models_layer(model, units).parameters())
    slack = ALIGNMENT_BYTES * 20
    assert all(one_layer <= step <= one_layer + slack for step in steps)
    assert max(unit.end_byte for unit in units) == layout.n_bytes


TABLES = {
    "llama": ["model.embed_tokens.weight"],
    "gpt2": ["transformer.wpe.weight"],  # wte is tied to the head
    "gpt-neox": ["gpt_neox.embed_in.weight"],
    "opt": ["model.decoder.embed_positions.weight"],
    "qwen2-tied": [],
}


@pytest.mark.parametrize("name", sorted(TABLES))
def test_lookup_tables_come_last_and_nobody_waits_for_them(name):
    _, layout, units = packed(name)
    apart, waiting = pack(skeleton(CONFIGS[name], torch.float32), "host")
    assert [slot.name for slot in apart.slots[len(apart.slots) - apart.n_tables :]] == TABLES[name]
    paged = [slot.name for slot in layout.slots if slot.name not in TABLES[name]]
    assert [slot.name for slot in apart.slots[: len(paged)]] == paged
    owners = {table.rpartition(".")[0] for table in TABLES[name]}
    assert [u.module for u in waiting] == [u.module for u in units if u.module not in owners]
    assert max(unit.end_byte for unit in waiting) == apart.paged_bytes
    assert apart.paged_bytes <= layout.n_bytes - sum(
        slot.n_bytes for slot in layout.slots if slot.name in TABLES[name]
    )


def test_a_table_that_is_not_only_looked_up_is_paged():
    """One that is scaled where it is, one of a layer, and one that something else reads as well."""
    model = skeleton(CONFIGS["phi"], torch.float32)
    model.model.embed_tokens.max_norm = 1.0
    assert pack(model, "host")[0].n_tables == 0
    model = skeleton(CONFIGS["phi"], torch.float32)
    model.model.layers[0].mlp.table = nn.Embedding(3, 4, device="meta")
    layout, _ = pack(model, "host")
    assert [slot.name for slot in layout.slots[-1:]] == ["model.embed_tokens.weight"]
    assert layout.n_tables == 1
    model.model.also = nn.Linear(64, 500, bias=False, device="meta")
    model.model.also.weight = model.model.embed_tokens.weight
    assert pack(model, "host")[0].n_tables == 0
    assert pack(OddModel(OddConfig()), "host")[0].n_tables == 0  # multiplied with at the end


def models_layer(model, units):
    return next(
        model.get_submodule(u.module) for u in units if u.module.rpartition(".")[2].isdigit()
    )


def test_packing_follows_execution_not_definition():
    """OPT defines its final norm before its layers and runs it after them."""
    model, layout, _ = packed("opt")
    defined = [name for name, _ in model.named_parameters()]
    order = [slot.name for slot in layout.slots]
    norm, last = "model.decoder.final_layer_norm.weight", "model.decoder.layers.2.fc2.weight"
    assert defined.index(norm) < defined.index(last)
    assert order.index(norm) > order.index(last)


def test_the_first_layer_runs_before_the_last_has_arrived(monkeypatch):
    """The copy of the last page is held back until the first decoder layer has been computed."""
    first_layer_done = threading.Event()
    pages = []

    def hold_the_last_page(target, source):
        pages.append(target.data_ptr())
        if len(pages) == n_pages:
            assert first_layer_done.wait(20), "the prefill waited for all pages"
        target.copy_(source)

    with dj.Djinn("1MiB", page="16KiB") as djinn:
        djinn.add("m", spec("llama"))
        n_pages = -(-int(djinn.residency().bytes[0]) // djinn.page_bytes)
        model = djinn._models["m"].module
        model.model.layers[0].register_forward_hook(lambda *_: first_layer_done.set())
        monkeypatch.setattr(base, "copy_page", hold_the_last_page)
        djinn.generate("m", PROMPT, 2, ignore_eos=True)
        assert len(pages) == n_pages and first_layer_done.is_set()
        djinn.check()


def test_without_overlap_nothing_runs_before_everything_is_there(monkeypatch):
    n_copied, seen = [], []
    real = base.copy_page
    monkeypatch.setattr(base, "copy_page", lambda t, s: (real(t, s), n_copied.append(1)))
    with dj.Djinn("1MiB", page="16KiB", overlap=False) as djinn:
        djinn.add("m", spec("llama"))
        model = djinn._models["m"].module
        model.model.embed_tokens.register_forward_hook(lambda *_: seen.append(len(n_copied)))
        djinn.generate("m", PROMPT, 1)
        assert seen[0] == -(-int(djinn.residency().bytes[0]) // djinn.page_bytes)


def test_binding_notices_a_parameter_outside_the_ring():
    model = skeleton(CONFIGS["llama"], torch.float32)
    views = {name: torch.empty(p.shape) for name, p in model.named_parameters()}
    model.model.also = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"model\.also\.bias"):
        bind(model, views, torch.device("cpu"))


def test_binding_keeps_the_parameters_and_gives_buffers_memory_of_their_own():
    model = skeleton(CONFIGS["qwen2-tied"], torch.float32)
    before = dict(model.named_parameters())
    buffers = {name: b.data_ptr() for name, b in model.named_buffers()}
    views = {name: torch.empty(p.shape) for name, p in before.items()}
    bind(model, views, torch.device("cpu"))
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(
        after[name] is p and p.data_ptr() == views[name].data_ptr() for name, p in before.items()
    )
    assert after["lm_head.weight"] is after["model.embed_tokens.weight"]
    assert all(b.data_ptr() != buffers[name] for name, b in model.named_buffers())


def test_specs_built_by_several_threads_have_the_weights_of_their_seed():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(4) as threads:
            models = list(threads.map(lambda _: spec("llama").build(), range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert len({sum(p.double().sum().item() for p in m.parameters()) for m in models}) == 1


def test_specs():
    mapping = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1,
               "num_attention_heads": 2, "vocab_size": 50, "intermediate_size": 32}  # fmt: skip
    before = torch.random.get_rng_state()
    first, second = (ModelSpec(mapping, "float16", seed=3).build() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's generator is untouched
    assert first.dtype == torch.float16
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert check_dtype(torch.bfloat16) is check_dtype("bfloat16") is torch.bfloat16
    for bad in ("int8", "float64", torch.int8):
        with pytest.raises(ConfigError, match="expected a dtype"):
            check_dtype(bad)
