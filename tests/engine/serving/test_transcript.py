"""Tokens to pieces of text: no character is cut, and stop texts end them."""

from byte_tokenizer import bytes_as_characters, words_and_bytes
from hypothesis import given
from hypothesis import strategies as st

from djinn_lib.engine.models.tokenizer import Tokenizer
from djinn_lib.engine.serving.transcript import Transcript

BYTES, WORDS = Tokenizer(bytes_as_characters()), Tokenizer(words_and_bytes())


def read(tokenizer, token_ids, stops=()):
    """The pieces, how many tokens were taken, and the transcript."""
    pieces = []
    transcript = Transcript(tokenizer, stops, pieces.append)
    n_taken = 0
    for token in token_ids:
        n_taken += 1
        if transcript.add(token):
            break
    transcript.finish()
    assert transcript.text == "".join(pieces)
    return pieces, n_taken, transcript


def word_ids(*words):
    return WORDS.own.convert_tokens_to_ids(list(words))


def test_a_character_comes_with_its_last_byte():
    ids = BYTES.encode("aé中🙂b")
    assert len(ids) == 1 + 2 + 3 + 4 + 1
    transcript, pieces = Transcript(BYTES, (), lambda piece: pieces.append(piece)), []
    after = []
    for token in ids:
        transcript.add(token)
        after.append(len(pieces))
    assert pieces == ["a", "é", "中", "🙂", "b"]
    assert after == [1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 5]


def test_spaces_between_words_are_kept_and_the_first_is_not():
    ids = word_ids("\u2581Hello", "\u2581world", "\u2581", "H", "i", ".")
    pieces, _, _ = read(WORDS, ids)
    assert "".join(pieces) == "Hello world Hi." == WORDS.decode(ids)
    special = [ids[0], WORDS.own.eos_token_id, *ids[1:]]
    assert "".join(read(WORDS, special)[0]) == "Hello world Hi."


@given(ids=st.lists(st.integers(0, len(BYTES) - 1), max_size=30))
def test_the_pieces_are_the_text_whatever_the_tokens(ids):
    """Also of bytes that are no characters at all."""
    pieces, _, transcript = read(BYTES, ids)
    assert "".join(pieces) == BYTES.decode(ids)
    assert all(pieces) and not transcript.stopped


def byte_ids(text):
    return WORDS.own.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in text.encode()])


SOME = [*([i] for i in range(1, 7)), [WORDS.own.eos_token_id], *map(byte_ids, "aé中🙂")]


@given(groups=st.lists(st.sampled_from(SOME), max_size=20))
def test_words_and_characters_of_bytes_in_any_order(groups):
    ids = [token for group in groups for token in group]
    assert "".join(read(WORDS, ids)[0]) == WORDS.decode(ids)


@given(
    text=st.text(st.sampled_from("ab\né🙂"), max_size=20),
    stops=st.lists(st.text(st.sampled_from("ab\né🙂"), min_size=1, max_size=4), max_size=3),
)
def test_a_stop_text_ends_it_where_it_first_appears(text, stops):
    _, n_taken, transcript = read(BYTES, BYTES.encode(text), stops)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert transcript.stopped == bool(ends)
    if not ends:
        assert transcript.text == text
        return
    seen = text[: min(ends)]  # no more tokens are taken than the first stop text needs
    assert n_taken == len(seen.encode())
    assert transcript.text == seen[: min(seen.find(s) for s in stops if s in seen)]
    assert not any(stop in transcript.text for stop in stops)


def test_what_may_begin_a_stop_text_waits_until_it_does_not():
    pieces = []
    transcript = Transcript(BYTES, ("END", "\n\n"), pieces.append)
    for token in BYTES.encode("a\nbEN"):
        transcript.add(token)
    assert pieces == ["a", "\nb"]
    transcript.finish()
    assert pieces == ["a", "\nb", "EN"]


def test_text_before_an_unfinished_character_is_searched_too():
    ids = BYTES.encode("xé")[:-1]
    assert read(BYTES, ids)[0] == ["x", "\ufffd"]
    assert read(BYTES, ids, ["x"])[2].text == ""
