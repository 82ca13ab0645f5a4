"""Leases by the step: which engine may compute with its pages, and which has to give them up.

Pure bookkeeping over the engine's own `Ring`, without sockets, threads or a clock: every event
brings its time along, and the answer is a list of messages for engines. The broker carries them.

An engine asks for a lease when it has something to compute, and gives it back when it has nothing
left. Between the two it runs as many steps as it likes. Three rules decide:

* **The oldest waiter comes first.** It gets free frames and those of models without a lease at
  once, and copies into them while others still compute. It holds the lease when nothing is missing.
* **A lease lasts for a quantum at least**, and for five times as long as its own load took, so that
  loading takes at most a fifth of the time. When the oldest waiter needs the frames of holders
  whose quantum is over, those are asked to give back, the longest holder first.
* **Nobody waits for longer than `max_wait_s`** and a step: then no quantum protects a holder.

A waiter that misses nothing is served at once, whoever else waits. Models that fit into the ring
together hold leases together.
"""

from __future__ import annotations

import math

from djinn_lib.engine.memory.policies import Policy
from djinn_lib.engine.memory.ring import Ring
from djinn_lib.errors import ConfigError, LeaseError
from djinn_lib.fleet.lease_states import Engine, Frames, Revoke, State

LOAD_SHARE = 5  # a lease lasts at least that many times as long as loading for it took


