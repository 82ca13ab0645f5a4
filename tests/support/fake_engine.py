"""An engine without vLLM: random bytes on a ring, whose steps compare them with their source.

Run as a process: ``fake_engine.py SOCKET MODEL N_BYTES``; it steps until it is killed, and prints a
line after each step.
"""

import sys
import time

import torch

from djinn_lib.engine.memory.layout import Layout
from djinn_lib.fleet.client import RingModel
from djinn_lib.fleet.connection import Connection


def weights_of(model, n_bytes):
    """The same bytes for the same name, in every process."""
    generator = torch.Generator().manual_seed(sum(model.encode()))
    return torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, generator=generator)


class FakeEngine:
    """A client of a ring; `step` raises if a byte of it is wrong."""

    def __init__(self, socket, model, n_bytes, on_loss=lambda error: None):
        self.weights = weights_of(model, n_bytes)
        layout = Layout.pack([("weights", (n_bytes,), torch.uint8)])
        self.ring = RingModel(
            Connection(socket),
            model,
            layout,
            lambda slots: slots["weights"].copy_(self.weights),
            torch.device("cpu"),
            on_loss,
        )

    def step(self, seconds=0.0):
        self.ring.begin_step()
        try:
            self.ring.wait()
            time.sleep(seconds)
            if not torch.equal(self.ring.view[: len(self.weights)], self.weights):
                raise AssertionError(f"{self.ring.model!r} read wrong bytes")
        finally:
            self.ring.end_step()

    def close(self):
        self.ring.close()


if __name__ == "__main__":
    engine = FakeEngine(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    while True:
        engine.step(0.002)
        print("stepped", flush=True)
