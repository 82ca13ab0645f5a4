"""Every way of decoding gives what transformers' generate(do_sample=False) gives, or says no."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)

import djinn_lib as dj
from djinn_lib.engine.decode.cuda_graphs import Recorder
from djinn_lib.engine.decode.decoder import EagerDecoder, make_decoder
from djinn_lib.engine.decode.eager import generate_eager
from djinn_lib.engine.decode.generation_options import OF_SAMPLING, request_options
from djinn_lib.engine.decode.sampling import Sampling
from djinn_lib.engine.models.packing import pack
from djinn_lib.engine.models.spec import ModelSpec
from djinn_lib.errors import ConfigError

VOCAB, PROMPT, N = 100, [84, 76, 43, 27, 52, 41, 78, 31, 48, 59], 20
CONFIG = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    vocab_size=VOCAB, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
MANY_ENDS = list(range(60))
BEYOND = [
    {"repetition_penalty": 1.3},
    {"encoder_repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 1},
    {"min_new_tokens": 12, "eos_token_id": MANY_ENDS},
    {"min_length": 15, "eos_token_id": MANY_ENDS},
    {"suppress_tokens": list(range(0, VOCAB, 2))},
    {"begin_suppress_tokens": list(range(0, VOCAB, 2))},
    {"bad_words_ids": [[i] for i in range(0, VOCAB, 2)]},
    {"sequence_bias": [[[i], -20.0] for i in range(2, VOCAB, 2)]},
    {"forced_bos_token_id": 7},
    {"forced_eos_token_id": 7},
    {"exponential_decay_length_penalty": [2, 2.0]},
    {"guidance_scale": 1.5},
    {"watermarking_config": {"bias": 9.0}},
    {"num_beams": 3},
    {"prompt_lookup_num_tokens": 2},
    {"cache_implementation": "static"},
    {"max_time": 1000.0},
    {"remove_invalid_values": True},
    {"renormalize_logits": True},
]
NO_OTHER_TOKENS = {  # but for rounding, more time, or a prompt of one token
    "cache_implementation", "forced_bos_token_id", "max_time", "prompt_lookup_num_tokens",
    "remove_invalid_values", "renormalize_logits",
}  # fmt: skip
HARMLESS = [
    {},
    {"do_sample": True, "temperature": 0.6, "top_k": 5, "top_p": 0.8},
    {"do_sample": True, "min_p": 0.1, "typical_p": 0.9, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3},
    {"max_length": 4096},
    {"cache_implementation": "hybrid"},
    {"num_return_sequences": 3, "do_sample": True},
    {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    {"use_cache": False},
    {"eos_token_id": MANY_ENDS},
    {"pad_token_id": 9},
    {"chat_format": "unheard of"},
]
REFUSED = [
    ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search"),
    ({"penalty_alpha": 0.6}, "contrastive_search"),
    ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, "group_beam_search"),
    ({"dola_layers": "high"}, "dola"),
    ({"constraints": [1]}, "constrained_beam_search"),
    ({"repetition_penalty": -1.0}, "strictly positive"),
    ({"suppress_tokens": "all"}, "too many dimensions"),
    ({"bad_words_ids": [3]}, "list of lists"),
    ({"eos_token_id": "</s>"}, "TypeError"),
    ({"stop_strings": ["a"]}, "tokenizer"),
]


def first(options):
    return next(iter(options), "nothing")


def few_of(cases, *names):
    """All cases as parameters; all but those of these names are slow, for there are many."""
    return [
        pytest.param(case, id=first(case), marks=[] if first(case) in names else pytest.mark.slow)
        for case in cases
    ]


@pytest.fixture
def model():
    return ModelSpec(CONFIG, seed=0).build()


def ask_for(model, options):
    model.generation_config = GenerationConfig(**{"eos_token_id": 1, "bos_token_id": 0, **options})


def ordinary(model, **more):
    """Greedy tokens as transformers itself gives them."""
    ids = torch.tensor([PROMPT])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=N,
                            do_sample=False, pad_token_id=0, **more)  # fmt: skip
    output = getattr(output, "sequences", output)
    return tuple(output[0, len(PROMPT) :].tolist())


@pytest.fixture(scope="module")
def plain():
    """Its tokens where nothing is asked for."""
    return ordinary(ModelSpec(CONFIG, seed=0).build())


def decoder_of(model, decode="graph"):
    recorder = Recorder(torch.device("cpu"))
    return make_decoder(decode, model, pack(model)[1], 40, recorder, lambda step: None)


@pytest.mark.parametrize(
    "options",
    few_of(BEYOND, "repetition_penalty", "min_length", "num_beams", "cache_implementation"),
)
def test_what_a_step_cannot_do_is_decoded_eagerly_with_a_warning(model, plain, options, caplog):
    ask_for(model, options)
    expected = ordinary(model)
    assert (expected == plain) == (first(options) in NO_OTHER_TOKENS)
    decoder = decoder_of(model)
    assert decoder.mode == "eager"
    assert f"its generation_config asks for {first(options)}=" in caplog.text
    tokens = decoder.generate(PROMPT, N)
    assert tokens.token_ids == expected and 0 < tokens.first_s <= tokens.last_s
    assert len(decoder.generate(PROMPT, N, ignore_eos=True).token_ids) == N
    caplog.clear()
    decoder_of(model, "eager")
    assert "cannot be recorded" not in caplog.text  # nothing else was asked for


@pytest.mark.parametrize(
    "options", few_of(HARMLESS, "nothing", "do_sample", "use_cache", "eos_token_id")
)
def test_what_makes_no_difference_is_recorded(model, options, caplog):
    ask_for(model, options)
    expected = ordinary(model, num_return_sequences=1)
    for decode in ("graph", "eager"):
        decoder = decoder_of(model, decode)
        assert decoder.mode == decode
        assert decoder.generate(PROMPT, N).token_ids == expected
    assert "cannot be recorded" not in caplog.text


def test_another_generation_config_than_that_of_the_step_is_refused(model):
    with dj.Djinn("1MiB", "cpu", "16KiB", decode="graph", max_model_len=40) as djinn:
        djinn.add("m", ModelSpec(CONFIG, seed=0))
        with djinn.lease("m") as leased:
            leased.generation_config.repetition_penalty = 1.3
        with pytest.raises(ConfigError, match="set_decode"):
            djinn.generate("m", PROMPT, N)
        assert djinn.set_decode("m", "graph") == "eager"
        ask_for(model, {"repetition_penalty": 1.3})
        assert djinn.generate("m", PROMPT, N).token_ids == ordinary(model)


@pytest.mark.parametrize("options, said", REFUSED, ids=lambda x: first(x) if x else "")
def test_what_transformers_cannot_do_is_refused(model, options, said):
    ask_for(model, options)
    with pytest.raises(ConfigError, match=rf"generation_config.*{said}.*generation_config"):
        decoder_of(model)


def test_baselines_refuse_it_as_well(model):
    model.generation_config.penalty_alpha = 0.6
    with pytest.raises(ConfigError, match="contrastive_search"):
        generate_eager(model, PROMPT, 4)


def test_a_request_that_samples_brings_its_own_options(model):
    """What the file says of sampling does not count; penalties and the like do."""
    how = Sampling(temperature=1.5, top_k=20, top_p=0.9, seed=4)
    model.generation_config = GenerationConfig(eos_token_id=1)
    plain = generate_eager(model, PROMPT, N, True, how).token_ids
    values = {"temperature": 0.01, "top_k": 1, "top_p": 0.01, "min_p": 0.99, "top_h": 0.01,
              "typical_p": 0.01, "epsilon_cutoff": 0.9, "eta_cutoff": 0.9}  # fmt: skip
    assert set(values) == set(OF_SAMPLING)
    for name, value in values.items():
        model.generation_config = GenerationConfig(eos_token_id=1, do_sample=True, **{name: value})
        assert generate_eager(model, PROMPT, N, True, how).token_ids == plain, name
    model.generation_config = GenerationConfig(eos_token_id=1, repetition_penalty=3.0)
    assert generate_eager(model, PROMPT, N, True, how).token_ids != plain


def test_nothing_else_than_ours_is_done_for_a_request_that_samples(model):
    """transformers may get options that `OF_SAMPLING` does not know yet."""
    model.generation_config = GenerationConfig(
        **{name: 0.5 for name in OF_SAMPLING if name != "top_k"}, top_k=3, do_sample=True
    )
    options = request_options(
        model, N, False, Sampling(temperature=0.7, top_k=5, top_p=0.9)
    )  # as with several beams
    config, unknown = model._prepare_generation_config(None, **options)
    model._prepare_special_tokens(config, True, device="cpu")
    processors = model._get_logits_processor(config, 4, logits_processor=LogitsProcessorList())
    assert [type(p).__name__ for p in processors] == [
        "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper"
    ]  # fmt: skip
    assert not unknown


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"watermarking_config": {"bias": 2.0}}], ids=first
)
def test_a_seed_decides_and_the_generator_of_the_process_is_left_alone(model, options):
    ask_for(model, options)
    before = torch.random.get_rng_state()
    drawn = [
        generate_eager(model, PROMPT, N, True, Sampling(temperature=1.5, seed=seed)).token_ids
        for seed in (4, 4, 5)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(before, torch.random.get_rng_state())


def test_what_generate_refuses_is_said_and_errors_of_the_device_are_not(model, monkeypatch):
    decoder = EagerDecoder(model)

    def refuse(error):
        def generate(*_, **__):
            raise error

        monkeypatch.setattr(model, "generate", generate)

    refuse(RuntimeError("expected scalar type Half"))
    with pytest.raises(ConfigError, match="generate can serve, got RuntimeError: expected scalar"):
        decoder.generate(PROMPT, 4)
    refuse(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        decoder.generate(PROMPT, 4)


def words():
    names = {f"w{i}": i for i in range(VOCAB)} | {"abcdef": VOCAB}  # which transformers looks up
    tokenizer = Tokenizer(WordLevel(names, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


def test_texts_that_end_a_sequence(model, tmp_path, caplog):
    tokens = ordinary(model)
    ask_for(model, {"stop_strings": [f"w{tokens[1]}"]})
    model.save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    with dj.Djinn("1MiB", "cpu", "16KiB", decode="graph", max_model_len=40) as djinn:
        djinn.add("m", tmp_path)
        assert "asks for stop_strings=" in caplog.text
        assert djinn.generate("m", PROMPT, N).token_ids == tokens[:2]
        assert djinn.generate("m", PROMPT, N, ignore_eos=True).token_ids == tokens
