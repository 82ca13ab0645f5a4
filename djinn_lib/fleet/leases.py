"""Schedule leases by the step: which engine may compute, and which must yield.

This is bookkeeping over the engine's own `Ring`, without sockets, threads or a clock. Every event
carries its time, and the result is a list of messages for engines. The broker delivers them.

An engine asks for a lease when it has work, and gives it back when it has none left. In between it
runs any number of steps. Three rules decide:

* **The oldest waiter comes first.** It gets free frames and the frames of models without a lease,
  loads into them while others still compute, and holds the lease when nothing is missing. It begins
  when the holders' own pages have arrived, because all copies share one link.
* **A lease lasts for at least a quantum**, and for at least five times its own load time. So
  loading takes at most a fifth of the time. If the oldest waiter needs the frames of holders whose
  quantum is over, these are revoked, the longest holder first.
* **The wait is bounded** by `max_wait_s` and a step: after that no quantum protects a holder.

A waiter that misses nothing is served at once, regardless of other waiters. So models that fit into
the ring together hold leases together.
"""

from __future__ import annotations

import math

from djinn_lib.engine.memory.policies import Policy
from djinn_lib.engine.memory.ring import Ring
from djinn_lib.errors import ConfigError, LeaseError
from djinn_lib.fleet.lease_states import ARRIVING_S, Engine, Frames, Revoke, State

LOAD_SHARE = 5  # a lease lasts at least this many times as long as its load took


class Leases:
    """Decides which engines hold pages of the ring, which wait and which must yield.

    Args:
        ring: its frames; only this object may change it.
        policy: orders the models that lose pages.
        quantum_s: minimum duration of a lease while others wait.
        max_wait_s: how long quanta may delay the oldest waiter.

    Raises:
        ConfigError: a time is not above zero, or `max_wait_s` is shorter than the quantum.
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
        self._loading: str | None = None  # the oldest waiter, after its first frames were assigned

    def __contains__(self, model: str) -> bool:
        """Whether an engine with that model has joined."""
        return model in self._engines

    @property
    def engines(self) -> tuple[Engine, ...]:
        """All engines, in the order in which they joined; read-only."""
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
        """Remove an engine in any state and free its frames."""
        self._release(model)
        del self._engines[model]
        self.ring.remove(model)
        self._policy.forget(model)
        return self._advance(now_s)

    def ask(self, model: str, now_s: float) -> list[Frames | Revoke]:
        """Queue an engine that has work.

        Raises:
            LeaseError: it already waits or holds a lease.
        """
        engine = self._in_state(model, State.IDLE)
        engine.state, engine.since_s, engine.place = State.WAITING, now_s, self._n_asked
        self._n_asked += 1
        self._policy.touch(model, now_s)
        return self._advance(now_s)

    def use(self, model: str, now_s: float) -> None:
        """Record a request that came during the engine's lease, for the policy."""
        self._policy.touch(model, now_s)

    def loaded(self, model: str, seconds: float, now_s: float) -> None:
        """Record that a holder's pages arrived, `seconds` after they were assigned."""
        engine = self._engines[model]
        if engine.state is State.HOLDING:
            engine.since_s = now_s
            engine.quantum_s = max(self._quantum_s, LOAD_SHARE * seconds)

    def give_back(self, model: str, now_s: float, drop: bool = False) -> list[Frames | Revoke]:
        """End a lease, revoked or not; the engine no longer reads its pages.

        Args:
            model: whose lease ends.
            now_s: when.
            drop: also free all its frames, for an engine that is put to sleep.

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
        """Advance the time: quanta may end."""
        return self._advance(now_s)

    def deadline_s(self) -> float | None:
        """Return when `tick` will change something, if no other event comes first."""
        waiting = self._waiting()
        if not waiting:
            return None
        oldest, times_s = waiting[0], []
        if self._shortfall(oldest) > 0:
            times_s = [self._revocable_s(holder, oldest) for holder in self._holders()]
        if self.ring.n_loadable(oldest.model):  # held back, see `_must_keep_off_link`
            times_s.append(oldest.since_s + self._max_wait_s)
        return min(times_s, default=None)

    # -- decisions -----------------------------------------------------------------------------

    def _advance(self, now_s: float) -> list[Frames | Revoke]:
        """Serve waiters, oldest first, until one has to wait for a revoked step."""
        out: list[Frames | Revoke] = []
        waiting = self._waiting()
        self._policy.expect([engine.model for engine in waiting])
        while waiting:
            oldest = waiting.pop(0)
            if not self._must_keep_off_link(oldest, now_s):
                out += self._assign(oldest, now_s)
            if oldest.state is State.WAITING:
                out += self._revoke_for(oldest, now_s)
                break
        # Others are served only if they need no frames, so they cannot delay the oldest.
        for engine in waiting:
            if self.ring.is_whole(engine.model):
                out += self._assign(engine, now_s)
        return out

    def _must_keep_off_link(self, waiter: Engine, now_s: float) -> bool:
        """Whether a waiter's copies would slow down those of a holder.

        Two loads at once each take twice as long, so neither is earlier and the first is later.
        """
        if self.ring.is_whole(waiter.model) or now_s >= waiter.since_s + self._max_wait_s:
            return False
        return any(holder.is_arriving for holder in self._holders())

    def _assign(self, engine: Engine, now_s: float) -> list[Frames | Revoke]:
        """Assign available frames to a waiter, and the lease if nothing is missing."""
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
        if not was_loading:  # protect its pages from eviction while they are written
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
        engine.quantum_s = ARRIVING_S if switched else self._quantum_s

    def _revoke_for(self, waiter: Engine, now_s: float) -> list[Frames | Revoke]:
        """Revoke leases whose quantum is over, no more of them than necessary."""
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
        """Return the pages that a waiter misses beyond those that it can get or that come back."""
        coming = [e.model for e in self._engines.values() if e.state is State.REVOKED]
        short = self.ring.n_missing(waiter.model) - self.ring.n_loadable(waiter.model)
        return short - sum(map(self.ring.n_resident, coming))

    def _revocable_s(self, holder: Engine, waiter: Engine) -> float:
        return min(holder.since_s + holder.quantum_s, waiter.since_s + self._max_wait_s)

    def _release(self, model: str) -> None:
        """Take away an engine's lease or its place in the queue."""
        engine = self._engines[model]
        if self.ring.is_leased(model):
            self.ring.release(model)
        if self._loading == model:
            self._loading = None
        engine.state = State.IDLE

    def _waiting(self) -> list[Engine]:
        """List the waiters in the order in which they asked."""
        waiting = [e for e in self._engines.values() if e.state is State.WAITING]
        return sorted(waiting, key=lambda engine: engine.place)

    def _holders(self) -> list[Engine]:
        return [e for e in self._engines.values() if e.state is State.HOLDING]

    def _in_state(self, model: str, *states: State) -> Engine:
        engine = self._engines.get(model)
        if engine is None or engine.state not in states:
            state = engine.state.value if engine else "unknown"
            raise LeaseError(
                f"the engine of {model!r} is {state}, but must be "
                f"{' or '.join(s.value for s in states)}: it broke the ring's protocol"
            )
        return engine

    def check(self) -> None:
        """Check all invariants; raise `AssertionError` that names the first broken one."""

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
            held_back = any(holder.is_arriving for holder in self._holders())
            loads = held_back or not self.ring.n_loadable(waiting[0].model)
            ensure(loads, "the oldest waiter has what is free")
