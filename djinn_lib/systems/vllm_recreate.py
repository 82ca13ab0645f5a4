"""`vllm_recreate`: one vLLM engine at a time, rebuilt when the model changes.

The paper calls this vLLM Sequential. On the CPU it runs in its own environment (`make vllm`),
because vLLM pins other package versions.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from djinn_lib.engine.decode.eager import Tokens, check_prompt
from djinn_lib.engine.models.checkpoint import folder_config
from djinn_lib.errors import ConfigError
from djinn_lib.fleet.environment import without_flashinfer
from djinn_lib.sockets import socket_folder
from djinn_lib.systems.base import ModelFiles, Served, SystemUnderTest

MAX_MODEL_LEN = 512
_SOCKET = "/12345678-1234-1234-1234-123456789012"  # the form of vLLM's socket names


class VllmRecreate(SystemUnderTest):
    """Tears the engine down and builds the next one, reading the weights from disk.

    Options:
        enforce_eager: no CUDA graphs and no compilation, as in the paper (default True).
        max_model_len: tokens of prompt and answer together (default 512).
        gpu_memory_utilization: share of the GPU that an engine may take (default 0.6).
    """

    option_names = frozenset({"enforce_eager", "max_model_len", "gpu_memory_utilization"})
    reads_files_while_serving = True

    @classmethod
    def unavailable(cls, device: str) -> str | None:
        """Check that vLLM can be imported."""
        if find_spec("vllm"):
            return None
        hint = "run `make vllm`" if device == "cpu" else "pip install vllm==0.24.0"
        return f"vLLM is not installed in this environment: {hint}"

    def start(self, progress: Callable[[str], None] = lambda step: None) -> None:
        """Configure vLLM; engines are built during the requests that need them."""
        set_environment()
        progress("importing vLLM")
        import vllm

        self.vllm = vllm
        self.engine: Any = None
        self.resident: str | None = None
        self.vocab_sizes = vocab_sizes(self.models)

    def serve(self, model: str, prompt_ids: Sequence[int], max_new_tokens: int) -> Served:
        """Generate with the model's engine, building it unless it is the current one."""
        files = self.known(model)
        ids = check_request(prompt_ids, self.vocab_sizes[model], max_new_tokens, self.options)
        begin_s = time.perf_counter()
        victim = self.resident
        if victim != model:
            self.reset()
            self.engine = self.vllm.LLM(**engine_options(files, self.options))
            self.resident = model
        loaded_s = time.perf_counter()
        try:
            tokens = generate_stepwise(self.vllm, self.engine, ids, max_new_tokens)
        except BaseException:
            self.reset()  # the next request needs a clean engine
            raise
        times_s = loaded_s - begin_s, time.perf_counter() - begin_s
        evicted = [victim] if victim and victim != model else []
        return self.served(
            model, tokens, *times_s, found=victim == model, evicted=evicted, resident=[model]
        )

    def reset(self) -> None:
        """Tear the engine down and free its memory."""
        if self.engine is not None:
            engine, self.engine, self.resident = self.engine, None, None
            engine.llm_engine.engine_core.shutdown()
            del engine
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def close(self) -> None:
        """Tear the last engine down."""
        if hasattr(self, "engine"):
            self.reset()


def set_environment() -> None:
    """Set vLLM's environment variables, unless the user has set them."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_RPC_BASE_PATH", socket_folder(len(_SOCKET)))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # otherwise two lines at every sleep
    without_flashinfer()
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))


def vocab_sizes(models: Mapping[str, ModelFiles]) -> dict[str, int]:
    """Return the size of each model's vocabulary, which limits the ids of prompts."""
    return {
        name: folder_config(files.folder).get_text_config().vocab_size
        for name, files in models.items()
    }


def check_request(
    prompt_ids: Sequence[int], vocab_size: int, max_new_tokens: int, options: dict[str, Any]
) -> list[int]:
    """Return the prompt as a list, if the engine can serve the whole request.

    Raises:
        ConfigError: the prompt cannot be used, or the answer would not fit. vLLM would then stop
            early without an error.
    """
    ids = check_prompt(prompt_ids, vocab_size, max_new_tokens)
    limit = options.get("max_model_len", MAX_MODEL_LEN)
    if len(ids) + max_new_tokens > limit:
        raise ConfigError(
            f"expected at most {limit} tokens of prompt and answer together, got {len(ids)} + "
            f"{max_new_tokens}: raise the option max_model_len"
        )
    return ids


def engine_options(files: ModelFiles, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of every vLLM engine of the experiment."""
    return {
        "model": str(files.folder),
        "load_format": "safetensors",
        "skip_tokenizer_init": True,
        "dtype": files.dtype,
        "enable_prefix_caching": False,
        "max_model_len": options.get("max_model_len", MAX_MODEL_LEN),
        "gpu_memory_utilization": options.get("gpu_memory_utilization", 0.6),
        "kv_cache_memory_bytes": options.get("kv_cache_memory_bytes"),
        "enforce_eager": options.get("enforce_eager", True),
        "disable_log_stats": True,
    }


def generate_stepwise(
    vllm: Any, llm: Any, prompt_ids: Sequence[int], max_new_tokens: int
) -> Tokens:
    """Decode greedily.

    The engine is stepped by hand, because only this gives the exact time of the first token.
    """
    begin_s = time.perf_counter()
    parameters = vllm.SamplingParams(
        max_tokens=max_new_tokens,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        output_kind=vllm.sampling_params.RequestOutputKind.CUMULATIVE,
    )
    engine = llm.llm_engine
    engine.add_request("request", {"prompt_token_ids": list(prompt_ids)}, parameters)
    ids: list[int] = []
    first_s = 0.0
    while engine.has_unfinished_requests():
        for output in engine.step():
            ids = list(output.outputs[0].token_ids)
        if ids and not first_s:
            first_s = time.perf_counter() - begin_s
    return Tokens(tuple(ids), first_s, time.perf_counter() - begin_s)
