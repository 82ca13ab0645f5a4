"""The compressed form of a page: bits that come back, and sizes."""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numba.core import caching, config

from djinn_lib.engine.memory.compressed.compiled import compiled
from djinn_lib.engine.memory.compressed.decode import decode
from djinn_lib.engine.memory.compressed.encode import encode
from djinn_lib.engine.memory.compressed.form import BLOCK_WORDS, EXPONENT_BITS, TILE_WORDS

BITS = st.sampled_from(sorted(EXPONENT_BITS.values()))


def words_of(weights):
    return weights.view(torch.int16).numpy().view(np.uint16)


def normal(n_words, dtype, sigma=0.02, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(n_words, dtype=dtype).normal_(0, sigma, generator=generator)


def round_trip(words, bits):
    """Compress and decode; returns the compressed bytes."""
    compressed, form = encode(words, bits)
    assert (form.n_words, form.n_bytes) == (len(words), len(compressed))
    again = np.full_like(words, 0xA5A5)
    decode(compressed, form, again)
    assert np.array_equal(again, words)
    return compressed


@given(npst.arrays(np.uint16, st.integers(1, 300)), BITS)
def test_any_bits_come_back(words, bits):
    round_trip(words, bits)


@given(
    pieces=st.lists(
        st.tuples(
            st.one_of(
                st.integers(0, 0xFFFF),  # a constant
                st.sampled_from(["normal", "random", "rising", "special"]),
            ),
            st.integers(1, 3 * BLOCK_WORDS),
        ),
        min_size=1,
        max_size=6,
    ),
    bits=BITS,
    seed=st.integers(0, 99),
)
def test_pages_of_very_different_pieces_come_back(pieces, bits, seed):
    rng = np.random.default_rng(seed)
    special = np.array([0, 0x8000, 1, 0x8001, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x7C00, 0xFC01])
    made = {
        "normal": lambda n: words_of(normal(n, torch.bfloat16, 10.0 ** rng.integers(-6, 3))),
        "random": lambda n: rng.integers(0, 1 << 16, n),
        "rising": lambda n: np.arange(n),
        "special": lambda n: rng.choice(special, n),
    }
    parts = [made[k](n) if isinstance(k, str) else np.full(n, k) for k, n in pieces]
    round_trip(np.concatenate(parts).astype(np.uint16), bits)


@pytest.mark.parametrize("bits", sorted(EXPONENT_BITS.values()))
@pytest.mark.parametrize("n_words", [1, 3, 4, 5, BLOCK_WORDS, BLOCK_WORDS + 1, TILE_WORDS + 7])
def test_lengths_around_blocks_and_tiles_come_back(n_words, bits):
    round_trip(words_of(normal(n_words, torch.bfloat16)), bits)
    round_trip(np.full(n_words, 0x3F80, np.uint16), bits)


@pytest.mark.parametrize("bits", sorted(EXPONENT_BITS.values()))
def test_all_patterns_come_back_in_any_order(bits, rng):
    every = np.arange(1 << 16, dtype=np.uint16)
    round_trip(every, bits)
    round_trip(rng.permutation(np.repeat(every, 2)), bits)


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.bfloat16, 0.672), (torch.float16, 0.861)], ids=str
)
@pytest.mark.parametrize("sigma", [0.02, 0.013, 1.0])
def test_size_of_normal_weights(dtype, most, sigma):
    weights = normal(4 * TILE_WORDS, dtype, sigma)
    compressed = round_trip(words_of(weights), EXPONENT_BITS[dtype])
    assert len(compressed) <= most * weights.nbytes


@pytest.mark.parametrize(("bits", "most"), [(8, 0.71), (5, 0.78)])
def test_the_worst_case_is_as_stated(bits, most):
    words = (np.arange(TILE_WORDS) << (15 - bits)).astype(np.uint16)  # each symbol alike
    compressed = round_trip(words, bits)
    sections = 12 * 16 + 16 + 9 * 16  # starts, ranks, alignment
    assert most - 0.01 < len(compressed) / TILE_WORDS - 2 <= most + sections / TILE_WORDS


def test_code_is_compiled_where_it_cannot_be_kept(monkeypatch):
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    assert compiled(lambda n: n + 1)(2) == 3


def damage(kept):
    for path in kept.iterdir():
        path.write_bytes(path.read_bytes()[:9])


def fill_the_disk(kept):
    shutil.rmtree(kept)
    kept.touch()


def leave_alone(kept):
    pass


@pytest.mark.parametrize("happen", [leave_alone, damage, fill_the_disk])
def test_compiled_code_is_kept_but_nothing_depends_on_it(happen, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))

    def add_one(n):
        return n + 1

    first, second, third = (compiled(add_one) for _ in range(3))
    assert first(2) == 3
    (kept,) = tmp_path.iterdir()
    assert {path.suffix for path in kept.iterdir()} == {".nbi", ".nbc"}
    happen(kept)
    assert second(2) == 3
    if happen is not fill_the_disk:
        third(2)
        assert third.stats.cache_hits and not third.stats.cache_misses  # damaged code is replaced


N_ADDED = 1


def test_another_constant_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))

    def add(n):
        return n + N_ADDED

    assert compiled(add)(2) == 3
    monkeypatch.setitem(globals(), "N_ADDED", 5)  # as if another file had changed
    assert compiled(add)(2) == 7
