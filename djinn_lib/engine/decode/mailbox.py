"""Token ids on their way from the device to the host."""

from __future__ import annotations

import torch


class Mailbox:
    """Token ids on their way to the host, each with an event that says when it is there."""

    def __init__(self, n_slots: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._ids = torch.zeros(n_slots, dtype=torch.long, pin_memory=self._on_gpu)
        self._events = [torch.cuda.Event() for _ in range(n_slots if self._on_gpu else 0)]

    def send(self, slot: int, token: torch.Tensor) -> None:
        """Copy a token (1, 1) to a slot once the work submitted before is done."""
        self._ids[slot : slot + 1].copy_(token.view(1), non_blocking=True)
        if self._on_gpu:
            self._events[slot].record()

    def receive(self, slot: int) -> int:
        """Wait for the token of a slot and return it."""
        if self._on_gpu:
            self._events[slot].synchronize()
        return int(self._ids[slot])
