"""An engine without vLLM: random weights on a ring, whose steps compare them with their source."""

import time

import torch
import weights

from djinn_lib.fleet.client import RingModel
from djinn_lib.fleet.connection import Connection


def weights_of(model, n_bytes):
    """The same bytes for the same name, in every process."""
    return weights.weights_of(n_bytes, sum(model.encode()))


class FakeEngine:
    """A client of a ring; `step` raises if a byte of it is wrong."""

    def __init__(self, socket, model, n_bytes, on_loss=lambda error: None, masters="plain"):
        self.weights = weights_of(model, n_bytes)
        self.ring = RingModel(
            Connection(socket),
            model,
            weights.layout_of(n_bytes),
            weights.fill_with(self.weights),
            torch.device("cpu"),
            on_loss,
            masters,
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
