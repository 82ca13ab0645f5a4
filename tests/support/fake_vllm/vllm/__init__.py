"""Stands in for vLLM in tests of what is around it: batches requests, and computes next to nothing.

A model is random bytes, on a ring if a worker class is given; a token is a byte of them.
"""

import os
import time
from dataclasses import asdict
from functools import partial
from importlib import import_module
from types import SimpleNamespace

from fake_engine import FakeEngine, weights_of

__version__ = "0.0-fake"
VOCAB = 256


class SamplingParams:
    def __init__(self, max_tokens, output_kind, detokenize, **others):
        if others.get("temperature", 0) > 100:
            raise ValueError("that is too hot")
        self.max_tokens, self.detokenize = max_tokens, detokenize


sampling_params = SimpleNamespace(RequestOutputKind=SimpleNamespace(DELTA="delta"))


class LLM:
    def __init__(self, model, served_model_name, worker_cls=None, n_bytes=1 << 20, fails=None,
                 max_model_len=64, skip_tokenizer_init=True, step_s=0.001, **others):  # fmt: skip
        if os.environ.get("VLLM_USE_FLASHINFER_SAMPLER") != "0":  # as vLLM does on a GPU
            import_module("flashinfer")
        if fails == "start":
            raise RuntimeError("no kernel for this device")
        if fails == "die":
            os._exit(7)
        self.name, self.fails, self.step_s = served_model_name[0], fails, step_s
        self.weights, self.ring = weights_of(self.name, n_bytes), None
        if worker_cls:
            self.engine = FakeEngine(
                os.environ["DJINN_RING"], self.name, n_bytes, masters=os.environ["DJINN_MASTERS"]
            )
            self.ring = self.engine.ring
        self.running = {}
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(
                max_model_len=max_model_len,
                get_vocab_size=lambda: VOCAB,
                skip_tokenizer_init=skip_tokenizer_init,
            ),
            add_request=self.add_request,
            abort_request=lambda numbers: [self.running.pop(n, None) for n in numbers],
            step=self.step,
            engine_core=SimpleNamespace(shutdown=self.shutdown),
        )

    def add_request(self, number, prompt, params):
        ids = prompt["prompt_token_ids"] if isinstance(prompt, dict) else [*prompt.encode()]
        if ids == [13]:
            raise ValueError("13 is bad luck")
        self.running[number] = (list(ids), params, [])

    def step(self):
        """One token of every request."""
        if self.fails == "step":
            raise RuntimeError("an illegal memory access")
        outputs = []
        self.in_step(lambda: time.sleep(self.step_s))
        for number, (ids, params, said) in list(self.running.items()):
            token = self.in_step(partial(self.byte, len(ids) + sum(ids)))
            ids.append(token)
            said.append(token)
            finished = len(said) == params.max_tokens
            if finished:
                del self.running[number]
            text = chr(97 + token % 26) if params.detokenize else ""
            completion = SimpleNamespace(
                token_ids=[token], text=text, finish_reason="length" if finished else None
            )
            outputs.append(
                SimpleNamespace(
                    request_id=number,
                    prompt_token_ids=ids[: len(ids) - len(said)],
                    outputs=[completion],
                    finished=finished,
                )
            )
        return outputs

    def byte(self, i):
        bytes_ = self.weights if self.ring is None else self.ring.view
        return int(bytes_[i * 4099 % len(self.weights)])

    def in_step(self, compute):
        if self.ring is None:
            return compute()
        self.ring.begin_step()
        try:
            self.ring.wait()
            return compute()
        finally:
            self.ring.end_step()

    def collective_rpc(self, method, args=()):
        answers = {
            "ring_costs": lambda: self.ring.costs,
            "ring_bytes": lambda: self.ring.n_bytes,
            "ring_rest": lambda: self.ring.rest(),
            "ring_sleep": lambda: self.ring.sleep(),
        }
        return [answers[method](*args)]

    def shutdown(self):
        if self.ring:
            assert asdict(self.ring.costs)["leases"] >= 0
            self.engine.close()
