"""Single values: numbers, flags and paths of the right kind pass, all else is refused in words."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import djinn_lib as dj
from djinn_lib.arguments import flag, function, real_number, whole_number
from djinn_lib.engine.device import parse_device
from djinn_lib.engine.memory.opening import default_folder
from djinn_lib.errors import ConfigError, DjinnError, shown
from djinn_lib.experiment.parameters import folder
from djinn_lib.paths import user_path

TINY = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "vocab_size": 64,
}  # fmt: skip


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)], ids=repr)
def test_whole_numbers(value):
    number = whole_number(value, "n", 0, 3)
    assert number == 3
    assert type(number) is int


@pytest.mark.parametrize(
    "value",
    [-1, 4, 10**5000, True, np.True_, 3.0, "3", b"3", None, [3], 3j, torch.tensor(3), np.array(3)],
    ids=shown,
)
def test_what_is_no_whole_number(value):
    with pytest.raises(ConfigError, match=r"expected n (of at|to be a whole number)"):
        whole_number(value, "n", 0, 3)


@pytest.mark.parametrize("value", [1, 1.0, np.float32(1), np.int8(1), Fraction(1)], ids=repr)
def test_real_numbers(value):
    number = real_number(value, "x", 0, 1)
    assert number == 1.0
    assert type(number) is float


@pytest.mark.parametrize(
    "value",
    [-0.1, 1.1, np.nan, np.inf, -np.inf, 10**400, True, "1", None, 1j, [1.0], torch.tensor(1.0)],
    ids=shown,
)
def test_what_is_no_real_number(value):
    with pytest.raises(ConfigError, match=r"expected x (of at|to be a number)"):
        real_number(value, "x", 0, 1)


def test_flags_and_functions():
    assert flag(True, "f") is True
    assert flag(np.False_, "f") is False
    for value in (1, 0, None, "no", []):
        with pytest.raises(ConfigError, match="expected f to be True or False"):
            flag(value, "f")
    assert function(print, "f") is print
    for value in (None, "print", 5):
        with pytest.raises(ConfigError, match="expected f to be a function"):
            function(value, "f")


def test_the_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DJINN_SWAP_DIR", "~/swap")
    assert user_path("~/run") == user_path(Path("~/run")) == folder("~/run") == tmp_path / "run"
    assert default_folder() == tmp_path / "swap"
    monkeypatch.delenv("DJINN_SWAP_DIR")
    assert default_folder() == tmp_path / ".cache" / "djinn" / "swap"
    with dj.Djinn("64KiB", page="16KiB", device="cpu", host_capacity="1MiB", swap_dir="~/s") as d:
        d.add("m", dj.ModelSpec({"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1,
                                 "vocab_size": 50, "n_positions": 16}))  # fmt: skip
    assert (tmp_path / "s").is_dir()


@pytest.mark.parametrize("value", ["", "  ", "a\0b", None, 5, b"x", "~no-such-user/x"], ids=repr)
def test_what_is_no_path(value):
    with pytest.raises(ConfigError, match="expected swap_dir"):
        user_path(value, "swap_dir")


def test_devices():
    assert parse_device("cpu") == parse_device(torch.device("cpu:3")) == torch.device("cpu")
    assert parse_device("cuda:0") == torch.device("cuda:0")
    for value in ("gpu", "mps", "meta", "", "cuda:x", "cuda:-1", 0, True, 1.5, b"cpu", []):
        with pytest.raises(ConfigError, match="expected device 'cpu', 'cuda' or one GPU"):
            parse_device(value)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parse_device("cuda:1").index == 1
    with pytest.raises(ConfigError, match="from 'cuda:0' to 'cuda:1', got 'cuda:99'"):
        parse_device("cuda:99")


@pytest.mark.parametrize(
    "options",
    [
        {"capacity": None}, {"capacity": 2.5}, {"capacity": True}, {"capacity": 2**62},
        {"device": "gpu"}, {"device": ""}, {"device": 0},
        {"page": 0}, {"page": "3KiB"}, {"page": 1.5},
        {"policy": None}, {"policy": []}, {"policy": type}, {"policy": "oracle"},
        {"eviction": None}, {"eviction": []},
        {"overlap": None}, {"overlap": "no"}, {"overlap": 1},
        {"lookahead": None}, {"lookahead": "no"},
        {"decode": ""}, {"decode": []}, {"decode": False}, {"decode": 5},
        {"max_model_len": None}, {"max_model_len": "512"}, {"max_model_len": 512.0},
        {"max_model_len": True}, {"max_model_len": 7}, {"max_model_len": 2**70},
        {"order": None}, {"order": []},
        {"max_overtaken": None}, {"max_overtaken": 1.5}, {"max_overtaken": -1},
        {"embeddings": ""}, {"embeddings": []}, {"embeddings": False},
        {"host_capacity": 0}, {"host_capacity": False}, {"host_capacity": "1GB"},
        {"host_capacity": 2**62}, {"swap_dir": 5}, {"swap_dir": ""}, {"swap_dir": b"/tmp"},
        {"progress": None}, {"progress": "print"}, {"progress": 1},
    ],
    ids=str,
)  # fmt: skip
def test_arguments_of_djinn(options):
    with pytest.raises(DjinnError, match="expected"):
        dj.Djinn(**{"capacity": "1MiB", "page": "16KiB", "device": "cpu", **options})


@pytest.mark.parametrize("name", [None, "", " ", 5, b"m", ["m"], {}], ids=repr)
def test_names_of_models(name):
    spec = dj.ModelSpec({"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1})
    with dj.Djinn("64KiB", page="16KiB", device="cpu") as djinn:
        with pytest.raises(ConfigError, match="name must be non-empty text"):
            djinn.add(name, spec)
        lease = lambda name: djinn.lease(name).__enter__()  # noqa: E731
        for use in (djinn.remove, djinn.evict, djinn.sha256, lease):
            with pytest.raises(ConfigError, match=r"expected one of the models \[\], got"):
                use(name)
        for ask in (djinn.generate, djinn.submit, djinn.chat, djinn.tokenize):
            with pytest.raises(ConfigError, match=r"expected one of the models \[\], got"):
                ask(name, "Hi")


@pytest.mark.parametrize(
    "argument",
    [
        {"source": None}, {"source": 5}, {"source": b"x"}, {"source": ""}, {"source": "x" * 5000},
        {"source": []}, {"source": Path("/no/such/folder")}, {"revision": 5}, {"revision": ""},
        {"trust_remote_code": "yes"}, {"trust_remote_code": None}, {"dtype": []}, {"dtype": ""},
        {"dtype": False}, {"dtype": "int8"}, {"dtype": torch.int8}, {"name": None}, {"name": ""},
    ],
    ids=shown,
)  # fmt: skip
def test_a_model_with_an_argument_of_the_wrong_kind_is_refused(argument, tmp_path):
    with dj.Djinn("1MiB", "cpu", "64KiB") as djinn:
        with pytest.raises(DjinnError, match=r"^[^\n]{10,}"):
            djinn.add(**{"name": "m", "source": dj.ModelSpec(TINY), **argument})
        assert djinn.residency().empty


@pytest.mark.parametrize(
    "argument",
    [{"seed": "x"}, {"seed": None}, {"seed": 2**70}, {"seed": -1}, {"seed": 1.5}, {"init": "x"}],
    ids=shown,
)
def test_a_specification_of_the_wrong_kind_is_refused(argument):
    with pytest.raises(ConfigError, match=r"expected (the seed|init)"):
        dj.ModelSpec(TINY, **argument)
