"""The waits of an offloader as vLLM runs a model; run in vLLM's environment.

Prints JSON: for each case, the bytes needed before a step, then those that each wait asked for
(null is all).
"""

import json
from types import SimpleNamespace

from torch import nn
from vllm.config import CUDAGraphMode
from vllm.forward_context import override_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from djinn_lib.fleet import vllm_offloader
from djinn_lib.fleet.vllm_offloader import RingOffloader, UsedLayers


class Attention(nn.Module, AttentionLayerBase):
    """Found where vLLM looks for attention."""

    def get_attn_backend(self):
        raise NotImplementedError

    def get_kv_cache_spec(self, vllm_config):
        raise NotImplementedError


class Context(SimpleNamespace):
    """As much of vLLM's context of a pass as an offloader reads."""


class Model:
    """Stacks of layers that need 10 bytes each; "a" is attention, "m" has none."""

    def __init__(self, *stacks):
        self.waits, self.names, used = [], [], UsedLayers()
        self.offloader = RingOffloader()
        for stack in stacks:
            layers = [nn.Sequential(Attention() if kind == "a" else nn.SiLU()) for kind in stack]
            assert self.offloader.wrap_modules(iter(layers)) == layers
            for layer, kind in zip(layers, stack, strict=True):
                self.names.append(f"layer {len(self.names)}")
                if kind == "a":
                    used[self.names[-1]] = layer[0]
                    used[f"{self.names[-1]}'s experts"] = nn.SiLU()
        n = len(self.names)
        self.used, ring = used, SimpleNamespace(n_bytes=10 * n + 5, wait=self.wait)
        self.offloader.begin(ring, [10 * (i + 1) for i in range(n)], used)

    def wait(self, end=None):
        self.waits.append(end)

    def a_pass(self, *layers, mode=CUDAGraphMode.PIECEWISE, in_graph=False):
        """Look layers up; return what must be there before, and the waits."""
        said = [self.offloader.n_first_bytes]
        self.waits.clear()
        with override_forward_context(Context(cudagraph_runtime_mode=mode)):
            self.offloader.sync_prev_onload()
            vllm_offloader._capturing = lambda: in_graph
            for layer in layers:
                self.used[self.names[layer]]
                self.used.get(f"{self.names[layer]}'s experts")
            vllm_offloader._capturing = lambda: False
        return said + self.waits


if __name__ == "__main__":
    vllm_offloader._capturing = lambda: False
    plain = Model("aaa")
    said = {
        "order unknown": plain.a_pass(0, 1, 2),
        "order known": plain.a_pass(0, 1, 2),
        "without graphs": plain.a_pass(0, 0, 1, 2, mode=CUDAGraphMode.NONE)[1:],
        "captured as one graph": plain.a_pass(0, 1, 2, mode=CUDAGraphMode.FULL, in_graph=True),
        "one graph": plain.a_pass(mode=CUDAGraphMode.FULL),
    }
    plain.waits.clear()
    plain.used["layer 0"]
    said["outside of a pass"] = list(plain.waits)
    plain.a_pass(0, 2)
    said["after a layer was left out"] = plain.a_pass(0, 1, 2)
    captured = Model("aaa")
    captured.a_pass(0, 1, 2)
    captured.a_pass(0, 1, 2, in_graph=True)
    said["attention within the graphs"] = captured.a_pass()
    begun = Model("aaa")
    begun.a_pass(0, 1)
    said["no whole pass"] = begun.a_pass()
    stacks = Model("aa", "amam")
    stacks.a_pass(0, 1, 2, 4)
    said["two stacks, layers without attention"] = stacks.a_pass(0, 1, 2, 4)
    without = Model("mm")
    said["no attention"] = without.a_pass()
    print(json.dumps(said))
