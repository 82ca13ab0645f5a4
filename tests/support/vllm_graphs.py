"""The waits of an offloader as vLLM captures and replays graphs; run in vLLM's environment.

Prints JSON: for each pass, the bytes that each wait asked for (null is all).
"""

import json
from types import SimpleNamespace

from vllm.config import CUDAGraphMode
from vllm.forward_context import override_forward_context

from djinn_lib.fleet import vllm_offloader
from djinn_lib.fleet.vllm_offloader import RingOffloader


class Context(SimpleNamespace):
    """As much of vLLM's context of a pass as an offloader reads."""


def a_pass(offloader, pieces, mode, captures=False):
    """Run the graphs of a pass; `pieces` are the layers that begin in each."""
    with override_forward_context(Context(cudagraph_runtime_mode=mode)):
        for layers in pieces:
            offloader.sync_prev_onload()
            if captures:
                vllm_offloader._capturing = lambda: True
                for layer in layers:
                    offloader._wait_for_layer(layer)
                offloader.join_after_forward()
                vllm_offloader._capturing = lambda: False


if __name__ == "__main__":
    waits, said = [], {}
    offloader = RingOffloader()
    offloader.ends = (10, 20, 30)
    offloader.ring = SimpleNamespace(wait=lambda end=None: waits.append(end))
    vllm_offloader._capturing = lambda: False
    layers = [[0], [1], [2], []]  # the last piece ends the last layer
    piecewise, full = CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL

    def say(name, *arguments, **options):
        waits.clear()
        a_pass(offloader, *arguments, **options)
        said[name] = list(waits)

    say("unknown", layers, piecewise)
    say("captured", layers, piecewise, captures=True)
    say("replayed", layers, piecewise)
    say("replayed again", layers, piecewise)
    say("one graph, captured", [[0, 1, 2]], full, captures=True)
    say("one graph", [[0, 1, 2]], full)
    say("of another size, captured", layers, piecewise, captures=True)
    say("more graphs than are known", [*layers, []], piecewise)
    offloader.ends = (10, 20, 30, 40)
    say("a second model", [[3], []], piecewise, captures=True)
    say("with a second model", layers, piecewise)
    waits.clear()
    offloader._wait_for_layer(1)  # without graphs
    offloader.sync_prev_onload()  # outside any pass
    said["eager"] = list(waits)
    print(json.dumps(said))
