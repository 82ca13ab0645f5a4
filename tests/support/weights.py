"""Models of random weights in bfloat16, which can be compressed, with a few other bytes behind."""

import torch

from djinn_lib.engine.memory.compressed.masters import CompressedMasters
from djinn_lib.engine.memory.layout import ALIGNMENT_BYTES, Layout

FORMS = ["plain", "compressed"]


def layout_of(n_bytes):
    """As many whole `ALIGNMENT_BYTES` of weights as fit, then single bytes up to `n_bytes`."""
    n_rest = n_bytes % ALIGNMENT_BYTES
    tensors = [
        ("w", ((n_bytes - n_rest) // 2,), torch.bfloat16),
        ("rest", (n_rest,), torch.uint8),
    ]
    return Layout.pack([shaped for shaped in tensors if shaped[1] != (0,)])


def weights_of(n_bytes, seed=0):
    """Bytes of normally distributed weights (1-d uint8)."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.empty(-(-n_bytes // 2), dtype=torch.bfloat16)
    return weights.normal_(0, 0.02, generator=generator).view(torch.uint8)[:n_bytes]


def fill_with(content):
    """Writes these bytes into the tensors of `layout_of(len(content))`."""

    def fill(views):
        begin = 0
        for view in views.values():
            target = view.view(torch.uint8)
            target.copy_(content[begin : begin + len(target)])
            begin += len(target)

    return fill


def in_form(store, form, page_bytes):
    """Masters in a store, in one of `FORMS`."""
    return store if form == "plain" else CompressedMasters(store, page_bytes)
