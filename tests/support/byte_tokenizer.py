"""Tokenizers of single bytes, so that most characters take several tokens."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


def bytes_as_characters() -> PreTrainedTokenizerFast:
    """GPT-2's kind: each byte is a token that is written as one visible character."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def words_and_bytes() -> PreTrainedTokenizerFast:
    """Llama 2's kind: words that begin with a space, and bytes for all else."""
    words = ["\u2581", "\u2581Hello", "\u2581world", "H", "i", "."]
    vocabulary = {
        w: i for i, w in enumerate(["<unk>", *words, *(f"<0x{i:02X}>" for i in range(256))])
    }
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write its files into a checkpoint folder."""
    tokenizer.save_pretrained(folder)
