"""Only a table of positions is an end, whatever it is called, whatever the configuration says."""

import pytest
import torch
from odd_model import VOCAB as ODD_VOCAB
from odd_model import OddConfig, OddModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CodeGenConfig,
    FalconConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    OPTConfig,
    PreTrainedModel,
    RobertaConfig,
    XGLMConfig,
)

import djinn_lib as dj
from djinn_lib.engine.decode.cuda_graphs import Recorder
from djinn_lib.engine.decode.eager import generate_eager, vocabulary
from djinn_lib.engine.decode.generation_options import ensure_generates
from djinn_lib.engine.decode.positions import Positions, check_positions, longest, positions_of
from djinn_lib.engine.decode.recorded import RecordedDecoder
from djinn_lib.engine.models.packing import pack
from djinn_lib.engine.models.spec import skeleton
from djinn_lib.errors import ConfigError

VOCAB, PROMPT = 100, [5, 9, 17, 62, 3, 41, 88, 20, 7, 33, 54, 71, 90, 12]
IDS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **IDS}
LLAMA = {**SHAPE, "intermediate_size": 48, "initializer_range": 0.3}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3, **IDS}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}

WITH_AN_END = {
    "gpt2": (GPT2Config(**GPT2, n_positions=70), 70),
    "opt": (  # whose table begins with two positions for padding
        OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=70),
        70,
    ),
    "roberta": (  # of whose positions some are never used
        RobertaConfig(**SHAPE, intermediate_size=48, max_position_embeddings=70, pad_token_id=2,
                      is_decoder=True),
        67,
    ),
    "gptj": (GPTJConfig(n_embd=32, n_layer=2, n_head=2, rotary_dim=8, n_positions=70, **IDS), 70),
    "codegen": (
        CodeGenConfig(n_embd=64, n_layer=1, n_head=4, rotary_dim=8, n_positions=70, **IDS),
        70,
    ),
    # Adds slopes that are cut out of a longer table, and tells no max_position_embeddings.
    "mpt": (MptConfig(d_model=32, n_heads=2, n_layers=2, max_seq_len=70, vocab_size=VOCAB), 70),
}  # fmt: skip
WITHOUT_ONE = {
    "llama": LlamaConfig(**LLAMA, max_position_embeddings=70),
    "llama-dynamic": LlamaConfig(**LLAMA, max_position_embeddings=70, rope_parameters=DYNAMIC),
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=2, **IDS),
    "falcon-alibi": FalconConfig(**SHAPE, alibi=True, new_decoder_architecture=False),
    "xglm": XGLMConfig(d_model=32, num_layers=2, attention_heads=2, ffn_dim=48, vocab_size=VOCAB,
                       max_position_embeddings=70),  # its table grows
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_AN_END)
def test_the_end_is_that_of_the_table(name):
    config, limit = WITH_AN_END[name]
    model = skeleton(config, torch.float32)  # there are no weights yet
    assert positions_of(model) == Positions(limit, "the model's table of positions ends there")
    assert longest(model, 1000) == limit
    check_positions(model, limit - 8, 8)
    with pytest.raises(ConfigError, match=rf"at most {limit} tokens.*table.*{limit - 8} \+ 9"):
        check_positions(model, limit - 8, 9)


@pytest.mark.parametrize("name", sorted(set(WITH_AN_END) - {"mpt"}))
def test_transformers_goes_exactly_as_far(name):
    config, limit = WITH_AN_END[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model(torch.full((1, limit), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, limit + 1), 5))


@pytest.mark.parametrize("name", WITHOUT_ONE)
def test_what_has_no_table_has_no_end(name):
    model = skeleton(WITHOUT_ONE[name], torch.float32)
    assert positions_of(model) == Positions(None)
    assert longest(model, 10_000) == 10_000


class Renamed(GPT2LMHeadModel):
    """Reads a plain parameter by position, and its configuration tells nothing."""

    def __init__(self, config):
        super().__init__(config)
        self.transformer.wpe = Place(config.n_embd)


