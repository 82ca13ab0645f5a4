"""A faster way of decoding is used only where it gives what transformers' generate gives."""

from contextlib import nullcontext

import pytest
import torch
from tiny import CONFIGS, PROMPT, VOCAB, spec
from transformers import (
    GPTNeoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    OpenAIGPTConfig,
    Phi3Config,
    RobertaConfig,
    RwkvConfig,
)

from djinn_lib.engine.decode import cuda_graphs as recording
from djinn_lib.engine.decode.cuda_graphs import Recorder, Repeated
from djinn_lib.engine.decode.decoder import make_decoder
from djinn_lib.engine.decode.eager import generate_eager
from djinn_lib.engine.decode.kv_cache import KvCache, KvLayer
from djinn_lib.engine.decode.recorded import RecordedDecoder, _probe_lengths
from djinn_lib.engine.decode.reference import (
    AMPLIFIED,
    N_TOKENS,
    Followed,
    Reference,
    References,
    compare,
    ensure_alike,
    probe_prompt,
    take_reference,
)
from djinn_lib.engine.models.packing import pack
from djinn_lib.engine.models.spec import ModelSpec
from djinn_lib.errors import DjinnError

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB,
         "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.4}  # fmt: skip
ROPE = {"original_max_position_embeddings": 20, "rope_theta": 1e4}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, **ROPE}
WRONG = {
    "gpt_neo": (
        GPTNeoConfig(hidden_size=64, num_layers=2, num_heads=4, vocab_size=VOCAB, window_size=16,
                     attention_types=[[["global", "local"], 1]], initializer_range=0.4),
        "expected logits within",
    ),
    "openai-gpt": (
        OpenAIGPTConfig(n_embd=64, n_layer=2, n_head=4, vocab_size=VOCAB, initializer_range=0.4),
        "expected logits within",
    ),
    "roberta": (
        RobertaConfig(**SHAPE, intermediate_size=96, is_decoder=True, pad_token_id=2),
        "expected logits within",
    ),
    "rwkv": (
        RwkvConfig(hidden_size=64, attention_hidden_size=64, num_hidden_layers=2, vocab_size=VOCAB),
        "it keeps a state",
    ),
    "phi3-longrope": (
        Phi3Config(**SHAPE, intermediate_size=96, max_position_embeddings=600, pad_token_id=2,
                   original_max_position_embeddings=20, rope_parameters=LONGROPE),
        "rotary positions change with the length: longrope",
    ),
    "llama-dynamic": (
        LlamaConfig(**SHAPE, intermediate_size=96, max_position_embeddings=20,
                    rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}),
        "rotary positions change with the length: dynamic",
    ),
}  # fmt: skip


def decoder_of(model, decode="graph", max_model_len=64):
    recorder = Recorder(model.device)
    return make_decoder(decode, model, pack(model)[1], max_model_len, recorder, lambda step: None)


@pytest.mark.parametrize("name", WRONG)
def test_what_a_step_would_do_wrong_is_decoded_eagerly_with_a_warning(name, caplog):
    config, reason = WRONG[name]
    model = ModelSpec(config, seed=5).build()
    decoder = decoder_of(model)
    assert decoder.mode == "eager"
    assert "cannot be recorded" in caplog.text and reason in caplog.text
    expected = generate_eager(ModelSpec(config, seed=5).build(), PROMPT, 12, True)
    assert decoder.generate(PROMPT, 12, True).token_ids == expected.token_ids


ROUNDED = [("llama", "bfloat16"), ("mistral-sliding", "float16"), ("gpt2", "float32")]


@pytest.mark.parametrize(("name", "dtype"), ROUNDED)
def test_rounding_is_no_reason(name, dtype, caplog):
    assert decoder_of(spec(name, dtype).build()).mode == "graph"
    assert not caplog.text


# As sharp as the attention of random weights of Mistral-7B's shape, which has 4,096 columns.
SHARP = MistralConfig(
    hidden_size=256, intermediate_size=896, num_hidden_layers=32, num_attention_heads=4,
    num_key_value_heads=1, vocab_size=VOCAB, initializer_range=0.08,
)  # fmt: skip


def test_layers_that_amplify_rounding_are_no_reason():
    """The exact logits are those of single precision, from which any half precision differs."""
    references = References(ModelSpec(SHARP, "bfloat16", seed=2).build(), [64])
    exact = ModelSpec(SHARP, "bfloat16", seed=2).build().float()

    def follow(known, last=None):
        ids = torch.tensor([[*known.prompt_ids, *known.token_ids]])
        if last is not None:
            ids[0, -3] = last
        with torch.no_grad():
            return Followed(exact(ids).logits[0, 63:-1].bfloat16(), known.token_ids)

    known = references._reference(64, 0)
    with pytest.raises(DjinnError, match=r"expected logits within 0.05"):
        compare(follow(known), known)
    assert 0.05 < references.ensure_alike(follow) < 0.15
    with pytest.raises(DjinnError, match=r"expected logits within 0.1\d .* at token 4"):
        references.ensure_alike(lambda known: follow(known, last=7))  # instead of another token


