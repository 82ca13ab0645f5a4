"""Kernels in Triton's interpreter, without a GPU.

    TRITON_INTERPRET=1 python tests/support/interpreted.py

A process of its own, since the interpreter must be chosen before a kernel is defined. Prints what
was found as JSON, a line a case.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from transformers import GPT2Config, LlamaConfig, MistralConfig, PhiConfig, Qwen2Config

from djinn_lib.engine.decode import compiled, fused_layers
from djinn_lib.engine.decode.cuda_graphs import Recorder
from djinn_lib.engine.decode.eager import generate_eager
from djinn_lib.engine.decode.fused_layers import FusedUnits
from djinn_lib.engine.decode.kernels import operators as decode_operators
from djinn_lib.engine.decode.kernels.operators import RMS_NORM, SILU, Norm, Product
from djinn_lib.engine.decode.kv_cache import KvCache
from djinn_lib.engine.decode.recorded import RecordedDecoder
from djinn_lib.engine.models.packing import pack
from djinn_lib.engine.models.spec import ModelSpec
from djinn_lib.errors import ConfigError

CPU = torch.device("cpu")
CAPACITY, PROMPT, N_STEPS = 24, [5, 3, 60, 17, 2, 44, 9, 21], 2
SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 67,
    "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1, "intermediate_size": 40,
}  # fmt: skip
CONFIGS = {
    "llama-biased-attention": LlamaConfig(**SHAPE, attention_bias=True),
    "llama-dynamic": LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "mistral-sliding": MistralConfig(**SHAPE, num_key_value_heads=1, sliding_window=6),
    "qwen2-tied": Qwen2Config(**SHAPE, num_key_value_heads=1, tie_word_embeddings=True),
    "phi": PhiConfig(**SHAPE, partial_rotary_factor=0.5),
}
SINGLE = {**SHAPE, "num_hidden_layers": 1}
ONE_LAYER = {
    "mistral": MistralConfig(**SINGLE, num_key_value_heads=1, sliding_window=None),
    "qwen2": Qwen2Config(**SINGLE, num_key_value_heads=1),
    "phi": PhiConfig(**SINGLE, partial_rotary_factor=0.5),
}
REFUSED = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=67),
    "phi-normed-queries": PhiConfig(**SHAPE, qk_layernorm=True),
    "llama-biased-mlp": LlamaConfig(**SHAPE, mlp_bias=True),
    "llama-relu": LlamaConfig(**SHAPE, hidden_act="relu"),
    "too-wide": LlamaConfig(**{**SHAPE, "hidden_size": 64}),
}


def built(config: Any, dtype: str = "float32") -> Any:
    """The model, with biases and norms that matter."""
    model = ModelSpec(config, dtype, seed=1).build()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                noise = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.add_(noise.to(parameter.dtype))
    return model


def steps(model: Any, cache: KvCache, fused: bool) -> list[torch.Tensor]:
    """Logits of a few steps after a prompt, then all keys and values."""
    with torch.no_grad():
        cache.clear()
        cache.mode(prefilling=True)
        model(input_ids=torch.tensor([PROMPT]), past_key_values=cache, use_cache=True)
        cache.mode(prefilling=False)
        units = pack(model)[1]
        logits = []
        with FusedUnits(model, units, cache).in_place() if fused else nullcontext():
            for i in range(N_STEPS):
                cache.position.fill_(len(PROMPT) + i)
                token = torch.tensor([[7 + i]])
                output = model(input_ids=token, past_key_values=cache, use_cache=True)
                logits.append(output.logits[:, -1].clone())
    kept = [t.clone() for layer in cache.kv_layers for t in (layer.keys, layer.values)]
    return [torch.cat(logits), *kept]


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def layers(config: Any, dtype: str) -> dict[str, Any]:
    """How far fused layers are from transformers' own."""
    model = built(config, dtype)
    cache = KvCache(model.config, CAPACITY, CPU)
    expected, got = steps(model, cache, fused=False), steps(model, cache, fused=True)
    own = [type(m).forward.__get__(m) == m.forward for m in model.modules()]
    return {
        "distance": max(map(distance, got, expected)),
        "differs": not torch.equal(got[0], expected[0]),
        "itself_again": all(own),
    }


