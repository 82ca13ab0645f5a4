"""A small tokenizer of letters, with a start token that it adds by itself and a chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerFast

LETTERS = {chr(i): i for i in range(32, 127)}  # ids are the codes of the characters
START, END = "<s>", "</s>"
START_ID, END_ID = 200, 201
IDS = {START: START_ID, END: END_ID}
TEXT = "A"  # stands for the text among the tokens that are put around it
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def save_tokenizer(
    folder: Path, template: str | None = TEMPLATE, around: Sequence[str] = (START, TEXT)
) -> None:
    """Write its files into a checkpoint folder.

    Args:
        folder: the checkpoint.
        template: for conversations.
        around: special tokens and `TEXT`, as every text is encoded.
    """
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer_json(around)))
    config = {"bos_token": START, "eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)


def make_tokenizer(
    template: str | None = TEMPLATE, around: Sequence[str] = (START, TEXT)
) -> PreTrainedTokenizerFast:
    """Return it as transformers has it; letters that it does not know are left out."""
    with TemporaryDirectory() as folder:
        save_tokenizer(Path(folder), template, around)
        return PreTrainedTokenizerFast.from_pretrained(folder)


def _tokenizer_json(around: Sequence[str]) -> dict[str, object]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    pieces = [
        {"Sequence": {"id": TEXT, "type_id": 0}}
        if piece == TEXT
        else {"SpecialToken": {"id": piece, "type_id": 0}}
        for piece in around
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, "special": True, **flags} for token, i in IDS.items()
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": pieces,
            "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                token: {"id": token, "ids": [i], "tokens": [token]} for token, i in IDS.items()
            },
        },
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": {**LETTERS, **IDS}, "merges": []},
    }
