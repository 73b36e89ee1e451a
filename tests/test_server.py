"""The server: its answers are those of the run, tasks come and go, and what it refuses."""

import asyncio
import itertools
import json
import logging
import re
import socket
import struct
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WORDS
from serving import MAX_TASKS, TOKEN, Client, Gate, read, serving, wait_until
from test_api import compiled, spoilt
from test_written_before import COLOUR, SAME, WRITTEN

import pals_jax
from pals_jax import Run
from pals_jax.cli import main
from pals_jax.inference.server import app as app_module
from pals_jax.inference.server import command
from pals_jax.inference.server.access import LOGGER, JsonFormatter

TEXT, PAIR = next(iter(COLOUR)), list(next(iter(SAME)))
UPLOAD = (WRITTEN / "same.task").read_bytes()


@pytest.fixture(scope="module")
def run() -> Run:
    return pals_jax.load(WRITTEN)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with serving() as client:
        yield client


@pytest.fixture
def gate(client: Client, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Closed until the test ends; then every answer has been given."""
    gate = Gate(client.app.state.service, monkeypatch)
    yield gate
    gate.open()
    wait_until(lambda: client.metric("pals_jax_waiting_answers") == 0)


def assert_equal(answer: dict[str, Any], expected: Any) -> None:
    assert (answer["task"], answer["label"]) == (expected.task, expected.label)
    assert answer["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
    assert answer["value"] == pytest.approx(expected.value, abs=1e-5)


# ------------------------------------------------ answers


def test_a_text_a_pair_a_list_and_all(client, run):
    for question, texts, task in (
        ({"text": TEXT, "task": "colour"}, TEXT, "colour"),
        ({"text": TEXT, "task": "all"}, TEXT, "colour"),
        ({"text": PAIR, "task": "same"}, tuple(PAIR), "same"),
        ({"texts": list(COLOUR), "task": "colour"}, list(COLOUR), "colour"),
        ({"texts": list(SAME), "task": "all"}, list(SAME), "all"),
        ({"texts": list(SAME), "task": ["same", "share", "same"]}, list(SAME), "all"),
    ):
        response = client.predict(**question)
        assert response.status == 200, response.body
        expected = run.predict(texts, task=task)
        answers = list(itertools.chain(*response.body["answers"]))
        assert len(answers) == len(expected)
        for answer, row in zip(answers, expected, strict=True):
            assert_equal(answer, row)


def test_requests_of_different_tasks_share_batches(client, run):
    """Whatever arrives together: each gets its own answer, and nothing is compiled for it."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, n)) for n in rng.integers(1, 12, 60)]
    asked = [(text, "colour") if i % 2 else ((text, text), "same") for i, text in enumerate(texts)]
    expected = [run.predict(text, task=task)[0] for text, task in asked]
    batches = client.metric("pals_jax_batch_answers_count")
    with compiled() as events, ThreadPoolExecutor(20) as threads:
        responses = list(threads.map(lambda x: client.predict(text=x[0], task=x[1]), asked))
    for response, row in zip(responses, expected, strict=True):
        assert_equal(response.body["answers"][0][0], row)
    assert client.metric("pals_jax_batch_answers_count") - batches < len(asked) / 2
    assert events == []


def test_tasks_come_and_go_without_compilation(client, run):
    ask = {"text": PAIR, "task": "same"}
    (expected,) = run.predict(tuple(PAIR), task="same")
    with compiled() as events:
        assert client.ask("DELETE", "/v1/tasks/same", token=TOKEN).status == 204
        assert client.predict(**ask).status == 404
        assert [a["task"] for a in client.predict(**ask | {"task": "all"}).body["answers"][0]] == [
            "share"
        ]
        added = client.ask("POST", "/v1/tasks", UPLOAD, TOKEN)
        assert (added.status, added.body["name"]) == (201, "same"), added.body
        assert_equal(client.predict(**ask).body["answers"][0][0], expected)
    assert not [event for event in events if "backend_compile" in event]
    found = client.ask("GET", "/v1/tasks").body
    assert [task["name"] for task in found["tasks"]] == ["colour", "share", "same"]
    assert (found["max_tasks"], found["administration"]) == (MAX_TASKS, True)
    assert found["tasks"][2]["labels"] == ["maybe", "no", "yes"]


def test_what_waits_for_a_task_that_is_removed_is_answered(client, run, gate):
    """And nothing is written to its row before."""
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(client.predict, text=TEXT, task="colour")
        gate.reached.wait(60)
        waits = threads.submit(client.predict, text=PAIR, task="same")
        wait_until(lambda: client.metric("pals_jax_waiting_answers") == 1)
        assert client.ask("DELETE", "/v1/tasks/same", token=TOKEN).status == 204
        again = threads.submit(client.ask, "POST", "/v1/tasks", UPLOAD, TOKEN)
        assert not waits.done()
        gate.open()
        assert first.result().status == 200
        assert_equal(waits.result().body["answers"][0][0], run.predict(tuple(PAIR), "same")[0])
        assert again.result().status == 201


# ------------------------------------------------ what is refused


def with_task(path: Path, **changes: Any) -> bytes:
    """The upload with other metadata of its task, or `tensors` to change."""
    change = changes.pop("tensors", None)

    def spoil(tensors: Any, metadata: Any) -> None:
        task = json.loads(metadata["task"]) | {"name": "new"} | changes
        metadata["task"] = json.dumps(task)
        if change is not None:
            change(tensors, metadata)

    return spoilt(path / "upload.task", spoil).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, _: tensors["head/bias"].put(0, np.nan), "not finite, in head/bias"),
        (lambda tensors, _: tensors["head/kernel"].fill(3e38), "outputs are not finite"),
        (lambda _, metadata: metadata.update(base="0" * 64), "was trained on another base"),
        (lambda _, metadata: metadata.update(max_length="17"), "trained on texts of 17 tokens"),
        (lambda _, metadata: metadata.update(format="other"), "is not a task file"),
        (lambda _, metadata: metadata.update(method="-" * 50_000 + "1"), "metadata of"),
        (lambda _, metadata: metadata.update(task="[" * 50_000), "metadata of"),
        (lambda _, metadata: metadata.update(task='{"name": "x", "text": {}}'), "is not a list"),
    ],
)
def test_task_files_that_are_refused(client, tmp_path, change, message):
    response = client.ask("POST", "/v1/tasks", with_task(tmp_path, tensors=change), TOKEN)
    assert response.status == 400
    assert message in response.body["error"]
    assert str(tmp_path.parent) not in response.body["error"]
    assert "/tmp" not in response.body["error"]
    assert len(client.ask("GET", "/v1/tasks").body["tasks"]) == 3


