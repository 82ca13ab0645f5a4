"""A small tokenizer of letters, with a start token that it adds by itself and a chat template."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LETTERS = {chr(i): i for i in range(32, 127)}  # ids are the codes of the characters
START, END = "<s>", "</s>"
START_ID, END_ID = 200, 201
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Return it; text begins with `START`, and letters that it does not know are left out."""
    backend = Tokenizer(models.BPE({**LETTERS, START: START_ID, END: END_ID}, []))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, START_ID)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=START, eos_token=END)
    tokenizer.chat_template = template
    return tokenizer


def save_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    """Write its files into a checkpoint folder."""
    make_tokenizer(template).save_pretrained(folder)
