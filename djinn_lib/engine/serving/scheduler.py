"""Serves requests in turns: waits, leases, computes, and looks ahead at what waits.

However many threads ask, two compute at most: the first that asked, and one of the scheduler.
Libraries keep something for each thread that has computed, and for as long as it lives: cuBLAS a
handle and its workspace, tens of MB of device memory, OpenMP a team of threads.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

from djinn_lib.engine.memory.pager import Pager
from djinn_lib.engine.serving.generation import Generation
from djinn_lib.engine.serving.lookahead import LoadAhead
from djinn_lib.engine.serving.options import EngineOptions
from djinn_lib.engine.serving.queue import RequestQueue
from djinn_lib.engine.serving.request import GenerationRequest, PendingGeneration
from djinn_lib.engine.serving.served_model import ServedModel
from djinn_lib.engine.serving.transcript import Transcript
from djinn_lib.engine.serving.turns import Ticket, Turns
from djinn_lib.errors import ConfigError, DjinnError, LeaseError


class Scheduler:
    """Computes one request at a time, whatever threads they come from.

    Args:
        pager: of the models.
        options: how requests are ordered, and whether what waits is loaded ahead.

    Attributes:
        overlap: start computing while later layers still load; may be changed.
    """

    def __init__(self, pager: Pager, options: EngineOptions) -> None:
        self._pager, self.overlap = pager, options.overlap
        queue = RequestQueue[Ticket](options.order, options.max_overtaken)
        self._turns = Turns(queue, pager.is_resident, self._look_ahead)
        self._ahead = LoadAhead(pager, self._turns.upcoming) if options.lookahead else None
        self._thread: ThreadPoolExecutor | None = None  # serves what was submitted
        self._starting = threading.Lock()
        self._first_ident: int | None = None  # of the thread that asked first
        self._own_ident: int | None = None

    def turn(self, name: str) -> AbstractContextManager[None]:
        """Wait for a turn to compute with a model, and hold it for the block."""
        return self._turns.turn(name)

    def ensure_may_await(self, name: str) -> None:
        """Raise `LeaseError` when a coroutine that awaits a request would wait for itself."""
        self._turns.ensure_may_wait(name, blocks_thread=False)

    def ensure_may_wait(self, name: str) -> None:
        """Raise `LeaseError` when a thread that waits for a request would wait for itself."""
        self._turns.ensure_may_wait(name)

    def generate(self, model: ServedModel, request: GenerationRequest) -> Generation:
        """Serve a request and wait for it: in the calling thread, if none asked before it did."""
        if self._turns.is_mine or self._may_compute():
            try:
                with self._turns.turn(model.name):
                    return self._serve(model, request)
            except KeyboardInterrupt as interrupt:
                # Frames of the computation hold its keys and values, and notebooks keep the last
                # traceback; nor would anybody read where in transformers it was.
                raise interrupt.with_traceback(None) from None
        self._turns.ensure_may_wait(model.name)
        return self.submit(model, request).result()

    def submit(self, model: ServedModel, request: GenerationRequest) -> PendingGeneration:
        """Queue a request, and serve it in a thread of the scheduler when its turn comes."""
        thread = self._started()
        ticket = self._turns.join(model.name)
        pending = PendingGeneration(
            request, lambda: self._turns.withdraw(ticket), self._turns.ensure_may_wait
        )

        def on_turn(_: object) -> None:
            if ticket.cancelled():
                return
            if error := ticket.exception():
                if pending.set_running_or_notify_cancel():
                    pending.set_exception(error)
                return
            try:
                thread.submit(self._run, model, ticket, pending)
            except RuntimeError as error:  # the interpreter ends: no thread takes work any more
                with self._turns.take(ticket):
                    if pending.set_running_or_notify_cancel():
                        pending.set_exception(_too_late(request, error))

        ticket.add_done_callback(on_turn)
        return pending

    def _run(self, model: ServedModel, ticket: Ticket, pending: PendingGeneration) -> None:
        error: BaseException | None = None
        generation: Generation | None = None
        with self._turns.take(ticket):
            if not pending.set_running_or_notify_cancel():
                return
            try:
                generation = self._serve(model, pending.request)
            except BaseException as raised:
                error = raised
        if generation:  # after the turn: whoever waits may count on the lease being free
            pending.set_result(generation)
        else:
            pending.set_exception(error)

    def _serve(self, model: ServedModel, request: GenerationRequest) -> Generation:
        request.proceed()
        queue_s = time.perf_counter() - request.begin_s
        with self._pager.lease(model.name) as lease:
            if model.removed:  # and another one was added under its name
                raise ConfigError(
                    f"expected {model.name!r} as it was when the request was submitted, got "
                    "another model of that name: submit it again"
                )
            self._look_ahead()
            if not self.overlap:
                self._pager.wait(model.name)
            lead_s = time.perf_counter() - request.begin_s

            def proceed() -> None:
                lease.stats.note_first_token()
                request.proceed()

            asked, transcript = request.sampling, _transcript(model, request)
            tokens = model.decoder.generate(
                request.prompt_ids,
                asked.max_new_tokens,
                asked.ignore_eos,
                asked,
                proceed,
                transcript.add if transcript else None,
            )
            if transcript:
                transcript.finish()
            stopped = transcript is not None and transcript.stopped
            return Generation.of(
                tokens,
                transcript.text if transcript and stopped else model.text(tokens.token_ids),
                tokens.ended or stopped,
                len(request.prompt_ids),
                lease.stats,
                queue_s,
                lead_s,
            )

    def _look_ahead(self) -> None:
        if self._ahead:
            self._ahead.nudge(self._turns.n_waiting)

    def _may_compute(self) -> bool:
        """Whether the calling thread is one of the two."""
        ident = threading.get_ident()
        with self._starting:
            self._first_ident = self._first_ident or ident
        return ident in (self._first_ident, self._own_ident)

    def _started(self) -> ThreadPoolExecutor:
        def note() -> None:
            self._own_ident = threading.get_ident()

        with self._starting:
            self._thread = self._thread or ThreadPoolExecutor(1, "djinn-scheduler", note)
            return self._thread

    def ensure_no_turn(self, action: str) -> None:
        """Refuse what cannot be done in a thread that holds a lease.

        Raises:
            LeaseError: the calling thread holds one.
        """
        if self._turns.is_mine:
            raise LeaseError(f"{action} cannot be called inside a lease: leave the lease first")

    def close(self, is_collected: bool = False) -> None:
        """Refuse what waits, and let the request that is being served come to its end.

        Args:
            is_collected: nobody is left who could hold a lease, so only requests are waited for.
        """
        self._turns.close({None, self._own_ident} if is_collected else None)
        if self._thread:  # in its own thread, in a callback of a request: it ends after this
            self._thread.shutdown(wait=threading.get_ident() != self._own_ident)
        if self._ahead:
            self._ahead.close()


def _transcript(model: ServedModel, request: GenerationRequest) -> Transcript | None:
    """What has to read the tokens of a request as they come; None if nothing has to."""
    stops = request.sampling.stops
    if request.deliver:
        return Transcript(model.tokenizer, stops, request.deliver)
    return Transcript(model.tokenizer, stops) if stops else None


def _too_late(request: GenerationRequest, error: BaseException) -> DjinnError:
    failed = DjinnError(
        f"a request for {request.model!r} cannot be served any more, since the interpreter ends: "
        "wait for requests with result() before that"
    )
    failed.__cause__ = error
    return failed
