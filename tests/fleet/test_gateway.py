"""One address in front of several servers, which are stand-ins here."""

import asyncio
import json
import threading
import time

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from djinn_lib.engine.memory.policies import LRU
from djinn_lib.engine.memory.ring import Ring
from djinn_lib.errors import ConfigError
from djinn_lib.fleet.fleet_file import read_fleet_file, vllm_arguments
from djinn_lib.fleet.gateway import Gateway, Upstream
from djinn_lib.fleet.leases import Leases
from djinn_lib.fleet.status import RingStatus


class Running:
    """An ASGI application on a port of this machine."""

    def __init__(self, app):
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def end(self):
        self._server.should_exit = True
        self._thread.join(10)


class FakeServer:
    """Answers as `vllm serve` does, as far as it matters; notes what it is asked."""

    def __init__(self, model):
        self.model, self.asked, self.given_up = model, [], threading.Event()
        self.go_on = threading.Event()  # for what is held after its first part
        self.running = Running(
            Starlette(
                routes=[
                    Route("/health", lambda request: Response()),
                    Route("/v1/models", self.models),
                    Route("/v1/completions", self.complete, methods=["POST"]),
                ]
            )
        )

    async def models(self, request):
        return JSONResponse({"object": "list", "data": [{"id": self.model, "max_model_len": 64}]})

    async def complete(self, request):
        body = await request.json()
        self.asked.append((body, dict(request.headers), request.url.query))
        if body.get("wrong"):
            return JSONResponse({"error": {"message": "too long"}}, 400, {"x-from": self.model})
        if body.get("stream"):
            return StreamingResponse(self.stream(body), media_type="text/event-stream")
        if body.get("slow"):
            try:
                while not await request.is_disconnected():
                    await asyncio.sleep(0.02)
            finally:
                self.given_up.set()
        return JSONResponse({"text": f"{self.model} says {body['prompt']}"})

    async def stream(self, body):
        try:
            for i in range(body["stream"]):
                if i == body.get("ends_at"):
                    raise RuntimeError("as if its engine had ended")
                yield f"data: {i}\n\n"
                if body.get("held"):
                    await asyncio.to_thread(self.go_on.wait, 10)
                await asyncio.sleep(0.02)
        finally:
            self.given_up.set()


@pytest.fixture(scope="module")
def servers():
    servers = {name: FakeServer(name) for name in ("chat", "code")}
    yield servers
    for server in servers.values():
        server.running.end()


RING = Leases(Ring(10), LRU())
RING.join("chat", 4)
RING.ask("chat", 0.0)


@pytest.fixture(scope="module")
def gateway(servers):
    upstreams = {n: Upstream(s.running.url, lambda: True) for n, s in servers.items()}
    upstreams["dead"] = Upstream("http://127.0.0.1:9", lambda: False)
    running = Running(Gateway(upstreams, lambda: RingStatus.of(RING, "cpu", 1 << 20)).app)
    yield running.url
    running.end()


def complete(gateway, **body):
    return httpx.post(f"{gateway}/v1/completions", json=body, timeout=20)


def test_requests_go_to_their_model_and_are_passed_through(gateway, servers):
    for model in ("chat", "code"):
        answer = httpx.post(
            f"{gateway}/v1/completions?x=1",
            json={"model": model, "prompt": "hi"},
            headers={"authorization": "Bearer secret"},
        )
        assert answer.json() == {"text": f"{model} says hi"}
        body, headers, query = servers[model].asked[-1]
        assert body == {"model": model, "prompt": "hi"} and query == "x=1"
        assert headers["authorization"] == "Bearer secret"


def test_models_are_listed_and_one_that_is_down_is_not(gateway):
    listed = httpx.get(f"{gateway}/v1/models").json()
    assert [one["id"] for one in listed["data"]] == ["chat", "code"]
    assert httpx.get(f"{gateway}/v1/models/code").json()["id"] == "code"
    for name, status, says in [
        ("none", 404, "choose one of these"),
        ("dead", 503, "'dead' is down"),
    ]:
        answer = httpx.get(f"{gateway}/v1/models/{name}")
        assert answer.status_code == status and says in answer.json()["error"]["message"]


def test_an_answer_comes_as_it_is_made(gateway, servers):
    body = {"model": "chat", "stream": 5, "held": True}
    with httpx.stream("POST", f"{gateway}/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        parts = answer.iter_text()
        assert next(parts) == "data: 0\n\n"  # while the others are not yet made
        servers["chat"].go_on.set()
        assert "".join(parts) == "".join(f"data: {i}\n\n" for i in range(1, 5))


@pytest.mark.parametrize("body", [{"stream": 10**6}, {"slow": True}])
def test_a_caller_that_hangs_up_gives_its_request_up(gateway, servers, body):
    servers["code"].given_up.clear()
    n_asked = len(servers["code"].asked)
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.stream(
            "POST", f"{gateway}/v1/completions", json={"model": "code", **body},
            timeout=httpx.Timeout(20, read=0.3 if "slow" in body else 20),
        ) as answer,
    ):  # fmt: skip
        next(answer.iter_text())
        raise httpx.ReadTimeout("we have seen enough")
    assert len(servers["code"].asked) == n_asked + 1
    assert servers["code"].given_up.wait(10)


