"""Who reads which weights is observed, whoever owns them, and waits for them."""

import logging
import time

import pytest
import torch
from naive_window import frames_by_prefix
from odd_model import VOCAB, OddConfig, OddModel
from tiny import spec
from torch import nn

import djinn_lib as dj
from djinn_lib.engine.memory.devices import base
from djinn_lib.engine.models import packing
from djinn_lib.engine.models.packing import pack
from djinn_lib.engine.models.tracing import needs_of, observe
from djinn_lib.errors import CapacityError

PAGE = 4096
IDS = torch.tensor([[5, 17, 93, 40, 2, 61]])


def needs(config):
    model = OddModel(config)
    return needs_of(model, [f"layers.{i}" for i in range(config.n_layers)], observe(model))


def test_a_weight_is_needed_by_whoever_reads_it():
    found = needs(OddConfig(n_layers=3))
    anywhere = {"scale", "embed.weight", "projection.weight", "block.weight", "block.bias",
                "layers.0.inner.weight"}  # fmt: skip
    owned = {i: {f"layers.{i}.{part}" for part in
                 ("inner.weight", "inner.bias", "outer.weight", "outer.bias")}
             for i in range(3)}  # fmt: skip
    assert found == {
        "": anywhere,  # what is read between the units, or belongs to a module that is none
        "embed": anywhere,
        "layers.0": anywhere | owned[0],
        # It is called by its `forward`, so that only its parts can wait. The second of them has
        # run when the first one's weights are read, of the layer before; hence "anywhere".
        "layers.1.inner": anywhere | {"layers.1.inner.weight", "layers.1.inner.bias"},
        "layers.1.outer": anywhere | {"layers.1.outer.weight", "layers.1.outer.bias"},
        "layers.2": anywhere | owned[2] | {"layers.1.inner.weight"},
    }


def test_a_model_that_looks_at_values_is_observed_on_numbers():
    assert needs(OddConfig(n_layers=3, route=True)) == needs(OddConfig(n_layers=3))


def test_a_config_that_asks_for_tuples_is_observed():
    model = spec("llama").build()
    expected = observe(model)
    model.config.return_dict = False
    assert {event for event in observe(model)} == set(expected)


def test_observing_leaves_the_model_as_it_was():
    model = OddModel(OddConfig(n_layers=2, route=True))
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    observe(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0] and torch.equal(tensor, before[name][1])
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


class Sketch(nn.Module):
    """Modules by name, for events that are made up."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


def events_of(text):
    """`(a x )` is a call of a, in which x is read."""
    stack, events = [], []
    for word in text.split():
        if word.startswith("("):
            stack.append(word[1:])
            events.append(("call", word[1:]))
        elif word == ")":
            events.append(("return", stack.pop()))
        else:
            events.append(("read", word))
    return events


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("( (a a.weight ) (b b.weight ) )", {"a": "a", "b": "b"}),
        # One that calls others is not done with when they wait.
        ("( (a a.weight (b b.weight ) ) )", {"": "a", "b": "ab"}),
        # What is called within a layer is a part of it, wherever else it is called.
        ("( (a (c c.weight ) a.weight ) (c c.weight ) )", {"": "bc", "a": "abc"}),
        # What is never called is needed at any time.
        ("( (a a.weight b.weight ) )", {"": "b", "a": "ab"}),
        ("( (a a.weight ) (b b.weight ) (a a.weight ) )", {"a": "a", "b": "b"}),
        ("( (b b.weight ) a.weight )", {"": "a", "b": "ab"}),
        ("", {"": "ab"}),
    ],
)
def test_units_do_not_run_within_each_other(text, expected):
    names = sorted({letter for letters in expected.values() for letter in letters})
    model = Sketch(**{name: nn.Linear(2, 2, bias=False) for name in names})
    layers = ["a"] if "c" in names else []
    found = needs_of(model, layers, events_of(text))
    assert found == {
        unit: {f"{letter}.weight" for letter in letters} for unit, letters in expected.items()
    }


def save(folder, **options):
    model = OddModel(OddConfig(**options))
    model.save_pretrained(folder)
    with torch.no_grad():
        return pack(model)[1], model.eval()(IDS).logits


MANY_LAYERS = pytest.param({"n_layers": 12}, marks=pytest.mark.slow)


@pytest.mark.parametrize("options", [{"route": True}, MANY_LAYERS], ids=str)
def test_weights_that_others_read_are_there_in_a_ring_of_any_size(tmp_path, options, monkeypatch):
    """From the smallest window to the whole model; copies are slow, so that nothing is early."""
    units, expected = save(tmp_path, **options)
    real = base.copy_page
    monkeypatch.setattr(base, "copy_page", lambda *pages: (time.sleep(2e-4), real(*pages)))
    frames = frames_by_prefix([unit.extents for unit in units], PAGE)
    least = min(frames.values())
    for n_frames in (least, least + 1, (least + len(frames)) // 2, len(frames), len(frames) + 9):
        with dj.Djinn(n_frames * PAGE, "cpu", PAGE, decode="eager") as djinn:
            djinn.add("m", tmp_path)
            assert ("m" in djinn.stats().streamed) == (n_frames < len(frames))
            for _ in range(2):
                with djinn.lease("m") as model, torch.no_grad():
                    for _ in range(2):
                        assert torch.equal(model(IDS).logits, expected)
                djinn.check()
                djinn.evict("m")
    with (
        dj.Djinn((least - 1) * PAGE, "cpu", PAGE, decode="eager") as djinn,
        pytest.raises(CapacityError, match="for what layers share, "),
    ):
        djinn.add("m", tmp_path)


def test_one_that_cannot_be_observed_runs_when_all_is_there(monkeypatch, caplog):
    def refuse(*_):
        raise RuntimeError("nothing of this kind")

    monkeypatch.setattr(packing, "observe", refuse)
    expected = spec("llama").build()
    ids = IDS % min(VOCAB, expected.config.vocab_size)
    with caplog.at_level(logging.WARNING), dj.Djinn("1MiB", page="16KiB") as djinn:
        djinn.add("m", spec("llama"))
        (unit,) = djinn._models["m"].units
        assert (unit.module, unit.extents) == ("", ((0, djinn._models["m"].n_bytes),))
        with djinn.lease("m") as model, torch.no_grad():
            assert torch.equal(model(ids).logits, expected(ids).logits)
    assert (
        "cannot be traced (nothing of this kind): it runs only after all its weights" in caplog.text
    )
    with dj.Djinn("400KiB", page="16KiB") as djinn, pytest.raises(CapacityError):
        djinn.add("m", spec("llama"))


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "llama", "opt", "qwen2-tied"])
def test_nothing_is_shared_but_what_is_tied(name):
    model = spec(name).build()
    layers = [n for n, _ in model.named_modules() if n.rpartition(".")[2].isdigit()]
    found = needs_of(model, layers, observe(model))
    assert "" not in found
    read = [parameter for parameters in found.values() for parameter in parameters]
    table = model.get_input_embeddings().weight
    tied = [n for n, p in model.named_parameters(remove_duplicate=False) if p is table]
    assert len(read) == len(set(read)) + len(tied) - 1
