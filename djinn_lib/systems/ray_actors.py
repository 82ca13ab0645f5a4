"""`ray_actors`: one Ray actor process per model, killed to make room."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import psutil

from djinn_lib.engine.decode.eager import Tokens, generate_eager
from djinn_lib.local_ray import start_ray
from djinn_lib.paths import python_path
from djinn_lib.systems.base import ModelFiles, Served, SystemUnderTest, load_ordinarily

_OBJECT_STORE_BYTES = 100 << 20  # actors exchange token ids only
_LOAD_S = 600.0  # without a limit, the wait for an actor that Ray cannot place never ends
_GENERATE_S = 600.0
_KILL_S = 30.0


class ModelActor:
    """The code in an actor's process: one model on the device."""

    def __init__(self, files: ModelFiles, device: str) -> None:
        self.model = load_ordinarily(files, device)

    def ready(self) -> int:
        """Return the process id, once the model is loaded."""
        return os.getpid()

    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int) -> tuple[float, Tokens]:
        """Decode with transformers' `generate`; return the clock (s) at its start too.

        Linux has one monotonic clock for all processes, so the caller can use the value.
        """
        begin_s = time.perf_counter()
        return begin_s, generate_eager(self.model, prompt_ids, max_new_tokens, ignore_eos=True)


class RayActors(SystemUnderTest):
    """Keeps a model resident while its actor lives; kills the least recently used."""

    reads_files_while_serving = True

    @classmethod
    def unavailable(cls, device: str) -> str | None:
        """Check that Ray is installed."""
        return None if find_spec("ray") else "ray is not installed: pip install 'ray>=2.60'"

    def start(self, progress: Callable[[str], None] = lambda step: None) -> None:
        """Start Ray on this machine, once."""
        import ray

        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ["PYTHONPATH"] = python_path()  # actors inherit it
        os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
        # As many threads as the other systems; Ray's default is 1. Not as a runtime_env, with which
        # Ray starts no worker ahead: every actor then takes twice as long to start.
        os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
        progress("starting Ray")
        self.started_ray = not ray.is_initialized()
        if self.started_ray:
            start_ray(
                num_cpus=len(self.models) + 1,
                object_store_memory=_OBJECT_STORE_BYTES,
                configure_logging=False,
            )
        self.actors: OrderedDict[str, Any] = OrderedDict()
        self.pids: dict[str, int] = {}
        # Actors share the GPU: Ray only counts shares, and does not enforce them.
        n_gpus = 1 / (len(self.models) + 1) if self.device.type == "cuda" else 0
        self.actor_class = ray.remote(num_cpus=1, num_gpus=n_gpus, max_restarts=0)(ModelActor)

    def warm_up(self, model: str, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
        """Do nothing: every new actor is a new, cold process."""
        return

    def serve(self, model: str, prompt_ids: Sequence[int], max_new_tokens: int) -> Served:
        """Generate in the model's actor, which is created if it does not live."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        files = self.known(model)
        begin_s = time.perf_counter()
        was_resident = model in self.actors
        victims = [] if was_resident else self.victims(model, self.actors)
        for victim in victims:
            self._kill(victim)
        try:
            if not was_resident:
                self.actors[model] = self.actor_class.remote(files, str(self.device))
                ready = self.actors[model].ready.remote()
                self.pids[model] = ray.get(ready, timeout=_LOAD_S)
            self.actors.move_to_end(model)
            loaded_s = time.perf_counter()
            call = self.actors[model].generate.remote(list(prompt_ids), max_new_tokens)
            generate_s, tokens = ray.get(call, timeout=_GENERATE_S)
            wait_s = generate_s - loaded_s  # until the call reached the actor
            tokens = Tokens(tokens.token_ids, wait_s + tokens.first_s, wait_s + tokens.last_s)
        except RayTaskError as error:  # the request failed, the actor lives on
            raise error.as_instanceof_cause() from error
        except (RayError, TimeoutError):  # the actor died, or its state is unknown
            self._kill(model)
            raise
        times_s = loaded_s - begin_s, time.perf_counter() - begin_s
        return self.served(
            model, tokens, *times_s, found=was_resident, evicted=victims, resident=self.actors
        )

    def _kill(self, model: str) -> None:
        """Kill an actor and wait until its process has ended and its memory is free."""
        import ray

        if actor := self.actors.pop(model, None):
            ray.kill(actor)
        if (pid := self.pids.pop(model, None)) and self.started_ray:
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).wait(_KILL_S)

    def reset(self) -> None:
        """Kill all actors."""
        for name in list(self.actors):
            self._kill(name)

    def close(self) -> None:
        """Kill the actors, and stop Ray if this system started it."""
        import ray

        if not hasattr(self, "actors"):
            return
        self.reset()
        if self.started_ray and ray.is_initialized():
            ray.shutdown()
        self.started_ray = False