def test_errors_are_passed_through_and_those_of_the_gateway_look_alike(gateway):
    answer = complete(gateway, model="chat", wrong=True)
    assert answer.status_code == 400 and answer.headers["x-from"] == "chat"
    assert answer.json()["error"]["message"] == "too long"
    for status, says, answer in [
        (404, "got 'none': choose one of these", complete(gateway, model="none")),
        (404, "did you mean 'chat'?", complete(gateway, model="chta")),
        (400, "names no model", complete(gateway, prompt="hi")),
        (400, "names no model", httpx.post(f"{gateway}/v1/completions", content=b"{")),
        (400, "names no model", httpx.post(f"{gateway}/v1/completions", content=b"[]")),
        (503, "has ended", complete(gateway, model="dead", prompt="hi")),
    ]:
        assert answer.status_code == status
        assert says in answer.json()["error"]["message"]
    answer = httpx.get(f"{gateway}/v1/none")
    assert answer.status_code == 405 and "GET /v1/none" in answer.json()["error"]["message"]


def test_a_stream_whose_server_ends_says_so(gateway):
    body = {"model": "chat", "stream": 5, "ends_at": 2}
    with httpx.stream("POST", f"{gateway}/v1/completions", json=body) as answer:
        events = "".join(answer.iter_text()).strip().split("\n\n")
    assert events[:2] == ["data: 0", "data: 1"]
    said = json.loads(events[2].removeprefix("data: "))["error"]["message"]
    assert "'chat' ended in the middle of its answer" in said


def test_health_names_what_is_down(gateway, servers):
    answer = httpx.get(f"{gateway}/health")
    assert answer.status_code == 503
    assert answer.json() == {"chat": "ok", "code": "ok", "dead": "down", "ring": "ok"}
    alone = Running(
        Gateway(
            {"chat": Upstream(servers["chat"].running.url, lambda: True)},
            lambda: RingStatus.of(RING, "cpu", 1 << 20),
        ).app
    )
    assert httpx.get(f"{alone.url}/health").status_code == 200
    alone.end()


def test_metrics_of_requests_and_of_the_ring(gateway):
    complete(gateway, model="chat", prompt="hi")
    said = httpx.get(f"{gateway}/metrics").text
    for line in (
        "djinn_ring_bytes 1.048576e+07",
        'djinn_resident_bytes{model="chat"} 4.194304e+06',
        'djinn_switches_total{model="chat"} 1.0',
        'djinn_loaded_bytes_total{model="chat"} 4.194304e+06',
        'djinn_requests_total{model="chat",status="200"}',
    ):
        assert line in said


# -- the file --


def written(tmp_path, text):
    path = tmp_path / "fleet.yml"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def test_a_fleet_file(tmp_path):
    models = {"chat": {"model": "org/a", "max_model_len": 8192, "enforce_eager": True,
                       "enable_prefix_caching": False, "hf_overrides": {"x": [1]},
                       "middleware": ["a", "b"]}}  # fmt: skip
    file = read_fleet_file(written(tmp_path, {"capacity": 1 << 30, "models": models}))
    assert file.ring_options()["capacity"] == f"{1 << 30}B"
    assert vllm_arguments("chat", file.models["chat"]) == [
        "serve", "org/a", "--served-model-name", "chat", "--max-model-len", "8192",
        "--enforce-eager", "--no-enable-prefix-caching", "--hf-overrides", '{"x": [1]}',
        "--middleware", "a", "b",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "needs at least"),
        ({"capacity": "1GiB", "models": {"a": {"model": "x"}}, "port": "http"}, "1 to 65535"),
        ({"capacity": "1GiB"}, "no `models`"),
        ({"capacity": "1GiB", "models": ["a"]}, "maps names to options"),
        ({"capacity": "1GiB", "models": {"a": {}}}, "has no `model`"),
        ({"capacity": "1GiB", "models": {"a": {"model": "x"}}, "ports": 1}, "unknown option"),
    ],
)
def test_a_fleet_file_that_cannot_be_used(tmp_path, text, says):
    with pytest.raises(ConfigError, match=says):
        read_fleet_file(written(tmp_path, text))


def test_no_fleet_file(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_fleet_file(tmp_path / "none.yml")
