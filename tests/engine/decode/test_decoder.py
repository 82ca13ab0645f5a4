"""Decoding from recordings gives the tokens that transformers gives, whatever came before."""

import logging
import shutil
from typing import ClassVar

import pytest
import torch
from tiny import CONFIGS, PROMPT, VOCAB, ordinary_tokens, saved, spec

import djinn_lib as dj
from djinn_lib.engine.decode import compiled as compiling
from djinn_lib.engine.decode import cuda_graphs as recording
from djinn_lib.engine.decode.cuda_graphs import Recorder
from djinn_lib.engine.decode.decoder import EagerDecoder
from djinn_lib.engine.decode.kv_cache import KvCache
from djinn_lib.engine.decode.recorded import RecordedDecoder, prefill_lengths
from djinn_lib.engine.models.packing import pack
from djinn_lib.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture
def traced_only(monkeypatch):
    """Trace as for compiling, but run torch's own kernels: no C++ compiler is needed."""
    real = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(
        torch, "compile", lambda f, *, options, **rest: real(f, backend="aot_eager", **rest)
    )


def recorded(name, max_model_len=40, compiled=False):
    model = spec(name).build()
    return RecordedDecoder(model, pack(model)[1], max_model_len, Recorder(CPU), compiled)


def some(*names):
    """Every architecture as a parameter; all but some of them take long together."""
    return [n if n in names else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS]


@pytest.mark.parametrize("name", some("llama", "mistral-sliding"))
def test_recorded_tokens_are_transformers_own(name):
    with dj.Djinn("2MiB", "cpu", "16KiB", decode="graph", max_model_len=40) as djinn:
        djinn.add("m", saved(name))
        assert djinn.set_decode("m", "graph") == "graph"
        for _ in range(2):
            g = djinn.generate("m", PROMPT, 20, ignore_eos=True)
            assert g.token_ids == ordinary_tokens(saved(name), 20)
            djinn.evict("m")


@pytest.mark.parametrize("name", some())
def test_compiled_tokens_are_transformers_own(name, traced_only):
    with dj.Djinn("2MiB", "cpu", "16KiB", decode="graph", max_model_len=40) as djinn:
        djinn.add("m", saved(name))
        assert djinn.set_decode("m", "compiled") == "compiled"
        g = djinn.generate("m", PROMPT, 8, ignore_eos=True)
        assert g.token_ids == ordinary_tokens(saved(name), 8)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on the CPU needs g++")
def test_a_compiled_step_of_inductor():
    with dj.Djinn("2MiB", "cpu", "16KiB", decode="compiled", max_model_len=40) as djinn:
        djinn.add("m", saved("phi"))
        assert djinn.decode_modes["m"] == "compiled"
        g = djinn.generate("m", PROMPT, 8, ignore_eos=True)
        assert g.token_ids == ordinary_tokens(saved("phi"), 8)


def test_prompts_of_any_length():
    decoder = recorded("mistral-sliding", 100)
    model = spec("mistral-sliding").build()
    for n_prompt in (1, 31, 32, 33, 64, 65, 90):
        prompt = [(7 * i + 3) % VOCAB for i in range(n_prompt)]
        expected = EagerDecoder(model).generate(prompt, 10, ignore_eos=True)
        assert decoder.generate(prompt, 10, ignore_eos=True).token_ids == expected.token_ids


def test_prefill_lengths_cover_every_prompt():
    assert prefill_lengths(512) == [32, 64, 128, 256, 512]
    assert prefill_lengths(192) == [32, 64, 128, 192]
    assert prefill_lengths(20) == [20]


@pytest.mark.parametrize("decode", ["eager", "graph"])
def test_the_end_of_a_sequence(decode):
    with dj.Djinn("2MiB", "cpu", "16KiB", decode=decode, max_model_len=40) as djinn:
        djinn.add("m", saved("llama"))
        tokens = djinn.generate("m", PROMPT, 8, ignore_eos=True).token_ids
        for ends, kept in (([tokens[2]], 3), ([VOCAB - 1, tokens[0]], 1), (None, 8)):
            with djinn.lease("m") as model:
                model.generation_config.eos_token_id = ends
            assert djinn.generate("m", PROMPT, 8).token_ids == tokens[:kept]
        with djinn.lease("m") as model:
            model.generation_config.eos_token_id = tokens[7]
        assert djinn.generate("m", PROMPT, 8).token_ids == tokens  # the end is the last one asked


