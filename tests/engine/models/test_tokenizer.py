"""Tokenizers: a broken one is refused when its model is added; text and chats become ids."""

import asyncio
import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny import saved, spec
from tokenizer_factory import END_ID, START_ID, TEXT, make_tokenizer, save_tokenizer

import djinn_lib as dj
from djinn_lib.engine.models.tokenizer import Tokenizer, read_tokenizer
from djinn_lib.errors import CheckpointError, ConfigError

HI = [ord("h"), ord("i")]
USER = {"role": "user", "content": "hi"}


def write(folder, **files):
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)


# -- text and ids ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("hi", [START_ID, *HI]),
        ("<s>hi", [START_ID, *HI]),
        ("<s><s>hi", [START_ID, START_ID, *HI]),
        ("</s>hi", [START_ID, END_ID, *HI]),
        ("hi<s>hi", [START_ID, *HI, START_ID, *HI]),
        ("<s>", [START_ID]),
        ("", [START_ID]),
    ],
)
def test_a_text_begins_with_one_start(text, ids):
    assert Tokenizer(make_tokenizer()).encode(text) == ids


def test_starts_of_several_tokens_and_ends_are_known_too():
    tokenizer = Tokenizer(make_tokenizer(around=("<s>", "</s>", TEXT, "</s>")))
    start = [START_ID, END_ID]
    assert tokenizer.encode("hi") == [*start, *HI, END_ID]
    assert tokenizer.encode("<s></s>hi") == [*start, *HI, END_ID]
    assert tokenizer.encode("<s>hi") == [*start, START_ID, *HI, END_ID]


def test_a_conversation_is_formatted_up_to_the_answer():
    tokenizer = make_tokenizer()
    text = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert text == "<s>[user]hi[assistant]"
    ids = Tokenizer(tokenizer).encode_chat([USER])
    assert ids == Tokenizer(tokenizer).encode(text) == [START_ID, *map(ord, text[3:])]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('no system') }}", "got TemplateError: no system"),
        (5, "expected messages that the model's chat template can format"),
    ],
)
def test_templates_that_cannot(template, message):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=message):
        Tokenizer(tokenizer).encode_chat([USER])


def test_ids_that_cannot_be_decoded_are_worth_a_warning(caplog):
    tokenizer = Tokenizer(make_tokenizer())
    assert tokenizer.decode([START_ID, *HI, 450]) == "hi"
    with caplog.at_level(logging.WARNING):
        assert tokenizer.decode([-1]) is None
    assert "expected token ids that the tokenizer can decode" in caplog.text


def test_many_threads_may_ask_at_once():
    tokenizer = Tokenizer(make_tokenizer())
    with ThreadPoolExecutor(8) as threads:
        for ids in threads.map(lambda i: tokenizer.encode("<s>hi" if i % 2 else "hi"), range(200)):
            assert ids == [START_ID, *HI]


# -- folders ---------------------------------------------------------------------------------


# The class of plbart needs a package that this project does not install.
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "biogpt", "plbart"])
def test_a_folder_without_a_vocabulary_has_no_tokenizer(tmp_path, model_type):
    write(tmp_path, config__json={"model_type": model_type}, chat_template__jinja="x")
    assert read_tokenizer(tmp_path) is None


def test_a_tokenizer_comes_from_the_files_that_its_class_reads(tmp_path):
    vocab = {"h": 0, "i": 1, "hi": 2}
    write(tmp_path, config__json={"model_type": "gpt2"}, vocab__json=vocab)
    write(tmp_path, merges__txt="#version: 0.2\nh i\n")
    assert read_tokenizer(tmp_path).encode("hi") == [2]


def test_broken_files_are_said_at_add(tmp_path):
    """Of every kind: see the tests of damaged checkpoints."""
    shutil.copytree(saved("llama"), tmp_path, dirs_exist_ok=True)
    save_tokenizer(tmp_path)
    write(tmp_path, tokenizer__json="{")
    with dj.Djinn("1MiB", "cpu", page="16KiB") as djinn:
        with pytest.raises(CheckpointError, match="remove the tokenizer's files") as said:
            djinn.add("m", tmp_path)
        assert str(tmp_path) in str(said.value)
        assert djinn.residency().empty


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "added_tokens"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_tokenizer_without_its_vocabulary_is_incomplete(tmp_path, name, model_type):
    write(tmp_path, config__json={"model_type": model_type}, **{f"{name}__json": "{}"})
    with pytest.raises(CheckpointError, match=f"{name}.json"):
        read_tokenizer(tmp_path)


def test_a_vocabulary_whose_package_is_missing_is_said(tmp_path):
    write(tmp_path, config__json={"model_type": "plbart"})
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"not one")
    with pytest.raises(CheckpointError, match=r"sentencepiece\.bpe\.model"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["vocab__json", "merges__txt"])
def test_half_a_vocabulary_is_incomplete(tmp_path, name):
    halves = {"vocab__json": {"h": 0, "i": 1, "hi": 2}, "merges__txt": "#version: 0.2\nh i\n"}
    write(tmp_path, config__json={"model_type": "gpt2"}, **{name: halves[name]})
    with pytest.raises(CheckpointError, match=name.replace("__", ".")):
        read_tokenizer(tmp_path)