def test_uploads_beyond_what_there_is_room_for(client, tmp_path):
    new = with_task(tmp_path)
    for body, token, status, message in (
        (UPLOAD, TOKEN, 409, "there is a task 'same' already; remove that first"),
        (b"x", TOKEN, 400, "cannot read the task file the uploaded file"),
        (b"x" * 3_000_000, TOKEN, 413, "the body is larger than"),
        (new, None, 401, "needs the administrator's token"),
        (new, TOKEN + "x", 401, "needs the administrator's token"),
        (new, "ü", 401, "needs the administrator's token"),
        (new, TOKEN, 201, "new"),
        (with_task(tmp_path, name="one more"), TOKEN, 409, "there is room for 4 tasks and all are"),
    ):
        response = client.ask("POST", "/v1/tasks", body, token)
        assert response.status == status, response.body
        assert message in json.dumps(response.body)
    assert client.ask("DELETE", "/v1/tasks/new").status == 401
    assert client.ask("DELETE", "/v1/tasks/new", token=TOKEN).status == 204
    assert client.ask("DELETE", "/v1/tasks/new", token=TOKEN).status == 404


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/tasks"), ("DELETE", "/v1/tasks/same")])
def test_nobody_administers_a_server_without_a_token(method, path):
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    app = command.application(pals_jax.load(WRITTEN), MAX_TASKS)
    scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b""}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 403
    assert "the server was started without a token" in json.loads(sent[1]["body"])["error"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"text": "red", "task": "colours"}, 404, "no task 'colours'; GET /v1/tasks lists"),
        ({"text": "red", "task": ["colour", ""]}, 400, "task must be the name of a task"),
        ({"text": PAIR, "task": "colour"}, 400, "text 1: the number of texts is 2; task colour n"),
        ({"text": "red", "task": "same"}, 400, "task same needs 2 as an array: a, b"),
        ({"texts": ["red", PAIR], "task": "all"}, 400, "text 2: the number of texts is 2; task"),
        ({"texts": [], "task": "colour"}, 400, "texts must be an array of 1 to 1024 texts"),
        ({"texts": ["red", 3], "task": "colour"}, 400, "two strings; number 2 is not."),
        ({"text": "red", "texts": ["red"], "task": "colour"}, 400, "give text, for one, or texts"),
        ({"text": "red", "task": "colour", "tasks": 1}, 400, "and task, and nothing else"),
        ({"text": [*PAIR, "x"], "task": "all"}, 400, "an array of two strings"),
        ({"texts": [PAIR] * 600, "task": "all"}, 413, "600 texts for 2 tasks are more than 1024"),
        (b"", 400, "the body is not valid JSON: EOF"),
        (b"[" * 100_000, 400, "the body is not valid JSON: recursion limit"),
        (b'{"text": "\xff", "task": "colour"}', 400, "the body is not valid UTF-8"),
        (b'{"text": "\\ud83d", "task": "colour"}', 400, "the body is not valid JSON"),
        (b"[]", 400, "the body must be a JSON object"),
        (b" " * 2**20 + b"{}", 413, "the body is larger than 1048576 bytes"),
    ],
)
def test_questions_that_are_refused(client, body, status, message):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.ask("POST", "/v1/predict", body)
    assert (response.status, list(response.body)) == (status, ["error"])
    assert message in response.body["error"]
    assert response.body["error"].endswith(".")