def row_by_row(config: Any) -> dict[str, Any]:
    """The same with one pair of rows for each program that projects, as in wide models."""
    with mock.patch.object(decode_operators, "PROJECTED_BYTES", 0):
        return layers(config, "float32")


def attention(head_size: int, n_heads: int, n_key_heads: int) -> dict[str, Any]:
    """Attention under masks with holes, of heads of any size; by itself and beside a product."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn((2, 1, n_key_heads, 37, head_size), generator=generator)
    query = torch.randn((1, n_heads, 1, head_size), generator=generator)
    mask = torch.rand((1, 1, 1, 37), generator=generator) < 0.4
    mask[..., :20] = False  # whole blocks of nothing come first
    mask[..., 30] = True
    attend, flat, scale = decode_operators.attend, query.flatten(), head_size**-0.5
    last = torch.tensor([33])
    upto = torch.arange(37).view(1, 1, 1, 37) <= last
    x, matrix = (
        torch.randn((1, 1, 24), generator=generator),
        torch.randn((19, 24), generator=generator),
    )
    norm = Norm(RMS_NORM, torch.rand(24, generator=generator), None, 1e-6)
    product = silu(matrix @ rms_norm(x[0, 0], (24,), norm.weight, 1e-6))
    results = []
    with mock.patch.multiple(decode_operators, POSITIONS=16, SHARED_POSITIONS=16):
        for seen, how in ((upto, {"last": last}), (mask, {"mask": mask})):
            expected = scaled_dot_product_attention(query, keys, values, seen, enable_gqa=True)
            unseen = ~seen[0, 0, 0]
            dirty = [t.clone() for t in (keys, values)]
            for tensor in dirty:
                tensor[:, :, unseen] = torch.nan  # what is not attended to is not looked at
            results.append(distance(attend(flat, *dirty, scale, **how), expected.flatten()))
            attended, multiplied = decode_operators.attend_and_multiply(
                flat, *dirty, scale, how.get("mask"), last, x, Product(matrix), norm, SILU
            )
            results.append(distance(attended, expected.flatten()))
            results.append(distance(multiplied, product))
    return {"distance": max(results)}


def refused(name: str) -> dict[str, Any]:
    """What is said of a layer that is not one of those."""
    model = built(REFUSED[name])
    with mock.patch.object(fused_layers, "WIDEST", 32):
        try:
            FusedUnits(model, pack(model)[1], KvCache(model.config, CAPACITY, CPU))
        except ConfigError as error:
            return {"said": str(error)}
    return {"said": ""}


def decoder(broken: bool) -> dict[str, Any]:
    """Which way a decoder takes, and whether its tokens are transformers' own."""
    model = built(ONE_LAYER["mistral"])
    real = decode_operators.multiply
    wrong = mock.patch.object(fused_layers, "multiply", lambda *a, **k: real(*a, **k) * 1.1)
    with (
        mock.patch.object(compiled, "has_triton", lambda device: True),
        mock.patch.object(compiled, "attentions", lambda device: []),
        wrong if broken else nullcontext(),
    ):
        made = RecordedDecoder(model, pack(model)[1], CAPACITY, Recorder(CPU), compiled=True)
        tokens = made.generate(PROMPT, 4, ignore_eos=True).token_ids
    own = generate_eager(model, PROMPT, 4, ignore_eos=True).token_ids
    return {"way": made.way, "mode": made.mode, "alike": tokens == own}


def main() -> None:
    """Run everything."""
    cases: dict[str, Any] = {
        **{f"layers {n} float32": lambda c=c: layers(c, "float32") for n, c in CONFIGS.items()},
        **{f"layers {n} float16": lambda c=c: layers(c, "float16") for n, c in ONE_LAYER.items()},
        **{f"layers {n} row by row": lambda c=c: row_by_row(c) for n, c in ONE_LAYER.items()},
        "attention 16": lambda: attention(16, 4, 4),
        "attention 20 grouped": lambda: attention(20, 6, 2),
        **{f"refused {name}": lambda name=name: refused(name) for name in REFUSED},
        "decoder": lambda: decoder(broken=False),
        "decoder broken": lambda: decoder(broken=True),
    }
    decode_operators.COLUMNS = 16  # so that products take several turns
    for name, case in cases.items():
        print(json.dumps({"case": name, **case()}), flush=True)


if __name__ == "__main__":
    main()
