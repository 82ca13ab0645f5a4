"""A model's tokenizer: read from its folder when the model is added; text to ids and back.

transformers decides which files make a tokenizer. Whatever one of its many libraries raises, be it
a panic of Rust code, comes as a `DjinnError` that names the folder.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

from transformers import TOKENIZER_MAPPING, AutoConfig, AutoTokenizer
from transformers.tokenization_utils_base import (
    ADDED_TOKENS_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
)

from djinn_lib.engine.prompts import read_messages
from djinn_lib.errors import CheckpointError, ConfigError, in_words

# Vocabularies that transformers reads for any class, in patterns.
_VOCABULARIES = (FULL_TOKENIZER_FILE, "tekken.json", "tokenizer.model*", "tiktoken.model")
_BESIDE = (TOKENIZER_CONFIG_FILE, ADDED_TOKENS_FILE, SPECIAL_TOKENS_MAP_FILE)
_SAID_CHARACTERS = 400
_REMEDY = (
    "download it again or install the package that is named, or remove the files of the tokenizer "
    "to serve the model by token ids alone"
)


class Tokenizer:
    """Turns text and conversations into token ids, and token ids into text.

    Safe to be used from many threads, which transformers' own are not: a call may change settings
    that another one reads.

    Args:
        own: transformers' own; to be handed to its `generate`, say, by one thread at a time.
    """

    def __init__(self, own: Any) -> None:
        self.own = own
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many ids it knows."""
        return len(self.own)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, with the special tokens that the model begins with.

        A text that begins with them, such as a formatted conversation, gets no second ones.

        Raises:
            ConfigError: the tokenizer cannot encode it.
        """
        ids = self._encode(text)
        if not text.startswith(tuple(map(str, self.own.all_special_tokens))):
            return ids
        plain = self._encode(text, add_special_tokens=False)
        for n_before in range(len(ids) - len(plain), 0, -1):
            ends_alike = ids[n_before : n_before + len(plain)] == plain
            if ends_alike and ids[:n_before] == plain[:n_before]:
                return ids[n_before:]
        return ids

    def encode_chat(self, messages: object) -> list[int]:
        """Return the token ids of a conversation, up to where the model is to answer.

        Args:
            messages: mappings with "role" and "content", both text; or the text of one user.

        Raises:
            ConfigError: there is no chat template, or it cannot take these messages.
        """
        conversation = read_messages(messages)
        if getattr(self.own, "chat_template", "") is None:
            raise ConfigError(
                "expected a tokenizer with a chat template, got one without: pass the formatted "
                "conversation as text to generate()"
            )
        advice = "check the roles and their order, or pass the formatted text to generate()"
        with self._lock, _refused("messages that the model's chat template can format", advice):
            text = self.own.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=False
            )
        return self._encode(text, add_special_tokens=False)  # the template writes its own

    def decode(self, token_ids: Sequence[int]) -> str | None:
        """Return what token ids say, without special tokens; None, with a warning, if it fails."""
        try:
            with self._lock, _refused("token ids that the tokenizer can decode", "none is lost"):
                return self.own.decode(list(token_ids), skip_special_tokens=True)
        except ConfigError as error:  # the ids have been computed, and are worth keeping
            logging.getLogger(__name__).warning("%s", error)
            return None

    def _encode(self, text: str, **how: bool) -> list[int]:
        with self._lock, _refused("text that the tokenizer can encode", "pass token ids instead"):
            return [int(i) for i in self.own(text, **how).input_ids]


@contextmanager
def _refused(expected: str, advice: str) -> Iterator[None]:
    """Turn whatever a tokenizer raises into a `ConfigError`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust code is no Exception
        raise ConfigError(f"expected {expected}, got {_said(error)}: {advice}") from error


def read_tokenizer(folder: Path, trust_remote_code: bool = False) -> Tokenizer | None:
    """Return the tokenizer in a checkpoint folder; None where there are no files of one.

    Args:
        folder: the checkpoint.
        trust_remote_code: allow Python code that comes with it.

    Raises:
        CheckpointError: its files are broken or incomplete, or need a package that is missing.
    """
    try:
        found: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust code is no Exception
        files = [*_vocabularies(folder, _usual_class(folder)), *_present(folder, _BESIDE)]
        if not files:
            return None
        is_code = "trust_remote_code" in str(error)
        raise CheckpointError(
            f"expected a tokenizer that transformers can read in {folder}, got {files} and "
            f"{_said(error)}: "
            + ("pass trust_remote_code=True if you trust the code" if is_code else _REMEDY)
        ) from error
    # Without a vocabulary transformers makes some tokenizers all the same; they know no text.
    if type(found).vocab_files_names and not _vocabularies(folder, type(found)):
        if files := _present(folder, _BESIDE):
            raise CheckpointError(
                f"expected the vocabulary of a {type(found).__name__} in {folder}, got only "
                f"{files}: {_REMEDY}"
            )
        return None
    return Tokenizer(found)


def _vocabularies(folder: Path, of_class: Any) -> list[str]:
    """Files in a folder from which a class of tokenizers would read its vocabulary."""
    own = of_class.vocab_files_names.values() if of_class else ()
    found = _present(folder, [*_VOCABULARIES, *filter(None, own)])
    return [name for name in found if name not in _BESIDE]


def _present(folder: Path, patterns: Iterable[str]) -> list[str]:
    return sorted({path.name for pattern in patterns for path in folder.glob(pattern)})


def _usual_class(folder: Path) -> Any:
    """The class that transformers pairs with the architecture in a folder, if it knows one."""
    try:
        return TOKENIZER_MAPPING.get(type(AutoConfig.from_pretrained(folder)), None)
    except Exception:  # whatever is wrong with config.json is said where the model is made
        return None


def _said(error: BaseException) -> str:
    """What an error says, on one line; some of transformers' are lists and advice."""
    said = shorten(in_words(error), _SAID_CHARACTERS, placeholder=" ...")
    return said.removesuffix(":")  # where there is no more than the name of the error
