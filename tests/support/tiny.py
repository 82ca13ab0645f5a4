"""Tiny models of several architectures, with weights large enough for varied tokens."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Zamba2Config,
    ZambaConfig,
)

from djinn_lib.engine.models.spec import ModelSpec

VOCAB = 500
_SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "initializer_range": 0.4,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_MLP = {"intermediate_size": 96}
_GQA = {"num_key_value_heads": 2}

CONFIGS = {
    "llama": LlamaConfig(**_SHAPE, **_MLP),
    "mistral": MistralConfig(**_SHAPE, **_MLP, **_GQA, sliding_window=None),
    "mistral-sliding": MistralConfig(**_SHAPE, **_MLP, **_GQA, sliding_window=8),
    "phi": PhiConfig(**_SHAPE, **_MLP),
    "gpt2": GPT2Config(
        n_embd=64,
        n_layer=3,
        n_head=4,
        vocab_size=VOCAB,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=1,
    ),
    "qwen2-tied": Qwen2Config(**_SHAPE, **_MLP, **_GQA, tie_word_embeddings=True),
    "opt": OPTConfig(
        **_SHAPE, ffn_dim=96, word_embed_proj_dim=64, init_std=0.4, max_position_embeddings=128
    ),
    "gemma": GemmaConfig(**_SHAPE, **_MLP, **_GQA, head_dim=16),
    "gpt-neox": GPTNeoXConfig(**_SHAPE, **_MLP),
}
_MAMBA = {"mamba_d_state": 8, "n_mamba_heads": 2, "num_key_value_heads": 4, "mamba_expand": 2}
SHARING = {  # attention blocks that several layers use
    "zamba": ZambaConfig(
        **{**_SHAPE, **_MLP, **_MAMBA, "num_hidden_layers": 6},
        attention_head_dim=32,
        attention_hidden_size=128,
        attn_layer_period=3,
        attn_layer_offset=2,
        layers_block_type=["mamba", "mamba", "hybrid"] * 2,
    ),
    "zamba2": Zamba2Config(
        **{**_SHAPE, **_MLP, **_MAMBA, "num_hidden_layers": 6, "n_mamba_heads": 8},
        num_mem_blocks=2,
        chunk_size=16,
        layers_block_type=["mamba", "hybrid", "hybrid"] * 2,
        use_shared_attention_adapter=True,
        adapter_rank=8,
    ),
}
PROMPT = [3, 141, 59, 26, 53, 58, 97, 93, 238, 46, 264, 338, 327, 95]


_FOLDERS = TemporaryDirectory(prefix="djinn-tiny-")  # removed at the end of the process


@cache
def saved(name: str) -> Path:
    """The named architecture's folder as transformers saves it; nobody may change it."""
    folder = Path(_FOLDERS.name) / name
    spec(name).build().save_pretrained(folder)
    return folder


@cache
def ordinary_tokens(folder: Path, n: int, dtype: str = "float32") -> tuple[int, ...]:
    """Greedy tokens after `PROMPT` of the model as transformers itself loads and runs it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        output = model.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
            max_new_tokens=n,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return tuple(output[0, len(PROMPT) :].tolist())


def spec(name: str, dtype: str = "float32", seed: int = 5) -> ModelSpec:
    """The named architecture with seeded random weights."""
    return ModelSpec((CONFIGS | SHARING)[name], dtype, seed)
