"""One vLLM engine on a ring whose copies are slow; run in vLLM's environment, prints JSON.

``vllm_overlap.py MODEL``, with DJINN_RING set. Says the tokens on a hit, those of a cold start with
slow copies, and for how long the first step waited before each layer.
"""

import json
import os
import sys
import time

if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.model_executor.offloader.base import get_offloader

    from djinn_lib.engine.memory.devices import base

    llm = LLM(
        model=sys.argv[1], served_model_name=["model"], skip_tokenizer_init=True, dtype="float32",
        max_model_len=64, enforce_eager=True, kv_cache_memory_bytes=64 << 20,
        worker_cls="djinn_lib.fleet.vllm_worker.RingCPUWorker",
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, detokenize=False)

    def tokens():
        said = llm.generate([{"prompt_token_ids": [5, 6, 7]}], sampling, use_tqdm=False)
        return list(said[0].outputs[0].token_ids)

    hit = tokens()
    copy_page, offloader, waits = base.copy_page, get_offloader(), {}
    ring = offloader._ring
    wait = ring.wait

    def slowly(target, source):
        time.sleep(0.01)
        copy_page(target, source)

    def timed(end=None):
        begin_s = time.perf_counter()
        wait(end)
        waits.setdefault(end, time.perf_counter() - begin_s)  # a layer may be looked up twice

    base.copy_page, ring.wait = slowly, timed
    llm.collective_rpc("ring_rest")
    llm.collective_rpc("ring_sleep")
    cold = tokens()
    first = list(waits.values())[: len(offloader.layers)]
    print(json.dumps({"hit": hit, "cold": cold, "waits": first}), flush=True)
    os._exit(0)
