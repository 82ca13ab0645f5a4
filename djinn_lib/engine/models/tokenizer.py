"""Read a model's tokenizer, and convert text to token ids and back.

transformers decides which files make a tokenizer. Any error of its backends, including a panic in
Rust code, is raised as a `DjinnError` that names the folder.
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

# Patterns of vocabulary files that transformers reads for any class.
_VOCABULARIES = (FULL_TOKENIZER_FILE, "tekken.json", "tokenizer.model*", "tiktoken.model")
# Those of a class that is not known, since a package that it needs is not installed.
_LIKELY_VOCABULARIES = ("*.model", "vocab.*", "merges.txt")
_SETTINGS_FILES = (TOKENIZER_CONFIG_FILE, ADDED_TOKENS_FILE, SPECIAL_TOKENS_MAP_FILE)
_MESSAGE_CHARACTERS = 400
_REMEDY = (
    "download it again or install the package that is named, or remove the tokenizer's files to "
    "use the model with token ids only"
)


class Tokenizer:
    """Convert text and conversations to token ids, and token ids to text.

    Thread-safe. The tokenizers of transformers are not: a call may change settings that another
    call reads.

    Args:
        own: transformers' tokenizer; only one thread at a time may use it directly.
    """

    def __init__(self, own: Any) -> None:
        self.own = own
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Size of the vocabulary."""
        return len(self.own)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, with the model's initial special tokens.

        They are not repeated if the text already begins with them, as a formatted conversation
        does.

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
        """Return the token ids of a conversation, up to the start of the model's answer.

        Args:
            messages: mappings with "role" and "content", both text; or the text of one user.

        Raises:
            ConfigError: there is no chat template, or it cannot format these messages.
        """
        conversation = read_messages(messages)
        if getattr(self.own, "chat_template", "") is None:
            raise ConfigError(
                "the tokenizer has no chat template: pass the formatted conversation as text to "
                "generate()"
            )
        advice = "check the roles and their order, or pass the formatted text to generate()"
        with self._lock, _refused("messages that the model's chat template can format", advice):
            text = self.own.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=False
            )
        return self._encode(text, add_special_tokens=False)  # the template has added them

    def decode(self, token_ids: Sequence[int]) -> str | None:
        """Decode token ids without special tokens; on failure, warn and return None."""
        try:
            with self._lock, _refused("token ids that the tokenizer can decode", "none is lost"):
                return self.own.decode(list(token_ids), skip_special_tokens=True)
        except ConfigError as error:  # the computed ids are still useful without text
            logging.getLogger(__name__).warning("%s", error)
            return None

    def _encode(self, text: str, **how: bool) -> list[int]:
        with self._lock, _refused("text that the tokenizer can encode", "pass token ids instead"):
            return [int(i) for i in self.own(text, **how).input_ids]


@contextmanager
def _refused(expected: str, advice: str) -> Iterator[None]:
    """Turn any error of a tokenizer into a `ConfigError`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust code is not an Exception
        raise ConfigError(f"expected {expected}, got {_message(error)}: {advice}") from error


def read_tokenizer(folder: Path, trust_remote_code: bool = False) -> Tokenizer | None:
    """Read the tokenizer in a checkpoint folder; None if it has no tokenizer files.

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
    except BaseException as error:  # a panic in Rust code is not an Exception
        files = [*_vocabularies(folder, _usual_class(folder)), *_present(folder, _SETTINGS_FILES)]
        if not files:
            return None
        is_code = "trust_remote_code" in str(error)
        raise CheckpointError(
            f"expected a tokenizer that transformers can read in {folder}, got {files} and "
            f"{_message(error)}: "
            + ("pass trust_remote_code=True if you trust the code" if is_code else _REMEDY)
        ) from error
    # transformers makes some tokenizers even without a vocabulary; they can encode no text.
    if type(found).vocab_files_names and not _vocabularies(folder, type(found)):
        if files := _present(folder, _SETTINGS_FILES):
            raise CheckpointError(
                f"expected the vocabulary of a {type(found).__name__} in {folder}, got only "
                f"{files}: {_REMEDY}"
            )
        return None
    return Tokenizer(found)


def _vocabularies(folder: Path, of_class: Any) -> list[str]:
    """List the files from which a tokenizer class would read its vocabulary."""
    try:
        own = of_class.vocab_files_names.values() if of_class else ()
    except ImportError:  # transformers' placeholder for a class whose package is missing
        own = _LIKELY_VOCABULARIES
    found = _present(folder, [*_VOCABULARIES, *filter(None, own)])
    return [name for name in found if name not in _SETTINGS_FILES]


def _present(folder: Path, patterns: Iterable[str]) -> list[str]:
    return sorted({path.name for pattern in patterns for path in folder.glob(pattern)})


def _usual_class(folder: Path) -> Any:
    """Look up transformers' tokenizer class for the folder's architecture, if any."""
    try:
        return TOKENIZER_MAPPING.get(type(AutoConfig.from_pretrained(folder)), None)
    except Exception:  # `checkpoint` reports what is wrong with config.json
        return None


def _message(error: BaseException) -> str:
    """Return an error's message on one line, shortened; some are lists with advice."""
    message = shorten(in_words(error), _MESSAGE_CHARACTERS, placeholder=" ...")
    return message.removesuffix(":")  # the message was empty