def test_a_text_of_a_million_characters_is_truncated(client, run):
    long = "red box " * 125_000
    answer = client.predict(text=long, task="colour").body["answers"][0][0]
    assert_equal(answer, run.predict(long, task="colour")[0])


def test_pages_that_are_not_there(client):
    for method, path, status in (
        ("GET", "/v2", 404),
        ("PUT", "/v1/tasks", 405),
        ("GET", "/v1/predict", 405),
        ("DELETE", "/v1/tasks/", 401),
    ):
        response = client.ask(method, path)
        assert (response.status, list(response.body)) == (status, ["error"])


# ------------------------------------------------ limits


def test_a_full_queue(client, gate, monkeypatch):
    monkeypatch.setattr(client.app.state.service.batcher, "_capacity", 2)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(client.predict, text=TEXT, task="colour")
        gate.reached.wait(60)
        second = threads.submit(client.predict, texts=[TEXT] * 2, task="colour")
        wait_until(lambda: client.metric("pals_jax_waiting_answers") == 2)
        busy = client.predict(text=TEXT, task="colour")
        assert (busy.status, int(busy.headers["retry-after"]) >= 1) == (503, True)
        assert "too much is waiting; try again in" in busy.body["error"]
        gate.open()
        assert [first.result().status, second.result().status] == [200, 200]


def test_an_answer_that_takes_too_long(client, gate, monkeypatch):
    monkeypatch.setattr(app_module, "ANSWER_SECONDS", 0.2)
    assert client.predict(text=TEXT, task="colour").status == 504
    assert client.predict(text=TEXT, task="colour").status == 504
    assert client.metric("pals_jax_waiting_answers") == 0


def test_a_body_that_does_not_come(client, monkeypatch):
    monkeypatch.setattr(app_module, "BODY_SECONDS", 0.2)
    connection = client.connect()
    connection.putrequest("POST", "/v1/predict")
    connection.putheader("Content-Length", "100")
    connection.endheaders(b"{")
    response = read(connection)
    connection.close()
    assert (response.status, "within 0 s" in response.body["error"]) == (408, True)