def test_a_model_is_allowed_what_rounding_does_to_it_and_not_much_more():
    calm = LlamaConfig(**{**SHAPE, "initializer_range": 0.02}, intermediate_size=96)
    for dtype in ("float32", "float16", "bfloat16"):
        model = ModelSpec(calm, dtype, seed=5).build()
        references = References(model, [32])
        assert references._amplification(references._reference(32, 0)) == 1
        assert not any(module._forward_hooks for module in model.modules())
    flat = ModelSpec(calm, "bfloat16", seed=5).build()
    flat.lm_head.weight.data.zero_()  # all logits are 0
    references = References(flat, [32])
    assert references._amplification(references._reference(32, 0)) == 1
    chaotic = MistralConfig(**{**SHARP.to_dict(), "initializer_range": 0.4, "dtype": None})
    references = References(ModelSpec(chaotic, "bfloat16", seed=2).build(), [64])
    assert references._amplification(references._reference(64, 0)) == AMPLIFIED


real_update = KvLayer.update


def spoiled(how):
    """What a layer of the cache returns for one token, spoiled in some way."""

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = real_update(self, key_states, value_states, *args, **kwargs)
        return (keys, values) if self.prefilling else how(self, keys, values)

    return update


def forgets_the_first(layer, keys, values):
    return keys, values.index_fill(2, torch.zeros_like(layer.position), 0)


def forgets_the_last(layer, keys, values):
    return keys, values.index_fill(2, layer.position, 0)


def mixes_up_heads(layer, keys, values):
    return keys.flip(1), values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", [forgets_the_first, forgets_the_last, mixes_up_heads])
def test_a_cache_that_loses_something_is_noticed(how, dtype, monkeypatch, caplog):
    monkeypatch.setattr(KvLayer, "update", spoiled(how))
    assert decoder_of(spec("llama", dtype).build()).mode == "eager"
    assert "expected logits within" in caplog.text


def test_a_window_longer_than_short_prompts_is_looked_beyond(monkeypatch):
    """A step may be wrong only where the window begins to slide."""
    config = CONFIGS["mistral-sliding"].__class__(**{
        **CONFIGS["mistral-sliding"].to_dict(), "sliding_window": 150, "dtype": None
    })  # fmt: skip
    model = ModelSpec(config, seed=5).build()
    assert KvCache(config, 400, CPU).longest_window == 150
    assert KvCache(config, 100, CPU).longest_window == 0  # no prompt is as long
    assert decoder_of(model, max_model_len=400).mode == "graph"
    monkeypatch.setattr(model.config, "sliding_window", 400)
    references = References(ModelSpec(config, seed=5).build(), _probe_lengths(400, 150))
    wrong = RecordedDecoder(model, pack(model)[1], 400, Recorder(CPU))
    with pytest.raises(DjinnError, match=r"after a prompt of 156 tokens"):
        references.ensure_alike(lambda known: wrong._follow(known, Repeated(wrong._decode)))


def test_what_is_recorded_is_compared_and_not_only_the_code(monkeypatch, caplog):
    """A capture may hold a value that Python computed once."""

    class Frozen(Repeated):
        def replay(self):
            position = decoders[0].cache.position
            before = position.clone()
            super().replay()
            if torch.equal(before, position - 1):  # a step, not a prefill
                position.copy_(before)

    decoders = []
    real = RecordedDecoder._record_step

    def noted(self, *args):
        decoders.append(self)
        return real(self, *args)

    monkeypatch.setattr(RecordedDecoder, "_record_step", noted)
    monkeypatch.setattr(recording.Recorder, "record", lambda self, f, *rest: Frozen(f))
    assert decoder_of(spec("llama").build()).mode == "eager"
    assert "expected logits within" in caplog.text


