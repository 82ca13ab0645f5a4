"""Small checkpoints of several architectures, and what plain vLLM makes of them on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizer_factory import save_tokenizer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from djinn_lib.fleet.engines import EngineClient
from djinn_lib.fleet.environment import vllm_python

VOCAB, MAX_MODEL_LEN = 512, 64
# Systems whose vLLM has an environment of its own. They have contract tests with a real one.
WITH_VLLM = ("djinn_vllm", "vllm_sleep_readonly")
OPTIONS = {"dtype": "float32", "max_model_len": MAX_MODEL_LEN}
_SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SHAPE),
    "qwen3": Qwen3Config(**{**_SHAPE, "num_key_value_heads": 2}, head_dim=64),
    "gpt2": GPT2Config(
        n_embd=256, n_layer=4, n_head=4, n_positions=128, vocab_size=VOCAB,
        initializer_range=0.2, bos_token_id=0, eos_token_id=1,
    ),
    "mixtral": MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip
WITH_TOKENIZER = "llama"


def save_models(folder: Path, names: Sequence[str] = tuple(CONFIGS)) -> dict[str, Path]:
    """Write checkpoints with random weights; one of them has a tokenizer."""
    folders = {}
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
        folders[name] = folder / name
        model.save_pretrained(folders[name])
        if name == WITH_TOKENIZER:
            save_tokenizer(folders[name])
    return folders


def n_bytes_of(folder: Path) -> int:
    """Bytes of a checkpoint's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def plain_tokens(
    name: str, folder: Path, prompts: Sequence[list[int]], n: int, log: Path
) -> list[tuple[int, ...]]:
    """What vLLM itself says to each prompt, greedily; its engine ends with the call."""
    options = {
        "model": str(folder),
        "skip_tokenizer_init": name != WITH_TOKENIZER,
        "kv_cache_memory_bytes": 256 << 20,
        "enforce_eager": True,
        **OPTIONS,
    }
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    engine = EngineClient(name, vllm_python(), options, log, environment)
    try:
        parameters = {"max_tokens": n, "temperature": 0.0, "ignore_eos": True}
        asked = [engine.submit(prompt, parameters) for prompt in prompts]
        return [tuple(one.result(120)["token_ids"]) for one in asked]
    finally:
        engine.close()