def test_a_client_that_goes_away_costs_nothing(client, gate):
    with ThreadPoolExecutor(1) as threads:
        stays = threads.submit(client.predict, text=TEXT, task="colour")
        gate.reached.wait(60)
        goes = client.connect()
        goes.request("POST", "/v1/predict", json.dumps({"texts": [TEXT] * 5, "task": "colour"}))
        wait_until(lambda: client.metric("pals_jax_waiting_answers") == 5)
        # Resets the connection, rather than closing it politely.
        goes.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        goes.close()
        wait_until(lambda: client.metric("pals_jax_waiting_answers") == 0)
        gate.open()
        assert stays.result().status == 200


def test_a_batch_that_fails_fails_alone(client, monkeypatch):
    model = client.app.state.service.model

    def fail(plan: Any) -> None:
        raise RuntimeError("secret words")

    with monkeypatch.context() as patched:
        patched.setattr(model, "compute", fail)
        failed = client.predict(text=TEXT, task="colour")
    assert (failed.status, "its log says where" in failed.body["error"]) == (500, True)
    assert client.predict(text=TEXT, task="colour").status == 200


# ------------------------------------------------ what it says


def test_logs_and_metrics_hold_no_texts(client):
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(JsonFormatter().format(record))  # type: ignore
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        client.predict(text="secret words", task="colour")
        client.predict(text="secret words", task="same")
        client.ask("GET", "/secret?secret=words")
        client.ask("SECRET", "/healthz")
        wait_until(lambda: len(lines) >= 4)
    finally:
        LOGGER.removeHandler(handler)
    entries = [json.loads(line) for line in lines]
    assert [(x["method"], x["route"], x["status"]) for x in entries[:4]] == [
        ("POST", "/v1/predict", 200),
        ("POST", "/v1/predict", 400),
        ("GET", "other", 404),
        ("other", "/healthz", 405),
    ]
    metrics = client.ask("GET", "/metrics").body
    assert "secret" not in "".join([*lines, metrics]).lower()
    assert 'pals_jax_requests_total{method="POST",route="/v1/predict",status="200"}' in metrics


def test_a_traceback_in_the_log_holds_no_texts():
    try:
        raise ValueError("secret words")
    except ValueError:
        failed = sys.exc_info()
    record = LOGGER.makeRecord("x", logging.ERROR, "x", 1, "failed", (), failed)
    line = json.loads(JsonFormatter().format(record))
    assert (line["event"], line["error"]) == ("failed", "ValueError")
    assert "test_server.py" in line["where"][0]
    assert "secret" not in json.dumps(line)


def test_pages_ask_nobody_else(client):
    """Neither the page nor the documentation loads anything from another host."""
    assert client.ask("GET", "/healthz") == client.ask("GET", "/healthz")
    page, docs = client.ask("GET", "/"), client.ask("GET", "/docs")
    assert (page.status, docs.status) == (200, 200)
    assert "default-src 'none'; script-src 'sha256-" in page.headers["content-security-policy"]
    for text in (page.body, docs.body):
        assert set(re.findall(r"https?://[^'\"]*", text)) <= {"http://www.w3.org/2000/svg"}
    assert set(client.ask("GET", "/openapi.json").body["paths"]) == {
        *("/v1/predict", "/v1/tasks", "/v1/tasks/{name}", "/healthz", "/readyz", "/metrics")
    }


# ------------------------------------------------ the command


def test_commands_that_are_refused(capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        serve = ["serve", f"--workdir={WRITTEN}"]
        for arguments, message in (
            ([f"--port={taken.getsockname()[1]}"], "address already in use; choose another --host"),
            (["--port=70000"], "there is no port 70000; --port is from 0 (any) to 65535"),
            (["--host=256.1.1.1"], "cannot listen on 256.1.1.1, port 8000"),
            (["--port=0", "--max-tasks=2"], "has 3 tasks, and --max-tasks=2 leaves no room"),
        ):
            assert main([*serve, *arguments]) == 2
            assert message in capsys.readouterr().err
    monkeypatch.setenv(command.TOKEN, "short")
    assert main(serve) == 2
    assert "fewer than 16 characters" in capsys.readouterr().err