class Place(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.whereabouts = nn.Parameter(torch.zeros(53, width))

    def forward(self, position_ids):
        return self.whereabouts[position_ids + 3]


def test_a_table_of_any_name_and_kind():
    with torch.device("meta"):
        model = Renamed(GPT2Config(**GPT2))
    assert positions_of(model).limit == 50


class Undecided(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        self.lm_head.weight.sum().tolist()
        return super().forward(*args, **kwargs)


def test_what_cannot_be_found_out_ends_where_the_configuration_says():
    with torch.device("meta"):
        model = Undecided(LlamaConfig(**LLAMA, max_position_embeddings=70))
    check_positions(model, 60, 10)
    with pytest.raises(ConfigError, match=r"at most 70 .*search for the real limit failed.*tolist"):
        check_positions(model, 60, 11)


@pytest.mark.parametrize("decode", ["eager", "graph"])
def test_a_request_beyond_the_table_is_refused_before_anything_is_loaded(decode):
    with dj.Djinn("1MiB", "cpu", "16KiB", decode=decode) as djinn:
        djinn.add("m", dj.ModelSpec(GPT2Config(**GPT2, n_positions=70)))
        djinn.evict("m")
        with pytest.raises(ConfigError, match=r"at most 70 tokens.*14 \+ 57"):
            djinn.generate("m", PROMPT, 57)
        assert djinn.residency().resident_bytes[0] == 0
        assert len(djinn.generate("m", PROMPT, 56, ignore_eos=True).token_ids) == 56


def test_prefills_end_with_the_positions():
    model = dj.ModelSpec(GPT2Config(**GPT2, n_positions=70)).build()
    decoder = RecordedDecoder(model, pack(model)[1], 512, Recorder(torch.device("cpu")))
    assert sorted(decoder._prefills) == [32, 64, 70]
    assert decoder.cache.kv_layers[0].keys.shape[2] == 70
    prompt = [(7 * i + 3) % VOCAB for i in range(66)]
    expected = generate_eager(model, prompt, 4, ignore_eos=True).token_ids
    assert decoder.generate(prompt, 4, ignore_eos=True).token_ids == expected
    with pytest.raises(ConfigError, match="table of positions"):
        decoder.check_length(66, 5)
    shorter = RecordedDecoder(model, pack(model)[1], 40, Recorder(torch.device("cpu")))
    with pytest.raises(ConfigError, match="raise max_model_len"):
        shorter.check_length(36, 5)


@pytest.mark.parametrize("rope", [None, DYNAMIC])
def test_rotary_positions_go_on_beyond_what_the_configuration_tells(rope):
    config = LlamaConfig(**LLAMA, max_position_embeddings=64, rope_parameters=rope)
    prompt = [(7 * i + 3) % VOCAB for i in range(60)]
    model = dj.ModelSpec(config).build()
    ids = torch.tensor([prompt])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                              max_new_tokens=20, eos_token_id=None, pad_token_id=0)  # fmt: skip
    with dj.Djinn("1MiB", "cpu", "16KiB", decode="graph", max_model_len=100) as djinn:
        djinn.add("m", dj.ModelSpec(config))
        got = djinn.generate("m", prompt, 20, ignore_eos=True).token_ids
    assert got == tuple(expected[0, 60:].tolist())


def test_ids_are_those_that_the_embedding_has():
    model = dj.ModelSpec(LlamaConfig(**LLAMA)).build()
    model.resize_token_embeddings(VOCAB + 28)
    model.config.vocab_size = VOCAB  # as checkpoints have it whose embedding was padded
    assert vocabulary(model) == VOCAB + 28
    assert len(generate_eager(model, [VOCAB + 27], 2, ignore_eos=True).token_ids) == 2
    with pytest.raises(ConfigError, match=f"from 0 to {VOCAB + 27}"):
        generate_eager(model, [VOCAB + 28], 2)
    model.config.vocab_size_per_layer_input = VOCAB - 10
    assert vocabulary(model) == VOCAB - 10
    del model.config.vocab_size_per_layer_input, model.config.vocab_size
    assert vocabulary(model) == VOCAB + 28
    model.set_input_embeddings(None)
    with pytest.raises(ConfigError, match="looks up token ids"):
        vocabulary(model)


def test_a_table_that_transformers_does_not_find_leaves_what_the_configuration_says():
    assert vocabulary(OddModel(OddConfig())) == ODD_VOCAB


def test_what_cannot_generate_is_refused_in_words():
    class Mute(PreTrainedModel):
        config_class = OddConfig

    with pytest.raises(ConfigError, match="generate with, got a Mute: it is no causal language"):
        ensure_generates(Mute(OddConfig()))
