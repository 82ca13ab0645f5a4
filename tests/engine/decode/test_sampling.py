"""How tokens are chosen: what the words mean, and what is refused before anything waits."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from tiny import spec

import djinn_lib as dj
from djinn_lib.engine.decode.sampling import Sampler, Sampling
from djinn_lib.errors import ConfigError, shown

CPU = torch.device("cpu")


def test_numbers_of_any_kind_become_plain_ones():
    sampling = Sampling(
        temperature=np.float32(1), top_k=np.int64(5), top_p=1, seed=np.uint64(2**64 - 1),
        max_new_tokens=np.int16(3), ignore_eos=np.True_, stop=["a"],
    )  # fmt: skip
    plain = Sampling(
        temperature=1.0, top_k=5, top_p=1.0, seed=2**64 - 1, max_new_tokens=3, ignore_eos=True,
        stop=("a",),
    )  # fmt: skip
    assert sampling == plain and hash(sampling) == hash(plain)
    kinds = [type(getattr(sampling, field.name)) for field in fields(sampling)]
    assert kinds == [float, int, float, int, int, bool, tuple]


WRONG = [
    *(("temperature", t) for t in (-1, -1e-9, True, "1", None, np.nan, np.inf, 10**400, 1e300, 1j)),
    *(("top_k", k) for k in (-1, 5.0, 2.5, True, "5", None, 2**70, [5])),
    *(("top_p", p) for p in (0, -0.1, 1.1, True, "1", None, np.nan, np.inf)),
    *(("seed", s) for s in (-1, 2**64, 2**70, 1.0, True, "0", [0])),
    *(("stop", s) for s in ("", [""], ["a", ""], 5, [5], {"a"}, b"a", iter("a"))),
    *(("max_new_tokens", n) for n in (0, -1, 2.0, "5", True, 2**31, 2**70)),
    *(("ignore_eos", e) for e in ("no", 1)),
    ("top_q", 1),
    ("max_tokens", 5),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=shown)
def test_what_means_nothing(name, value):
    with pytest.raises(ConfigError, match=name):
        Sampling.of(None, None, None, {"temperature": 1.0, name: value})


def test_draws_follow_the_probabilities():
    logits, n = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])), 4000

    def close(expected, **how):
        drawn = Sampler(Sampling(**how), CPU).draw(logits.expand(n, -1)).flatten()
        shares, expected = torch.bincount(drawn, minlength=4) / n, torch.tensor(expected)
        # Within five standard deviations of a share.
        return torch.allclose(shares, expected / expected.sum(), atol=5 * (0.25 / n) ** 0.5)

    assert close([0.5, 0.3, 0.15, 0.05], temperature=1.0)
    assert close([0.5, 0.3, 0, 0], temperature=1.0, top_k=2)
    assert close([0.5, 0.3, 0.15, 0], temperature=1.0, top_p=0.9)
    assert close([0.25, 0.09, 0.0225, 0.0025], temperature=0.5)


def test_hardly_any_temperature_is_none():
    assert Sampling(temperature=1e-40).greedy
    assert Sampling(temperature=np.float64(0)).greedy
    assert not Sampling(temperature=1e-5).greedy


@pytest.mark.parametrize("temperature", [1e-5, 1, 1e6])
@pytest.mark.parametrize("options", [{}, {"top_k": 2**31 - 1}, {"top_p": 1e-300}], ids=str)
def test_the_extremes_draw_without_overflow(temperature, options):
    logits = torch.tensor([[-1e4, 3.0, 1e4, float("-inf")]])
    sampler = Sampler(Sampling(temperature=temperature, **options), CPU)
    drawn = {int(sampler.draw(logits)) for _ in range(20)}
    assert drawn <= {0, 1, 2}
    assert temperature > 1 or drawn == {2}


def test_a_seed_draws_the_same_again_and_none_does_not():
    logits = torch.zeros(1, 2**20)

    def drawn(seed):
        return int(Sampler(Sampling(temperature=1.0, seed=seed), CPU).draw(logits))

    assert drawn(7) == drawn(np.int32(7)) == drawn(7)
    assert len({drawn(None) for _ in range(4)}) > 1


@pytest.fixture(scope="module", params=["eager", "graph"])
def djinn(request):
    with dj.Djinn("1MiB", "cpu", page="16KiB", decode=request.param, progress=lambda _: None) as it:
        it.add("m", spec("llama"))
        yield it


def test_refusals_come_before_anything_is_loaded(djinn):
    djinn.reset()
    for name, value in dict(WRONG).items():
        for ask in (djinn.generate, djinn.submit):
            with pytest.raises(ConfigError, match=name):
                ask("m", [5, 6], **{name: value})
    assert djinn.residency()["resident_bytes"].sum() == 0


def test_without_a_seed_every_prompt_of_a_list_is_drawn_by_itself(djinn):
    said = djinn.generate("m", [[5, 6]] * 4, 8, True, temperature=1.0)
    assert len({g.token_ids for g in said}) > 1
    said = djinn.generate("m", [[5, 6]] * 3, 8, True, temperature=1, seed=1)
    assert len({g.token_ids for g in said}) == 1


NO_CHOICE = [
    {"temperature": 1e-40}, {"temperature": 2, "top_k": 1}, {"temperature": 2, "top_p": 1e-6}
]  # fmt: skip


@pytest.mark.parametrize("how", NO_CHOICE, ids=str)
def test_what_leaves_no_choice_gives_the_most_likely_tokens(djinn, how):
    greedy = djinn.generate("m", [5, 6], 8, ignore_eos=True)
    assert djinn.generate("m", [5, 6], 8, ignore_eos=True, **how).token_ids == greedy.token_ids


def test_every_way_of_decoding_draws_the_same_and_leaves_torchs_generator_alone(djinn):
    def sample(**more):
        asked = {"temperature": 1.5, "top_k": 50, "top_p": 0.9, **more}
        return djinn.generate("m", [5, 6], 12, ignore_eos=True, **asked).token_ids

    before, own = torch.random.get_rng_state(), djinn.decode_modes["m"]
    drawn = sample(seed=9)
    sample()
    assert torch.equal(before, torch.random.get_rng_state())
    assert len({sample(seed=seed) for seed in range(6)}) == 6
    djinn.set_decode("m", "graph" if own == "eager" else "eager")
    assert sample(seed=9) == drawn
    djinn.set_decode("m", own)


def test_a_sampling_and_keywords_beside_it(djinn):
    """As in transformers: what is said in the call counts more."""
    asked = dj.Sampling(max_new_tokens=6, ignore_eos=True, temperature=1.0, seed=4)
    said = djinn.generate("m", [5, 6], sampling=asked).token_ids
    assert len(said) == 6
    assert djinn.submit("m", [5, 6], sampling=asked).result().token_ids == said
    assert djinn.generate("m", [5, 6], 6, True, temperature=1.0, seed=4).token_ids == said
    assert djinn.generate("m", [5, 6], 3, sampling=asked).token_ids == said[:3]
    greedy = djinn.generate("m", [5, 6], sampling=asked, temperature=0).token_ids
    assert greedy == djinn.generate("m", [5, 6], 6, ignore_eos=True).token_ids != said
    drawn = {djinn.generate("m", [5, 6], sampling=asked, seed=None).token_ids for _ in range(4)}
    assert len(drawn) > 1
    assert len(djinn.generate("m", [5, 6], ignore_eos=True).token_ids) == 50


def test_what_is_passed_in_the_wrong_place_says_so(djinn):
    for wrong in ({"seed": 1}, 5, dj.Sampling):
        with pytest.raises(ConfigError, match=r"expected sampling to be a dj\.Sampling"):
            djinn.generate("m", [5], sampling=wrong)
    with pytest.raises(ConfigError, match="pass it by its name, sampling="):
        djinn.generate("m", [5], dj.Sampling())
