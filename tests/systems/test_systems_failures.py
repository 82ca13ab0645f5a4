"""What systems leave behind: after a load, after a failed request, and beside other programs."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import PROMPT, saved

from djinn_lib.experiment.setup.weights import describe
from djinn_lib.systems import system_class
from djinn_lib.systems.base import load_ordinarily
from djinn_lib.systems.serverless import drop_page_cache

ARCHITECTURES = ["llama", "phi", "qwen2-tied"]


@pytest.fixture(scope="module")
def models():
    return {name: describe(name, saved(name)) for name in ARCHITECTURES}


def mappings_of(folder):
    return [
        line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line
    ]


def test_a_loaded_model_no_longer_needs_its_files(models):
    """A mapped file would be read by the first forward pass, which is not what loading costs."""
    model = load_ordinarily(models["qwen2-tied"])
    assert mappings_of(models["qwen2-tied"].folder) == []
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_nothing_of_a_cold_start_survives_it(models):
    system = system_class("serverless")(models, 1 << 30, "cpu")
    system.start()
    system.serve("llama", PROMPT, 1)
    assert mappings_of(models["llama"].folder) == []
    drop_page_cache(models["llama"])  # impossible while somebody maps the file


@pytest.mark.parametrize("name", ["pytorch_pinned", "pytorch_pageable"])
def test_tied_weights_are_moved_once(models, name, monkeypatch):
    system = system_class(name)(models, 1 << 30, "cpu")
    system.start()
    copied, to, copy_ = [], torch.Tensor.to, torch.Tensor.copy_

    def counted(function, applies):
        def call(tensor, *args, **kwargs):
            if applies(kwargs):
                copied.append(tensor.numel() * tensor.element_size())
            return function(tensor, *args, **kwargs)

        return call

    monkeypatch.setattr(torch.Tensor, "to", counted(to, lambda kwargs: kwargs.get("copy")))
    monkeypatch.setattr(torch.Tensor, "copy_", counted(copy_, lambda _: True))
    system.weights.load("qwen2-tied")
    parameters = system.weights.host["qwen2-tied"].parameters()
    assert sum(copied) == sum(p.numel() * p.element_size() for p in parameters)


FAILING = [(name, fails) for name in ("pytorch_pinned", "pytorch_pageable")
           for fails in ("load", "generate")]  # fmt: skip


@pytest.mark.parametrize(("name", "fails"), [*FAILING, ("pytorch_lru", "load")])
def test_a_failed_request_leaves_no_weights_on_the_device(models, name, fails, monkeypatch):
    system = system_class(name)(models, 1 << 30, "cpu")
    system.start()
    fail_after(monkeypatch, system.weights, fails)
    with pytest.raises(MemoryError):
        system.serve("llama", PROMPT, 1)
    assert on_device(system, "llama") == []
    if name == "pytorch_lru":
        assert not system.resident


def fail_after(monkeypatch, weights, method):
    """Let a method do its work and then fail, as when the device is full near its end."""
    work = getattr(weights, method)

    def fail(*args):
        work(*args)
        raise MemoryError("expected free memory")

    monkeypatch.setattr(weights, method, fail)


def on_device(system, name):
    """Parameters that are not in host memory any more."""
    parameters = system.weights.host[name].named_parameters()
    pairs = zip(parameters, system.weights.masters[name], strict=True)
    return [key for (key, p), master in pairs if p.data_ptr() != master.data_ptr()]


class FakeVllm:
    """The part of vLLM that is used, with engines whose steps fail."""

    sampling_params = SimpleNamespace(RequestOutputKind=SimpleNamespace(CUMULATIVE=1))
    shut_down = 0

    def SamplingParams(self, **parameters):
        return parameters

    def LLM(self, **options):
        def step():
            raise RuntimeError("expected a step")

        def shut():
            self.shut_down += 1

        return SimpleNamespace(
            llm_engine=SimpleNamespace(
                add_request=lambda *_: None,
                has_unfinished_requests=lambda: True,
                step=step,
                engine_core=SimpleNamespace(shutdown=shut),
            )
        )


def test_a_failed_vllm_engine_is_not_used_again(models, monkeypatch):
    system = system_class("vllm_recreate")(models, 1 << 30, "cpu")
    monkeypatch.setitem(__import__("sys").modules, "vllm", FakeVllm())
    read = ("ENABLE_V1_MULTIPROCESSING", "CPU_KVCACHE_SPACE", "LOGGING_LEVEL")
    for name in ("OMP_NUM_THREADS", *(f"VLLM_{name}" for name in read)):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    system.start()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a step"):
            system.serve("llama", PROMPT, 2)
        assert (system.engine, system.resident) == (None, None)
    assert system.vllm.shut_down == 2
