"""A KV cache whose tensors keep their addresses, for recorded steps.

transformers' `StaticCache` does the same for `generate`. This one differs in three points:

- All layers share one position, so a token costs one addition instead of one per layer.
- A whole prompt is stored into an empty cache. Its attention is plain causal attention over the
  prompt, not over the whole capacity.
- A layer with a sliding window keeps all positions, and the mask applies the window. So the host
  need not track the window.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, StaticCache
from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer

from djinn_lib.errors import ConfigError


class KvLayer(StaticLayer):
    """Keys and values of one layer, each (1, heads, `max_cache_len`, head size)."""

    def __init__(self, max_cache_len: int, position: torch.Tensor) -> None:
        super().__init__(max_cache_len)
        self.position = position
        self.prefilling = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the tensors without marking their addresses as static.

        The parent class marks them, and the compiler would then compile each layer separately.
        """
        shape = (*key_states.shape[:2], self.max_cache_len)
        self.keys = key_states.new_zeros((*shape, key_states.shape[-1]))
        self.values = value_states.new_zeros((*shape, value_states.shape[-1]))
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the states of a prompt, or of one token; return the states to attend to.

        Args:
            key_states: (1, heads, length of the prompt or 1, head size).
            value_states: the same.
            args, kwargs: ignored; some architectures pass more.

        Returns:
            Keys and values: of the prompt itself, or of the whole capacity for one token.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self.prefilling:
            length = key_states.shape[-2]
            self.keys[:, :, :length].copy_(key_states)
            self.values[:, :, :length].copy_(value_states)
            return key_states, value_states
        self.keys.index_copy_(2, self.position, key_states)
        self.values.index_copy_(2, self.position, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and the offset of the keys that `update` returns."""
        return (query_length if self.prefilling else self.max_cache_len), 0

    def get_seq_length(self) -> Any:
        """Return the position of the next first token: 0 for a prompt, else a tensor."""
        return 0 if self.prefilling else self.position[0]


class KvCache(Cache):
    """Keys and values of a whole model, for one sequence.

    Attributes:
        kv_layers: the layers, in order.
        position: of the next token; int64 of shape (1,), on the device.
        longest_window: width in tokens of the widest sliding window or chunk that is shorter than
            the cache; 0 if all layers attend to all tokens.

    Raises:
        ConfigError: the architecture keeps other state than keys and values (a recurrent state, an
            index), which this cache cannot hold.
    """

    def __init__(self, config: PretrainedConfig, max_cache_len: int, device: torch.device) -> None:
        layers = StaticCache(config, max_cache_len).layers
        kinds = {type(layer) for layer in layers}
        if not kinds <= {StaticLayer, StaticSlidingWindowLayer}:
            raise ConfigError(
                "expected layers that keep keys and values only, got "
                f"{sorted(kind.__name__ for kind in kinds)} in a {config.model_type}"
            )
        windows = [x.max_cache_len for x in layers if isinstance(x, StaticSlidingWindowLayer)]
        self.longest_window = max((w for w in windows if w < max_cache_len), default=0)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.kv_layers = [KvLayer(max_cache_len, self.position) for _ in layers]
        super().__init__(layers=list(self.kv_layers))

    def mode(self, prefilling: bool) -> None:
        """Set whether the next calls process a prompt or a single token."""
        for layer in self.kv_layers:
            layer.prefilling = prefilling

    def clear(self) -> None:
        """Zero the tensors: an old infinity would survive any mask."""
        for tensor in self._stored():
            tensor.zero_()

    @property
    def n_bytes(self) -> int:
        """Device memory of all keys and values in bytes."""
        return sum(t.numel() * t.itemsize for t in self._stored())

    def _stored(self) -> list[torch.Tensor]:
        both = [t for layer in self.kv_layers for t in (layer.keys, layer.values)]
        return [t for t in both if t is not None]