def test_what_an_earlier_request_left_in_the_cache_is_gone():
    decoder = recorded("llama")
    expected = decoder.generate(PROMPT, 8, ignore_eos=True).token_ids
    for layer in decoder.cache.kv_layers:
        layer.keys.fill_(float("inf"))
        layer.values.fill_(float("nan"))
    assert decoder.generate(PROMPT, 8, ignore_eos=True).token_ids == expected


class StrictRecorder(Recorder):
    """Records as on the CPU, and asks as on a GPU whether that could be done."""

    def ensure_recordable(self, function):
        self._on_gpu = True
        try:
            super().ensure_recordable(function)
        finally:
            self._on_gpu = False


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_looking_at_values_is_found_before_anything_is_recorded(name):
    model = spec(name).build()
    arguments = model, pack(model)[1], 40, StrictRecorder(CPU)
    if name == "opt":  # takes its position from the cache by `item`
        with pytest.raises(ConfigError, match="_local_scalar_dense"):
            RecordedDecoder(*arguments)
    else:
        assert RecordedDecoder(*arguments).mode == "graph"


def test_compiled_code_that_computes_something_else_is_not_used(monkeypatch, caplog, traced_only):
    real = compiling._LayerCache.update

    def forgets_values(self, key_states, value_states, *rest, **more):
        return real(self, key_states, torch.zeros_like(value_states), *rest, **more)

    monkeypatch.setattr(compiling._LayerCache, "update", forgets_values)
    with caplog.at_level(logging.WARNING):
        decoder = recorded("llama", compiled=True)
    assert decoder.mode == "graph"
    assert "expected logits within" in caplog.text
    expected = recorded("llama").generate(PROMPT, 8, ignore_eos=True)
    assert decoder.generate(PROMPT, 8, ignore_eos=True).token_ids == expected.token_ids


@pytest.mark.slow
def test_layers_share_compiled_code(monkeypatch, traced_only):
    made = []
    real = compiling._SharedCode

    def counted(module):
        made.append(type(module).__name__)
        return real(module)

    monkeypatch.setattr(compiling, "_SharedCode", counted)
    decoder = recorded("llama", compiled=True)
    model = decoder.model
    assert decoder.mode == "compiled"
    assert sorted(set(made)) == ["Embedding", "Linear", "LlamaDecoderLayer", "LlamaRMSNorm"]
    assert made.count("LlamaDecoderLayer") == 1
    decoder.generate(PROMPT, 4, ignore_eos=True)  # and the model is itself again:
    assert model.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_cache_tells_its_size_and_position():
    model = spec("mistral").build()
    cache = KvCache(model.config, 40, CPU)
    assert cache.n_bytes == 0
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        cache.mode(prefilling=True)
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        assert cache.n_bytes == 2 * 3 * 2 * 40 * 16 * 4  # k and v, layers, heads, tokens, size
        cache.position.fill_(len(PROMPT))
        cache.mode(prefilling=False)
        token = torch.tensor([[5]])
        step = model(input_ids=token, past_key_values=cache, use_cache=True).logits[0, -1]
        whole = model(input_ids=torch.cat([ids, token], 1)).logits[0, -1]
    assert torch.allclose(step, whole, atol=1e-4)


class FakeGraph:
    log: ClassVar[list] = []

    def capture_begin(self, pool, capture_error_mode):
        self.log.append("begin")

    def capture_end(self):
        self.log.append("end")

    def replay(self):
        self.log.append(self)


def upto(end_byte):
    return ((0, end_byte),)


def test_pieces_begin_where_more_bytes_are_needed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(FakeGraph, "log", [])
    capture = recording._Capture(pool=None, extents=())
    capture.begin()
    for end_byte in (100, 300, 300, 200, 400):
        capture.need(upto(end_byte))
    capture.end()
    assert [extents for extents, _ in capture.pieces] == [upto(100), upto(300), upto(400)]
    assert FakeGraph.log == ["begin", "end"] * 3
    FakeGraph.log.clear()
    recording.GraphRecording(capture.pieces, FakeGraph.log.append).replay()
    graphs = [graph for _, graph in capture.pieces]
    assert FakeGraph.log == [
        upto(100), graphs[0], upto(300), graphs[1], upto(400), graphs[2]
    ]  # fmt: skip
