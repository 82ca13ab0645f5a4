"""A model that reads its weights in every way but the usual one.

Layers share a block that stands outside of them, and each reads a matrix of the one before. The
model itself owns a vector that it reads at the end of a pass, and multiplies with its embeddings to
get logits. A projection is read but never called, and one layer is called by its `forward`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

WIDTH, VOCAB = 32, 96


class OddConfig(PretrainedConfig):
    model_type = "djinn_odd"

    def __init__(self, n_layers: int = 6, route: bool = False, **options: Any) -> None:
        self.n_layers, self.route = n_layers, route
        self.vocab_size, self.hidden_size, self.num_hidden_layers = VOCAB, WIDTH, n_layers
        super().__init__(**{"tie_word_embeddings": False, **options})


class Layer(nn.Module):
    def __init__(self, config: OddConfig) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, 4 * WIDTH)
        self.outer = nn.Linear(4 * WIDTH, WIDTH)
        self.route = config.route

    def forward(self, x: torch.Tensor, block: nn.Module, before: torch.Tensor) -> torch.Tensor:
        x = x + block(x)
        if self.route and int(x.sum().isnan()):  # looks at a value
            return x
        x = x + self.outer(torch.relu(self.inner(x)))
        return x + 0.1 * linear(torch.relu(linear(x, before)), before.t())


class OddModel(PreTrainedModel, GenerationMixin):
    config_class = OddConfig
    _supports_sdpa = True

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.block = nn.Linear(WIDTH, WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights large enough that a wrong one shows."""
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.3)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutputWithPast:
        x = self.embed(input_ids)
        for i, layer in enumerate(self.layers):
            before = self.layers[max(i - 1, 0)].inner.weight
            run = layer.forward if i == 1 else layer
            x = run(x, self.block, before)
            x = x / x.norm(dim=-1, keepdim=True)
        x = linear(x, self.projection.weight) * self.scale
        logits: Any = linear(x, self.embed.weight)
        return CausalLMOutputWithPast(logits=logits)


AutoConfig.register(OddConfig.model_type, OddConfig, exist_ok=True)
AutoModelForCausalLM.register(OddConfig, OddModel, exist_ok=True)