class Leases:
    """Who holds pages of the ring, who waits for them and who must give them up.

    Args:
        ring: its frames; nobody else may change it.
        policy: orders the models that lose pages.
        quantum_s: how long a lease lasts at least while others wait.
        max_wait_s: how long the oldest waiter is kept waiting by anybody's quantum.

    Raises:
        ConfigError: a time is not above zero, or nobody could ever have a whole quantum.
    """

    def __init__(
        self, ring: Ring, policy: Policy, quantum_s: float = 0.25, max_wait_s: float = 1.0
    ) -> None:
        if not 0 < quantum_s <= max_wait_s < math.inf:
            raise ConfigError(
                f"a quantum of {quantum_s} s and a longest wait of {max_wait_s} s cannot be used: "
                "give both above zero, and a longest wait of at least one quantum"
            )
        self.ring, self._policy = ring, policy
        self._quantum_s, self._max_wait_s = quantum_s, max_wait_s
        self._engines: dict[str, Engine] = {}
        self._n_asked = 0
        self._loading: str | None = None  # the oldest waiter, once frames were assigned to it

    def __contains__(self, model: str) -> bool:
        """Whether an engine with that model joined."""
        return model in self._engines

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Every engine, in the order in which they joined; to be read only."""
        return tuple(self._engines.values())

    # -- events --------------------------------------------------------------------------------

    def join(self, model: str, n_pages: int) -> None:
        """Add an engine whose model has `n_pages` pages; none of them is resident.

        Raises:
            ConfigError: another engine serves a model of that name.
            CapacityError: the model is larger than the ring.
        """
        self.ring.add(model, n_pages)
        self._policy.admit(model, n_pages, self.ring.n_frames)
        self._engines[model] = Engine(model)

    def leave(self, model: str, now_s: float) -> list[Frames | Revoke]:
        """Remove an engine, whatever it was doing; its frames are free."""
        self._release(model)
        del self._engines[model]
        self.ring.remove(model)
        self._policy.forget(model)
        return self._advance(now_s)

    def ask(self, model: str, now_s: float) -> list[Frames | Revoke]:
        """Queue an engine that wants to compute.

        Raises:
            LeaseError: it waits already, or holds a lease.
        """
        engine = self._in_state(model, State.IDLE)
        engine.state, engine.since_s, engine.place = State.WAITING, now_s, self._n_asked
        self._n_asked += 1
        self._policy.touch(model, now_s)
        return self._advance(now_s)

    def use(self, model: str, now_s: float) -> None:
        """Note a request that came while the engine holds its lease, for the policy."""
        self._policy.touch(model, now_s)

    def loaded(self, model: str, seconds: float, now_s: float) -> None:
        """Note that the pages of a holder arrived, `seconds` after they were assigned."""
        engine = self._engines[model]
        if engine.state is State.HOLDING:
            engine.since_s = now_s
            engine.quantum_s = max(self._quantum_s, LOAD_SHARE * seconds)

    def give_back(self, model: str, now_s: float, drop: bool = False) -> list[Frames | Revoke]:
        """End a lease, asked for or not; the engine no longer reads its pages.

        Args:
            model: whose lease ends.
            now_s: when.
            drop: free all its frames as well, as an engine that is put to sleep does.

        Raises:
            LeaseError: the engine is waiting, or holds no lease and drops nothing.
        """
        idle = (State.IDLE,) if drop else ()
        self._in_state(model, State.HOLDING, State.REVOKED, *idle)
        self._release(model)
        if drop:
            self.ring.evict(model, self.ring.n_resident(model))
        return self._advance(now_s)

    def tick(self, now_s: float) -> list[Frames | Revoke]:
        """Let time pass: quanta end."""
        return self._advance(now_s)

    def deadline_s(self) -> float | None:
        """When `tick` will change something, if nothing happens before."""
        waiting = self._waiting()
        if not waiting or self._shortfall(waiting[0]) <= 0:
            return None
        return min(self._revocable_s(holder, waiting[0]) for holder in self._holders())

    # -- decisions -----------------------------------------------------------------------------

    def _advance(self, now_s: float) -> list[Frames | Revoke]:
        """Serve waiters, the oldest first, until one has to wait for somebody's step."""
        out: list[Frames | Revoke] = []
        waiting = self._waiting()
        self._policy.expect([engine.model for engine in waiting])
        while waiting:
            oldest = waiting.pop(0)
            out += self._assign(oldest, now_s)
            if oldest.state is State.WAITING:
                out += self._revoke_for(oldest, now_s)
                break
        for engine in waiting:
            if self.ring.is_whole(engine.model):
                out += self._assign(engine, now_s)
        return out

    def _assign(self, engine: Engine, now_s: float) -> list[Frames | Revoke]:
        """Give a waiter the frames that can be had now, and the lease if those are all."""
        model, ring = engine.model, self.ring
        n_kept, n_pages = ring.n_resident(model), ring.n_loadable(model)
        granted = n_pages == ring.n_missing(model)
        if not n_pages and not granted:
            return []
        evicted = ring.make_room(model, self._policy, n_pages)
        for extent in evicted:
            self._engines[extent.model].counts.evicted_pages += len(extent.frames)
        frames = ring.map_missing(model, n_pages).frames
        was_loading = self._loading == model
        if not was_loading:  # from now on its pages are written to
            ring.lease(model)
        if was_loading or not granted:
            self._loading = None if granted else model
        engine.counts.loaded_pages += n_pages
        if granted:
            self._grant(engine, now_s, switched=bool(n_pages) or was_loading)
        n_evicted = sum(len(extent.frames) for extent in evicted)
        return [Frames(model, n_kept, frames, granted, n_evicted)]

    def _grant(self, engine: Engine, now_s: float, switched: bool) -> None:
        counts, waited_s = engine.counts, now_s - engine.since_s
        counts.leases += 1
        counts.switches += switched
        counts.waited_s += waited_s
        counts.longest_wait_s = max(counts.longest_wait_s, waited_s)
        engine.state, engine.since_s = State.HOLDING, now_s
        engine.quantum_s = math.inf if switched else self._quantum_s  # until `loaded` says more

    def _revoke_for(self, waiter: Engine, now_s: float) -> list[Frames | Revoke]:
        """Ask holders whose time is over to give back, no more of them than are needed."""
        shortfall = self._shortfall(waiter)
        out: list[Frames | Revoke] = []
        for holder in sorted(self._holders(), key=lambda engine: engine.since_s):
            if shortfall <= 0:
                break
            if self._revocable_s(holder, waiter) <= now_s:
                holder.state = State.REVOKED
                holder.counts.revoked += 1
                shortfall -= self.ring.n_resident(holder.model)
                out.append(Revoke(holder.model))
        return out

    def _shortfall(self, waiter: Engine) -> int:
        """Pages that a waiter misses beyond those that are about to be given back."""
        coming = [e.model for e in self._engines.values() if e.state is State.REVOKED]
        return self.ring.n_missing(waiter.model) - sum(map(self.ring.n_resident, coming))

    def _revocable_s(self, holder: Engine, waiter: Engine) -> float:
        return min(holder.since_s + holder.quantum_s, waiter.since_s + self._max_wait_s)

    def _release(self, model: str) -> None:
        """Take the lease from an engine, or its place in the queue."""
        engine = self._engines[model]
        if self.ring.is_leased(model):
            self.ring.release(model)
        if self._loading == model:
            self._loading = None
        engine.state = State.IDLE

    def _waiting(self) -> list[Engine]:
        """Waiters, the first that asked first, also of several that asked at one time."""
        waiting = [e for e in self._engines.values() if e.state is State.WAITING]
        return sorted(waiting, key=lambda engine: engine.place)

    def _holders(self) -> list[Engine]:
        return [e for e in self._engines.values() if e.state is State.HOLDING]

    def _in_state(self, model: str, *states: State) -> Engine:
        engine = self._engines.get(model)
        if engine is None or engine.state not in states:
            state = engine.state.value if engine else "unknown"
            raise LeaseError(
                f"the engine of {model!r} is {state} where it has to be "
                f"{' or '.join(s.value for s in states)}: it broke the ring's protocol"
            )
        return engine

    def check(self) -> None:
        """Audit the whole state; raises `AssertionError` naming the first broken invariant."""

        def ensure(holds: bool, what: str) -> None:
            if not holds:
                raise AssertionError(f"lease invariant broken: {what}")

        self.ring.check()
        ensure(set(self.ring.models) == set(self._engines), "each engine has one page table")
        waiting = self._waiting()
        for model, engine in self._engines.items():
            holds = engine.state in (State.HOLDING, State.REVOKED)
            leased = self.ring.is_leased(model)
            ensure(leased == (holds or model == self._loading), f"{model!r} is leased if in use")
            ensure(not holds or self.ring.is_whole(model), f"{model!r} misses nothing if in use")
        if self._loading is not None:
            oldest = waiting[0].model if waiting else None
            ensure(self._loading == oldest, "only the oldest waiter has pages in flight")
        for engine in waiting:
            ensure(not self.ring.is_whole(engine.model), f"{engine.model!r} waits for something")
        if waiting:
            ensure(not self.ring.n_loadable(waiting[0].model), "the oldest waiter has what is free")
