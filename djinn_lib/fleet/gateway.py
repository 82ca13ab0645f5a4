"""One OpenAI-compatible address for several `vllm serve` servers, one for each model.

Requests are routed by their `model` and forwarded unchanged, and answers are streamed back. If a
caller disconnects, its request is cancelled, which frees its place in vLLM's batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from djinn_lib.errors import DjinnError, unknown_model
from djinn_lib.fleet.status import RingStatus

_HOP_BY_HOP = frozenset(
    {"connection", "content-length", "host", "keep-alive", "transfer-encoding", "upgrade"}
)


@dataclass(frozen=True, slots=True)
class Upstream:
    """The server of a model: its address, and whether its process runs."""

    url: str
    is_alive: Callable[[], bool]


class Gateway:
    """The gateway; `app` runs in any ASGI server.

    Args:
        upstreams: servers by name of the model.
        status: returns the state of the ring; raises `DjinnError` if the ring has ended.
    """

    def __init__(self, upstreams: Mapping[str, Upstream], status: Callable[[], RingStatus]) -> None:
        self._upstreams, self._status = dict(upstreams), status
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "djinn_requests", "Requests passed on", ["model", "status"], registry=self._registry
        )
        self._registry.register(_RingCollector(status))  # type: ignore[arg-type]
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Route("/v1/models", self._models),
                Route("/v1/models/{model:path}", self._model),
                Route("/{path:path}", self._pass_on, methods=["POST"]),
            ],
            exception_handlers={HTTPException: _refusal},  # type: ignore[dict-item]
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=None, limits=limits) as self._client:
            yield

    async def _health(self, request: Request) -> Response:
        """Return 200 if all servers are healthy, else 503 and the state of each."""
        names = list(self._upstreams)
        well = await asyncio.gather(*(self._is_well(self._upstreams[name]) for name in names))
        state = {name: "ok" if one else "down" for name, one in zip(names, well, strict=True)}
        try:
            await asyncio.to_thread(self._status)
            state["ring"] = "ok"
        except DjinnError:
            state["ring"] = "down"
        is_well = set(state.values()) == {"ok"}
        return JSONResponse(state, 200 if is_well else 503)

    async def _is_well(self, upstream: Upstream) -> bool:
        try:
            answer = await self._client.get(f"{upstream.url}/health", timeout=5.0)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

    async def _metrics(self, request: Request) -> Response:
        text = await asyncio.to_thread(generate_latest, self._registry)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, request: Request) -> Response:
        """List the models, as their servers describe them; without those that are down."""
        cards = await asyncio.gather(*(self._card(one, request) for one in self._upstreams))
        return JSONResponse({"object": "list", "data": [one for one in cards if one]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self._upstreams:
            return self._unknown(name)
        card = await self._card(name, request)
        return JSONResponse(card) if card else _error(503, f"the server of {name!r} is down")

    async def _card(self, name: str, request: Request) -> dict[str, Any] | None:
        """Return a server's description of its model, or None; forwards the authorization."""
        headers = {k: v for k, v in request.headers.items() if k == "authorization"}
        url = f"{self._upstreams[name].url}/v1/models"
        try:
            answer = await self._client.get(url, headers=headers, timeout=5.0)
            return answer.json()["data"][0]
        except (httpx.HTTPError, ValueError, KeyError, IndexError):
            return None

    def _unknown(self, model: str) -> Response:
        said = unknown_model(model, self._upstreams, "choose one of these")
        return self._answer("unknown", _error(404, said))

    async def _pass_on(self, request: Request) -> Response:
        body = await request.body()
        try:
            asked = json.loads(body)
            model = asked["model"] if isinstance(asked, dict) else None
        except (ValueError, KeyError):
            model = None
        if not isinstance(model, str):
            return _error(400, "the request names no model: send JSON with a field `model`")
        if not (upstream := self._upstreams.get(model)):
            return self._unknown(model)
        return self._answer(model, await self._ask(model, upstream, request, body))

    def _answer(self, model: str, response: Response) -> Response:
        self._requests.labels(model, str(response.status_code)).inc()
        return response

    async def _ask(self, model: str, upstream: Upstream, request: Request, body: bytes) -> Response:
        """Forward a request; cancel it if the caller disconnects before the answer."""
        url = httpx.URL(f"{upstream.url}{request.url.path}", query=request.url.query.encode())
        headers = [(k, v) for k, v in request.headers.raw if k.decode().lower() not in _HOP_BY_HOP]
        sent = self._client.build_request(request.method, url, headers=headers, content=body)
        answering = asyncio.create_task(self._client.send(sent, stream=True))
        leaving = asyncio.create_task(_hangs_up(request))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                return Response(status_code=499)  # the caller has disconnected
            answer = answering.result()
        except httpx.HTTPError as error:
            why = "is not reachable" if upstream.is_alive() else "has ended"
            return _error(
                503, f"the server of {model!r} {why} ({type(error).__name__}): see its log"
            )
        finally:
            for task in (answering, leaving):
                task.cancel()
        kept = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP_BY_HOP}
        return StreamingResponse(_parts(model, answer), answer.status_code, kept)


async def _hangs_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _parts(model: str, answer: httpx.Response) -> AsyncIterator[bytes]:
    """What a server answers, as it comes; a caller that leaves closes the connection to it.

    A stream of events whose server ends ends with an event that says so, as vLLM's own errors do.
    """
    try:
        async for part in answer.aiter_raw():
            yield part
    except httpx.HTTPError as error:
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            raise
        why = f"the server of {model!r} ended in the middle of its answer ({type(error).__name__})"
        yield f"data: {json.dumps(_told(500, why))}\n\n".encode()
    finally:
        await answer.aclose()


async def _refusal(request: Request, error: HTTPException) -> Response:
    """No route takes the request."""
    said = f"{request.method} {request.url.path} is nothing that can be asked here: {error.detail}"
    return _error(error.status_code, said)


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse(_told(status, message), status)


def _told(status: int, message: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": status}}


class _RingCollector:
    """The ring's state as Prometheus metrics, looked up when they are asked for."""

    def __init__(self, status: Callable[[], RingStatus]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Yield every metric; none when there is no ring any more."""
        try:
            status = self._status()
        except DjinnError:
            return
        page = status.page_bytes
        yield GaugeMetricFamily("djinn_ring_bytes", "Size of the ring", status.n_frames * page)
        counters = {
            "djinn_switches": ("Leases that had to load pages", "switches", 1),
            "djinn_leases": ("Leases granted", "leases", 1),
            "djinn_revoked": ("Leases taken back for others", "revoked", 1),
            "djinn_loaded_bytes": ("Bytes copied to the device", "loaded_pages", page),
            "djinn_evicted_bytes": ("Bytes that others took", "evicted_pages", page),
            "djinn_waited_seconds": ("Time until leases were granted", "waited_s", 1),
        }
        for name, (what, count, unit) in counters.items():
            family = CounterMetricFamily(name, what, labels=["model"])
            for one in status.models:
                family.add_metric([one.model], getattr(one.counts, count) * unit)
            yield family
        resident = GaugeMetricFamily(
            "djinn_resident_bytes", "Bytes of a model on the device", labels=["model"]
        )
        longest = GaugeMetricFamily(
            "djinn_longest_wait_seconds", "Longest wait for a lease", labels=["model"]
        )
        for one in status.models:
            resident.add_metric([one.model], one.n_resident * page)
            longest.add_metric([one.model], one.counts.longest_wait_s)
        yield resident
        yield longest
