"""Read what callers pass as prompts into text or lists of token ids; and read conversations.

A prompt is text, a list, tuple, range or one-dimensional array of token ids, or what a tokenizer
returns. A list of those is a list of prompts. Nothing else is taken for ids: not floats, flags,
bytes or sets, though Python would convert them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, TypeGuard

import numpy as np
import torch

from djinn_lib.errors import ConfigError, shown

Prompt = str | Sequence[int] | torch.Tensor | np.ndarray | Mapping[str, Any]
Messages = str | Sequence[Mapping[str, Any]]
ReadPrompt = str | list[int]

_LONGEST = 2**24  # tokens; more than any model has positions for
_ID_DTYPES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
# What tokenizers return beside ids and mask, and decoder-only models do without.
_UNUSED = {"token_type_ids", "special_tokens_mask", "offset_mapping", "length", "assistant_masks"}
_FORMS = (
    "pass text, a list of token ids, a tensor of ids of shape [n] or [1, n], the output of a "
    "tokenizer, or a list of prompts"
)


def read_prompts(prompt: object) -> tuple[list[ReadPrompt], bool]:
    """Return prompts as text or lists of ids, and whether several were passed.

    A list whose first element is itself a prompt holds several, be it one. So does the output of a
    tokenizer with several rows, whose `attention_mask` says what is padding; padding is dropped.

    Raises:
        ConfigError: it is no prompt; the message says what was passed and what can be.
    """
    if isinstance(prompt, Mapping):
        rows = _rows(prompt)
        return list(rows), len(rows) > 1
    if _is_sequence(prompt) and len(prompt) and _holds_several(prompt[0]):
        return [_in_list(i, one) for i, one in enumerate(prompt)], True
    return [prompt if isinstance(prompt, str) else read_ids(prompt)], False


def read_ids(ids: object) -> list[int]:
    """Return token ids as a list of Python's integers.

    Args:
        ids: a sequence of whole numbers, or an array of shape [n] or [1, n], on any device.

    Raises:
        ConfigError: it is something else.
    """
    if _is_array(ids):
        ids = _row_of(ids)
    if not _is_sequence(ids):
        raise ConfigError(f"expected a prompt, got {shown(ids)}: {_FORMS}")
    if len(ids) > _LONGEST:
        raise ConfigError(f"expected a prompt of at most {_LONGEST} tokens, got {len(ids)}")
    return [value if type(value) is int else _id(value, i) for i, value in enumerate(ids)]


def is_conversation(prompt: object) -> bool:
    """Whether it is a list of messages."""
    if not _is_sequence(prompt) or not len(prompt):
        return False
    return isinstance(prompt[0], Mapping) and "role" in prompt[0]


def read_messages(messages: object) -> list[dict[str, Any]]:
    """Return a conversation as chat templates take it.

    Args:
        messages: mappings with "role" and "content", both text; or the text of one user.

    Raises:
        ConfigError: it is no conversation, or a message has another form.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not _is_sequence(messages) or not messages:
        raise ConfigError(
            f"expected text or a list of messages such as [{{'role': 'user', 'content': 'Hi'}}], "
            f"got {'none' if _is_sequence(messages) else shown(messages)}: for token ids use "
            "generate()"
        )
    return [_message(message, i) for i, message in enumerate(messages)]


