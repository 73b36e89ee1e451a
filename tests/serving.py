"""A server of the run of the previous release, in a thread or a process, and a client."""

import contextlib
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import uvicorn
from test_written_before import WRITTEN

import pals_jax
from pals_jax.inference.server.command import TOKEN as VARIABLE
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

    def __init__(self, port: int, app: Any) -> None:
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


@contextlib.contextmanager
def serving_process(workdir: Path, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], Client]]:
    """`pals-jax serve` as a process that listens, and a client; its log goes to a file."""
    command = [sys.executable, "-m", "pals_jax", "serve", f"--workdir={workdir}", "--port=0"]
    environment = os.environ | {VARIABLE: TOKEN, "JAX_PLATFORMS": "cpu"}
    with log.open("w") as file, subprocess.Popen(command, stderr=file, env=environment) as process:
        try:
            wait_until(lambda: "\n" in log.read_text())
            listening = json.loads(log.read_text().splitlines()[0])
            assert (listening["event"], listening["host"]) == ("listening", "127.0.0.1")
            yield process, Client(listening["port"], None)
        finally:
            process.kill()


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
