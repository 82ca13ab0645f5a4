"""What is taken for a prompt, and what is not: nothing slips through as token ids."""

import re
from array import array
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BatchEncoding

from djinn_lib.engine.prompts import is_conversation, read_ids, read_messages, read_prompts
from djinn_lib.errors import ConfigError

IDS = [5, 6, 7]


@pytest.mark.parametrize(
    "prompt",
    [
        [5, 6, 7],
        (5, 6, 7),
        range(5, 8),
        array("i", IDS),
        deque(IDS),
        [np.int64(5), np.uint8(6), 7],
        list(torch.tensor(IDS)),
        np.array(IDS),
        np.array([IDS], dtype=np.uint16),
        torch.tensor(IDS),
        torch.tensor([IDS], dtype=torch.int32),
        torch.tensor(IDS, dtype=torch.uint64),
        {"input_ids": IDS},
        {"input_ids": [IDS]},
        {"input_ids": torch.tensor([IDS]), "attention_mask": torch.ones(1, 3)},
        BatchEncoding({"input_ids": np.array([IDS]), "token_type_ids": [[0, 0, 0]]}),
    ],
    ids=str,
)
def test_forms_of_one_prompt_of_ids(prompt):
    prompts, several = read_prompts(prompt)
    assert (prompts, several) == ([IDS], False)
    assert all(type(i) is int for i in prompts[0])


@pytest.mark.parametrize(
    ("ids", "mask"),
    [
        ([[0, 0, 5, 6, 7]], [[0, 0, 1, 1, 1]]),
        ([[5, 6, 7, 0]], [[1, 1, 1, 0]]),
        ([0, 5, 6, 7], [0, 1, 1, 1]),
        (torch.tensor([[0, 5, 6, 7]]), torch.tensor([[False, True, True, True]])),
        (np.array([[5, 6, 7, 0]]), np.array([[1.0, 1.0, 1.0, 0.0]])),
    ],
    ids=str,
)
def test_padding_is_dropped(ids, mask):
    assert read_prompts({"input_ids": ids, "attention_mask": mask}) == ([IDS], False)


def test_several_prompts():
    assert read_prompts("one") == (["one"], False)
    assert read_prompts(["one"]) == (["one"], True)
    assert read_prompts(["one", "two"]) == (["one", "two"], True)
    assert read_prompts([IDS, [8]]) == ([IDS, [8]], True)
    mixed = ["text", torch.tensor(IDS), range(3), {"input_ids": [[8]]}]
    assert read_prompts(mixed) == (["text", IDS, [0, 1, 2], [8]], True)
    padded = {"input_ids": [[0, 8], [6, 7]], "attention_mask": [[0, 1], [1, 1]]}
    assert read_prompts(padded) == ([[8], [6, 7]], True)


def test_empty_prompts_are_left_for_the_model_to_refuse():
    assert read_prompts([]) == ([[]], False)
    assert read_prompts("") == ([""], False)
    assert read_prompts({"input_ids": [0], "attention_mask": [0]}) == ([[]], False)


@pytest.mark.parametrize(
    "prompt",
    [
        None, True, 5, 1.5, 1j, b"hi", bytearray(b"hi"), memoryview(b"hi"), {5, 6}, iter(IDS),
        object(), int, {}, {"ids": IDS}, {"input_ids": None}, {"input_ids": "hi"},
        [5.0], [5, True], [True], [5, None], [5, "a"], [5, [6]], [np.float32(5)], [5j], [b"a"],
        array("d", [5.0]), np.array([5.0]), np.array([True]), np.array(["a"]), np.array(5),
        np.array([5, 6], dtype=object), np.ma.array([5, 6], mask=[False, True]),
        torch.tensor(5), torch.tensor([5.0]), torch.tensor([True]), torch.tensor([5j]),
        torch.tensor([[5], [6]]), torch.tensor([[[5]]]), torch.empty(3, dtype=int, device="meta"),
        torch.tensor([5, 6]).to_sparse(), [torch.tensor(5.0)], [torch.tensor([[5], [6]])],
        [["a"]], [[[5]]], [[5.0]], ["a", 5], ["a", b"b"], range(10**12),
        {"input_ids": [[5], [6]]},
        {"input_ids": IDS, "pixel_values": 1},
        {"input_ids": [IDS], "attention_mask": [[1, 1]]},
        {"input_ids": [IDS], "attention_mask": [[1, 0, 1]]},
        {"input_ids": [IDS], "attention_mask": [[1, 2, 1]]},
        {"input_ids": [IDS], "attention_mask": ["abc"]},
        {"input_ids": [IDS], "attention_mask": 5},
        {"input_ids": torch.empty(0, 3, dtype=int), "attention_mask": torch.empty(0, 3)},
    ],
    ids=lambda prompt: re.sub("0x[0-9a-f]+", "", f"{type(prompt).__name__} {prompt!r}")[:60],
)  # fmt: skip
def test_nothing_else_is_a_prompt(prompt):
    with pytest.raises(ConfigError, match="expected"):
        read_prompts(prompt)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_no_prompt():
    with pytest.raises(ConfigError, match="a value of type Tensor"):
        read_ids(torch.nested.nested_tensor([torch.tensor([5]), torch.tensor([6, 7])]))


def test_a_refusal_says_which_prompt_and_which_id():
    with pytest.raises(ConfigError, match=r"^prompt 1 of the list: .*whole numbers, got 6.5 at"):
        read_prompts([IDS, [5, 6.5]])
    with pytest.raises(ConfigError, match="several prompts pass a list of them"):
        read_prompts(torch.tensor([[5], [6]]))


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: m[0]], ids=["conversation", "message"])
def test_a_conversation_is_sent_to_chat(wrap):
    with pytest.raises(ConfigError, match=r"use chat\(name, messages\)"):
        read_prompts(wrap([{"role": "user", "content": "Hi"}]))


def test_conversations():
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]
    assert read_messages(tuple(messages)) == messages
    assert read_messages("Hi") == messages[1:]
    assert is_conversation(messages) and not any(map(is_conversation, ("Hi", [5], [], {}, [{}])))
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert read_messages([called]) == [{"role": "assistant", "tool_calls": [{"name": "f"}]}]


@pytest.mark.parametrize(
    "messages",
    [
        None, b"Hi", [], {}, 5, [5], ["Hi"], [{}], [[{"role": "user", "content": "Hi"}]],
        {"role": "user", "content": "Hi"}, [{"role": "user"}], [{"role": 5, "content": "Hi"}],
        [{"role": "user", "content": None}], [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": "Hi"}, {"content": "Hi"}],
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_conversation(messages):
    with pytest.raises(ConfigError, match="expected"):
        read_messages(messages)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(),
    st.complex_numbers(), st.sampled_from([np.int64(5), np.float32(5), np.bool_(1), "input_ids"]),
)  # fmt: skip
OBJECTS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(
            st.sampled_from(["input_ids", "attention_mask", "role", "content"]), inner, max_size=3
        ),
        st.lists(st.integers(0, 9), max_size=4).map(np.array),
        st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), max_size=3).map(torch.tensor),
    ),
    max_leaves=5,
)


@given(OBJECTS)
def test_any_object_is_a_prompt_or_refused(thing):
    for read in (read_prompts, read_messages):
        try:
            taken = read(thing)
        except ConfigError:
            continue
        if read is read_prompts:
            prompts, several = taken
            assert several or len(prompts) == 1
            for prompt in prompts:
                assert isinstance(prompt, str) or all(type(i) is int for i in prompt)
