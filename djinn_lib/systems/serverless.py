"""`serverless`: a cold start for every request, from the files on disk to the first token."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence

import torch

from djinn_lib.engine.decode.eager import generate_eager
from djinn_lib.engine.models.checkpoint import weight_files
from djinn_lib.errors import ConfigError
from djinn_lib.systems.base import ModelFiles, Served, SystemUnderTest, load_ordinarily


class Serverless(SystemUnderTest):
    """`from_pretrained`, generate, tear down; nothing survives a request.

    Options:
        page_cache: "warm" (default) leaves the files where earlier requests put them, in the
            operating system's page cache; "cold" drops them from it before each request (not
            counted), so that they are read from the disk.
        device_map: let `from_pretrained` put each weight where it belongs, as the paper's code does
            ("cuda"), instead of moving the whole model (default False).
    """

    option_names = frozenset({"page_cache", "device_map"})
    reads_files_while_serving = True

    def start(self, progress: Callable[[str], None] = lambda step: None) -> None:
        """Check the option; a cold start has nothing to prepare."""
        self.page_cache = self.options.get("page_cache", "warm")
        if self.page_cache not in ("warm", "cold"):
            raise ConfigError(f"expected page_cache 'warm' or 'cold', got {self.page_cache!r}")

    def serve(self, model: str, prompt_ids: Sequence[int], max_new_tokens: int) -> Served:
        """Load from disk, generate, tear down."""
        files = self.known(model)
        if self.page_cache == "cold":
            drop_page_cache(files)
        begin_s = self.clock_s()
        placed = bool(self.options.get("device_map", False))
        loaded = load_ordinarily(files, self.device, device_map=placed)
        loaded_s = self.clock_s()
        tokens = generate_eager(loaded, prompt_ids, max_new_tokens, ignore_eos=True)
        done_s = self.clock_s()
        del loaded
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        end_s = self.clock_s()
        times_s = loaded_s - begin_s, end_s - begin_s, end_s - done_s
        return self.served(model, tokens, *times_s, evicted=[model])

    def close(self) -> None:
        """There is nothing left to free."""
        return


def drop_page_cache(files: ModelFiles) -> None:
    """Make the operating system forget the contents of a model's weights files."""
    for path in weight_files(files.folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # dirty pages cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