class Remembers(LlamaForCausalLM):
    """Writes into a buffer in each forward pass."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("n_calls", torch.zeros(1), persistent=False)

    def forward(self, *args, logits_to_keep=0, **kwargs):
        self.n_calls += 1
        return super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)


def test_a_forward_pass_that_leaves_something_behind(caplog):
    model = Remembers(CONFIGS["llama"]).eval().requires_grad_(False)
    assert decoder_of(model).mode == "eager"
    assert "changes buffers of the model (n_calls)" in caplog.text


class OwnGenerate(LlamaForCausalLM):
    def generate(self, *args, **kwargs):
        return super().generate(*args, **kwargs)


def test_a_generate_of_its_own_is_used(caplog):
    model = OwnGenerate(CONFIGS["llama"]).eval().requires_grad_(False)
    assert decoder_of(model).mode == "eager"
    assert "it has a generate of its own" in caplog.text


def test_lengths_of_what_is_compared():
    assert _probe_lengths(512, 0) == [128 - N_TOKENS, 32]
    assert _probe_lengths(4096, 1024) == [1024 + N_TOKENS, 32]
    assert _probe_lengths(1030, 1024) == [1030 - N_TOKENS, 32]  # as far as there is room
    assert _probe_lengths(38, 0) == [32]
    assert _probe_lengths(8, 0) == [2]


def test_a_reference_is_what_generate_gives():
    model = spec("llama").build()
    prompt = probe_prompt(model, 20, seed=0)
    assert len(prompt) == 20 and not {0, 1} & set(prompt)  # the ends of a sequence
    assert prompt != probe_prompt(model, 20, seed=1)
    known = take_reference(model, prompt, 5)
    assert known.token_ids == generate_eager(model, prompt, 5, ignore_eos=True).token_ids
    ids = torch.tensor([[*prompt, *known.token_ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, 19:-1]
    torch.testing.assert_close(known.logits, logits, rtol=1e-4, atol=1e-4)


def test_a_router_that_rounding_tips_over_is_no_reason():
    """One prompt in three may differ, since what is wrong differs after every prompt."""
    references = References(spec("llama").build(), [8])
    n_good = []

    def follow(known):
        wrong = len(n_good) < n_bad
        n_good.append(1)
        logits = known.logits.flip(-1) if wrong else known.logits
        return Followed(logits, known.token_ids)

    n_bad = 2
    assert references.ensure_alike(follow) == 0  # of the third prompt alone
    n_good.clear()
    n_bad = 3
    with pytest.raises(DjinnError, match=r"expected logits within .* after a prompt of 8 tokens"):
        references.ensure_alike(follow)


def test_the_greatest_distance_of_accepted_logits_is_told():
    references = References(spec("llama").build(), [8, 12])

    def follow(known):
        share = 1e-4 if len(known.prompt_ids) == 8 else 3e-4
        logits = known.logits.clone()
        logits[2] += share * (logits[2] - logits[2].mean())
        logits[:, 3] = NEVER
        known.logits[:, 3] = NEVER  # an impossible id
        return Followed(logits, known.token_ids)

    assert references.ensure_alike(follow) == pytest.approx(3e-4, rel=0.01)


NEVER = float("-inf")
LOW = torch.finfo(torch.float32).min
ALIKE = [
    ([1.0, 2.0], [1.0, 2.0001], None),
    ([1.0, 2.1], [1.0, 2.0], "expected logits within"),
    ([1.0, float("nan")], [1.0, 2.0], "expected logits within"),
    ([10001.001, 10002.001, 10004.001], [10001.0, 10002.0, 10004.0], None),
    # What logits have in common hides nothing.
    ([101.0, 102.0, 104.1], [101.0, 102.0, 104.0], "expected logits within"),
    ([1.0, NEVER, 2.0], [1.0, NEVER, 2.0], None),
    ([1.0, 1.5, 2.0], [1.0, NEVER, 2.0], "same impossible ids"),
    ([1.0, LOW, 2.0], [1.0, LOW, 2.0], None),
    ([1.0, 1.5, 2.0], [1.0, LOW, 2.0], "same impossible ids"),
]


@pytest.mark.parametrize(("got", "expected", "said"), ALIKE)
def test_logits_that_are_alike_and_others(got, expected, said):
    with pytest.raises(DjinnError, match=said) if said else nullcontext():
        ensure_alike(torch.tensor(got), torch.tensor(expected))


def test_logits_that_rounding_makes_all_the_same():
    logits = torch.tensor([100.1, 100.2, 100.4])
    ensure_alike(logits.bfloat16(), logits)  # all of one value, so far from zero
    with pytest.raises(DjinnError, match="expected logits within"):
        ensure_alike(torch.tensor([90.0, 100.0, 110.0]), torch.full((3,), 100.0))


def test_other_tokens_count_where_none_is_as_likely():
    logits = torch.tensor([[0.0, 5.0, 4.9999, -5.0]])
    known = Reference((1, 2), (1,), logits)
    compare(Followed(logits, (2,)), known)  # which rounding may have chosen
    with pytest.raises(DjinnError, match="expected token 1 at token 0 after a prompt of 2"):
        compare(Followed(logits, (0,)), known)


def test_a_long_request_leaves_nothing_for_the_next():
    """transformers keeps the frequencies of the longest sequence that dynamic rope has seen."""
    config = WRONG["llama-dynamic"][0]
    prompts = [[(7 * i + 3) % VOCAB for i in range(n)] for n in (30, 120, 30)]
    model = ModelSpec(config, seed=5).build()
    first, _, again = (generate_eager(model, p, 8, ignore_eos=True).token_ids for p in prompts)
    assert first == again
    fresh = ModelSpec(config, seed=5).build()
    ids = torch.tensor([prompts[0]])
    expected = fresh.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8,
                              do_sample=False, eos_token_id=None, pad_token_id=0)  # fmt: skip
    assert first == tuple(expected[0, 30:].tolist())