def test_code_of_a_tokenizer_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # not even where somebody would agree
    save_tokenizer(tmp_path)
    code = {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}
    write(tmp_path, config__json={"model_type": "llama"}, tokenizer_config__json={**code})
    with pytest.raises(CheckpointError, match="pass trust_remote_code=True"):
        read_tokenizer(tmp_path)


# -- in a Djinn ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = shutil.copytree(saved("llama"), tmp_path_factory.mktemp("with tokenizer") / "m")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def djinn(folder):
    with dj.Djinn("1MiB", "cpu", page="16KiB", progress=lambda _: None) as djinn:
        djinn.add("m", folder)
        djinn.add("by ids", spec("llama"))
        yield djinn


def test_text_ids_and_what_the_tokenizer_returns_are_the_same_prompt(djinn, folder):
    theirs = make_tokenizer()
    theirs.pad_token = "</s>"
    said = djinn.generate("m", "hi", 6, ignore_eos=True)
    ids = djinn.tokenize("m", "hi")
    assert ids == [START_ID, *HI]
    assert said.text == theirs.decode(said.token_ids, skip_special_tokens=True)
    padded = theirs(["hi", "<s>longer"], padding=True, return_tensors="pt", add_special_tokens=True)
    assert padded["attention_mask"].min() == 0
    for prompt in (ids, theirs("hi"), theirs("hi", return_tensors="pt"), "<s>hi"):
        assert djinn.generate("m", prompt, 6, ignore_eos=True).token_ids == said.token_ids
    first, _ = djinn.generate("m", padded, 6, ignore_eos=True)
    assert first.token_ids == said.token_ids
    assert djinn.generate("by ids", ids, 6, ignore_eos=True).token_ids == said.token_ids


def test_chat_is_generate_with_the_template(djinn):
    said = djinn.chat("m", [USER], 6, ignore_eos=True, temperature=1, seed=3)
    again = djinn.generate("m", "<s>[user]hi[assistant]", 6, True, temperature=1, seed=3)
    assert said.token_ids == again.token_ids
    with pytest.raises(ConfigError, match="unknown role system"):
        djinn.chat("m", [{"role": "system", "content": "hi"}])
    with pytest.raises(ConfigError, match="max_new_tokens"):
        djinn.chat("m", [USER], 0)


def test_a_model_without_a_tokenizer_says_so(djinn):
    for ask in (djinn.generate, djinn.submit, djinn.tokenize):
        with pytest.raises(ConfigError, match="'by ids' has no tokenizer, so it cannot read text"):
            ask("by ids", "hi")
    with pytest.raises(ConfigError, match="no tokenizer"):
        djinn.chat("by ids", [USER])
    with pytest.raises(ConfigError, match=r"^prompt 1 of the list: .* no tokenizer"):
        djinn.generate("by ids", [[5], "hi"])
    with pytest.raises(ConfigError, match="expected text to tokenize"):
        djinn.tokenize("m", [5, 6])


def test_lists_are_served_in_order_by_every_way_of_asking(djinn):
    prompts = ["hi", [5, 6, 7], "<s>hi"]
    want = [djinn.generate("m", prompt, 4, True).token_ids for prompt in prompts]
    assert [g.token_ids for g in djinn.generate("m", prompts, 4, True)] == want
    assert [p.result().token_ids for p in djinn.submit("m", prompts, 4, True)] == want
    assert [g.token_ids for g in asyncio.run(djinn.agenerate("m", prompts, 4, True))] == want
    assert asyncio.run(djinn.agenerate("m", "hi", 4, True)).token_ids == want[0]


def test_a_list_with_one_bad_prompt_asks_for_nothing(djinn):
    for prompts, message in (
        (["hi", []], "^prompt 1 of the list: expected a prompt of at least 1 token"),
        (["hi", [500]], "^prompt 1 of the list: expected token ids from 0 to 499, got 500"),
        (["hi", 5], "^prompt 1 of the list: expected a prompt, got 5"),
    ):
        djinn.reset()
        for ask in (djinn.generate, djinn.submit):
            with pytest.raises(ConfigError, match=message):
                ask("m", prompts)
        assert djinn.residency()["resident_bytes"].sum() == 0


def test_a_tokenizer_of_another_model_is_noticed(tmp_path, caplog):
    dj.ModelSpec({**SMALL, "vocab_size": 90}).build().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with dj.Djinn("1MiB", "cpu", page="16KiB") as djinn:
        with caplog.at_level(logging.WARNING):
            djinn.add("m", tmp_path)
        assert "the tokenizer of 'm' knows 97 ids, and the model 90" in caplog.text
        with pytest.raises(ConfigError, match="gives ids below 90, got 200: tokenizer and model"):
            djinn.generate("m", "hi")
        with pytest.raises(ConfigError, match="gives ids below 90"):
            djinn.chat("m", [USER])
        assert len(djinn.generate("m", [5, 6], 2, ignore_eos=True).token_ids) == 2


SMALL = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
         "num_attention_heads": 2}  # fmt: skip


def test_a_generation_survives_a_text_that_cannot_be_written(djinn, monkeypatch):
    def fail(*_, **__):
        raise IndexError("piece id is out of range")

    served = djinn._models["m"]
    monkeypatch.setattr(served.tokenizer.own, "decode", fail, raising=False)
    said = djinn.generate("m", "hi", 4, ignore_eos=True)
    assert (len(said.token_ids), said.text) == (4, None)
