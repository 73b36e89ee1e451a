"""A server of the run of the previous release, in a thread, and a client."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import uvicorn
from fastapi import FastAPI
from test_written_before import WRITTEN

import pals_jax
from pals_jax.inference.server.command import application, config, listen
from pals_jax.inference.server.service import Service

TOKEN = "a token for the tests"
MAX_TASKS = 4  # the run has three


class Response(NamedTuple):
    """A response; its body is read as JSON if it is that."""

    status: int
    headers: dict[str, str]
    body: Any


class Client:
    """Asks a server; each request has a connection of its own."""

    def __init__(self, port: int, app: FastAPI) -> None:
        self.port, self.app = port, app

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(
        self, method: str, path: str, body: bytes | None = None, token: str | None = None
    ) -> Response:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, body, headers)
            return read(connection)

    def predict(self, **question: Any) -> Response:
        return self.ask("POST", "/v1/predict", json.dumps(question).encode())

    def metric(self, name: str) -> float:
        lines = self.ask("GET", "/metrics").body.splitlines()
        return float(next((x.split()[-1] for x in lines if x.startswith(f"{name} ")), "0"))


def read(connection: http.client.HTTPConnection) -> Response:
    """The response on a connection."""
    response = connection.getresponse()
    text = response.read().decode()
    is_json = response.headers.get("content-type") == "application/json"
    return Response(response.status, dict(response.headers), json.loads(text) if is_json else text)


@contextlib.contextmanager
def serving(token: str | None = TOKEN) -> Iterator[Client]:
    """A client of a server that is ready."""
    app = application(pals_jax.load(WRITTEN), MAX_TASKS, token)
    server, listener = uvicorn.Server(config(app)), listen("127.0.0.1", 0)
    client = Client(listener.getsockname()[1], app)
    listener.listen()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_until(lambda: client.ask("GET", "/readyz").status == 200)
        yield client
    finally:
        server.should_exit = True
        thread.join()


def wait_until(condition: Any, seconds: float = 60) -> None:
    """Waits until something is so, or fails."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail("it has not become so")
        time.sleep(0.01)


class Gate:
    """Stops the model of a service before each batch, until it is opened."""

    def __init__(self, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open, self.reached = threading.Event(), threading.Event()
        model = service.model
        compute = model.compute

        def gated(plan: Any) -> Any:
            self.reached.set()
            self._open.wait(60)
            return compute(plan)

        monkeypatch.setattr(model, "compute", gated)

    def open(self) -> None:
        self._open.set()
