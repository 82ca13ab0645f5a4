"""The process of one vLLM engine, run as `python -m djinn_lib.fleet.vllm_engine FD`.

It serves requests from one pipe, batched as vLLM batches: whatever has arrived by the time that a
step begins takes part in it. Nothing here knows of the ring; that is the worker's business.

Both ends of the pipe may be of different environments, so only plain values travel:

* to the engine: first a mapping of options for `vllm.LLM`; then ``("add", id, prompt, parameters,
  streamed)``, ``("cancel", id)``, ``("call", id, method, arguments)`` for a method of the worker
  (or "sleep" and "wake_up"), ``("end",)``
* from the engine: ``("ready", facts)`` or ``("failed", message, class)``; then ``("part", id,
  token ids, text)``, ``("done", id, result)``, ``("refused", id, message)``, ``("result", id,
  value)``, ``("broken", message)``
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from djinn_lib.fleet import children
from djinn_lib.fleet.environment import without_flashinfer


@dataclass(slots=True)
class _Request:
    """A request that is being served; times (s) are of the clock that all processes share."""

    streamed: bool
    costs: Mapping[str, float]  # of the engine, when the request arrived
    begin_s: float = field(default_factory=time.perf_counter)
    n_prompt_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    first_s: float = 0.0


class Engine:
    """A vLLM engine in this process.

    Args:
        options: for `vllm.LLM`.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        without_flashinfer()
        import vllm

        self._vllm = vllm
        self._llm = vllm.LLM(**options)
        self._engine = self._llm.llm_engine
        self._requests: dict[str, _Request] = {}
        self._on_ring = "Ring" in str(options.get("worker_cls", ""))
        self._n_bytes = self._llm.collective_rpc("ring_bytes")[0] if self._on_ring else 0
        self._reported: Mapping[str, float] = self._costs()

    def facts(self) -> dict[str, Any]:
        """Return what the other side may want to know."""
        config = self._engine.model_config
        return {
            "pid": os.getpid(),
            "vllm": self._vllm.__version__,
            "max_model_len": config.max_model_len,
            "vocab_size": config.get_vocab_size(),
            "has_tokenizer": not config.skip_tokenizer_init,
        }

    def serve(self, pipe: Connection) -> None:
        """Serve until told to end, or until the other side is gone."""
        while True:
            while pipe.poll(0 if self._requests else None):
                message = pipe.recv()
                if message[0] == "end":
                    return
                self._handle(message, pipe)
            for reply in self._step():
                pipe.send(reply)

    def close(self) -> None:
        """Shut the engine down."""
        self._engine.engine_core.shutdown()

    def _handle(self, message: tuple[Any, ...], pipe: Connection) -> None:
        kind, number, *rest = message
        if kind == "add":
            try:
                self._add(number, *rest)
            except Exception as error:
                pipe.send(("refused", number, str(error) or type(error).__name__))
        elif kind == "cancel" and self._requests.pop(number, None):
            self._engine.abort_request([number])
            self._rest_if_idle()
        elif kind == "call":
            method, arguments = rest
            pipe.send(("result", number, self._call(method, arguments)))

    def _call(self, method: str, arguments: Sequence[Any]) -> Any:
        if method in ("sleep", "wake_up"):  # of the whole engine: its scheduler has to know
            return getattr(self._llm, method)(*arguments)
        return self._llm.collective_rpc(method, args=tuple(arguments))[0]

    def _add(
        self,
        number: str,
        prompt: str | Sequence[int],
        parameters: Mapping[str, Any],
        streamed: bool,
    ) -> None:
        kinds = self._vllm.sampling_params.RequestOutputKind
        has_text = not self._engine.model_config.skip_tokenizer_init
        sampling = self._vllm.SamplingParams(
            **parameters, output_kind=kinds.DELTA, detokenize=has_text
        )
        ids = prompt if isinstance(prompt, str) else {"prompt_token_ids": list(prompt)}
        self._engine.add_request(number, ids, sampling)
        self._requests[number] = _Request(streamed, self._costs())

    def _step(self) -> list[tuple[Any, ...]]:
        """Run one step of everything that is being served; returns what to send."""
        replies: list[tuple[Any, ...]] = []
        for output in self._engine.step():
            number, completion = output.request_id, output.outputs[0]
            if not (request := self._requests.get(number)):
                continue  # cancelled
            new_ids = list(completion.token_ids)
            request.n_prompt_tokens = len(output.prompt_token_ids or ())
            request.token_ids += new_ids
            request.text += completion.text or ""
            if new_ids and not request.first_s:
                request.first_s = time.perf_counter()
            if request.streamed and new_ids:
                replies.append(("part", number, new_ids, completion.text or ""))
            if output.finished:
                del self._requests[number]
                replies.append(("done", number, self._result(request, completion)))
        self._rest_if_idle()
        return replies

    def _result(self, request: _Request, completion: Any) -> dict[str, Any]:
        """What a request gave and cost; bytes that several waited for count for the first."""
        now, before = self._costs(), self._reported
        self._reported = now
        waits = ("waited_s", "stalled_s")
        loaded_bytes = now.get("loaded_bytes", 0) - before.get("loaded_bytes", 0)
        return {
            "token_ids": request.token_ids,
            "text": request.text,
            "n_prompt_tokens": request.n_prompt_tokens,
            "finish_reason": completion.finish_reason,
            "begin_s": request.begin_s,
            "first_s": request.first_s,
            "last_s": time.perf_counter(),
            "loaded_bytes": loaded_bytes,
            "resident_before_bytes": max(0, self._n_bytes - loaded_bytes),
            "evicted_bytes": now.get("evicted_bytes", 0) - before.get("evicted_bytes", 0),
            "switch_s": sum(now.get(one, 0) - request.costs.get(one, 0) for one in waits),
        }

    def _costs(self) -> Mapping[str, float]:
        return asdict(self._llm.collective_rpc("ring_costs")[0]) if self._on_ring else {}

    def _rest_if_idle(self) -> None:
        if self._on_ring and not self._requests:
            self._llm.collective_rpc("ring_rest")


def main() -> None:
    """Serve the pipe whose descriptor is the first argument."""
    pipe = Connection(int(sys.argv[1]))
    children.end_with_parent()
    # Interrupts of a notebook go to its whole process group, and end requests there, not engines.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        engine = Engine(pipe.recv())
    except BaseException as error:
        traceback.print_exc()
        pipe.send(("failed", str(error), type(error).__name__))
        raise SystemExit(1) from error
    try:
        pipe.send(("ready", engine.facts()))
        engine.serve(pipe)
    except (EOFError, ConnectionError):
        pass  # whoever asked is gone
    except BaseException as error:
        traceback.print_exc()
        pipe.send(("broken", f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from error
    engine.close()
    sys.stdout.flush()
    os._exit(0)  # Python's own end takes seconds after vLLM, and nothing is left to do


if __name__ == "__main__":
    main()