def _message(message: object, i: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ConfigError(
            f"expected message {i} to be a mapping with 'role' and 'content', got "
            f"{shown(message)}: pass the messages of one conversation"
        )
    fields = {key: value for key, value in message.items() if value is not None}
    for key in ("role", "content"):
        needless = key == "content" and "tool_calls" in fields and key not in fields
        if not needless and not isinstance(fields.get(key), str):
            raise ConfigError(
                f"expected the {key} of message {i} to be text, got {shown(fields.get(key))}"
            )
    return fields


def _is_array(value: object) -> TypeGuard[torch.Tensor | np.ndarray]:
    nested = isinstance(value, torch.Tensor) and value.is_nested  # it has no shape
    return isinstance(value, torch.Tensor | np.ndarray) and not nested


def _is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(
        value, str | bytes | bytearray | memoryview
    )


def _holds_several(first: object) -> bool:
    """Whether a list that begins like this holds prompts, not ids."""
    if _is_array(first):
        return first.ndim > 0
    return isinstance(first, str | Mapping) or _is_sequence(first)


def _in_list(i: int, prompt: object) -> ReadPrompt:
    """One of several prompts."""
    if isinstance(prompt, str):
        return prompt
    try:
        if not isinstance(prompt, Mapping):
            return read_ids(prompt)
        rows = _rows(prompt)
        if len(rows) > 1:
            raise ConfigError(f"expected one prompt, got {len(rows)} rows: pass each by itself")
        return rows[0]
    except ConfigError as error:
        raise ConfigError(f"prompt {i} of the list: {error}") from error


def _rows(encoded: Mapping[str, Any]) -> list[list[int]]:
    """The prompts in what a tokenizer returned, without padding."""
    if "role" in encoded or "messages" in encoded:
        raise ConfigError("expected a prompt, got a conversation: use chat(name, messages)")
    if "input_ids" not in encoded:
        raise ConfigError(f"expected a mapping with input_ids, got {sorted(map(str, encoded))}")
    used = {key for key, value in encoded.items() if value is not None}
    if others := sorted(map(str, used - _UNUSED - {"input_ids", "attention_mask"})):
        raise ConfigError(
            f"expected input_ids and attention_mask, got also {others}: leave them out, or call "
            "the model itself inside `with djinn.lease(name) as model`"
        )
    ids = [read_ids(row) for row in _split(encoded["input_ids"])]
    if (mask := encoded.get("attention_mask")) is None:
        if len(ids) != 1:
            raise ConfigError(f"expected the attention_mask of {len(ids)} rows, got none: {_FORMS}")
        return ids
    masks = [_read_mask(row) for row in _split(mask)]
    if not ids or [len(row) for row in ids] != [len(row) for row in masks]:
        raise ConfigError("expected input_ids and attention_mask of one shape: tokenize again")
    return [_without_padding(*pair) for pair in zip(ids, masks, strict=True)]


def _split(table: Any) -> Sequence[Any]:
    """The rows of a table; one row of numbers is a table of its own."""
    if _is_array(table):
        return list(table) if table.ndim > 1 else [table]
    return table if _is_sequence(table) and len(table) and _holds_several(table[0]) else [table]


def _read_mask(row: Any) -> list[bool]:
    values = _to_list(row) if _is_array(row) else row
    if not _is_sequence(values) or any(value not in (0, 1) for value in values):
        raise ConfigError("expected an attention_mask of zeros and ones, got something else")
    return [bool(value) for value in values]


def _without_padding(ids: list[int], mask: list[bool]) -> list[int]:
    kept = [i for i, attended in enumerate(mask) if attended]
    if kept and kept[-1] - kept[0] + 1 != len(kept):
        raise ConfigError(
            "expected zeros of the attention_mask at either end, where padding is, got some "
            "between tokens: leave those tokens out"
        )
    return [ids[i] for i in kept]


def _row_of(array: torch.Tensor | np.ndarray) -> list[Any]:
    """What an array of shape [n] or [1, n] holds."""
    if array.ndim == 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 1:
        raise ConfigError(
            f"expected token ids of shape [n] or [1, n], got {list(array.shape)}: for several "
            "prompts pass a list of them, or the output of a tokenizer with its attention_mask"
        )
    whole = array.dtype.kind in "iu" if isinstance(array, np.ndarray) else array.dtype in _ID_DTYPES
    if not whole:
        raise ConfigError(
            f"expected token ids as whole numbers, got an array of {array.dtype}: convert it"
        )
    return _to_list(array)


def _to_list(array: torch.Tensor | np.ndarray) -> Any:
    try:
        return array.tolist()
    except (RuntimeError, TypeError) as error:  # sparse, say, or on the meta device
        raise ConfigError(
            f"expected an array whose numbers can be read, got {error}: {_FORMS}"
        ) from error


def _id(value: object, i: int) -> int:
    if _is_array(value) and value.ndim == 0:
        value = _to_list(value)
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ConfigError(
            f"expected token ids as whole numbers, got {shown(value)} at place {i}: {_FORMS}"
        )
    return int(value)
