"""Ten thousand malformed requests: none is answered with 500, and memory does not grow."""

import contextlib
import json
import socket
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import TOKEN, Client, serving_process, wait_until
from test_written_before import WRITTEN

pytestmark = pytest.mark.nightly
UPLOAD = (WRITTEN / "same.task").read_bytes()
_GROWTH = 16 * 2**20  # bytes; allocators keep some of what they once had

keys = st.sampled_from(["text", "texts", "task", "tasks", ""]) | st.text(max_size=5)
texts = st.text(max_size=40) | st.text(st.characters(), max_size=5)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from(["colour"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
questions = st.dictionaries(keys, values, max_size=4).map(lambda x: json.dumps(x).encode())


@st.composite
def cut_and_changed(draw: st.DrawFn, whole: bytes) -> bytes:
    """A part of it, with some bytes changed, most of them in its beginning."""
    content = bytearray(whole[: draw(st.integers(0, len(whole)))])
    for _ in range(draw(st.integers(0, 3)) if content else 0):
        content[draw(st.integers(0, min(len(content), 3000) - 1))] = draw(st.integers(0, 255))
    return bytes(content)


good = json.dumps({"text": ["red box", "box"], "task": ["same", "share"]}).encode()
bodies = st.binary(max_size=60) | questions | cut_and_changed(good) | cut_and_changed(UPLOAD)
methods = st.sampled_from(["GET", "POST", "DELETE", "PUT", "HEAD", "OPTIONS", "BREW"])
paths = st.sampled_from(
    ["/", "/v1/predict", "/v1/tasks", "/v1/tasks/other", "/v1/tasks/", "/metrics", "/docs"]
) | st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), max_size=20).map("/".__add__)
headers = st.dictionaries(
    st.sampled_from(["Content-Type", "Authorization", "Transfer-Encoding", "Expect", "Range"]),
    st.sampled_from(
        [f"Bearer {TOKEN}", "application/json", "chunked", "100-continue", "x", "\xff"]
    ),
    max_size=3,
)
proper = {"Authorization": f"Bearer {TOKEN}"}
requests = st.one_of(
    st.tuples(st.just("POST"), st.just("/v1/predict"), st.just({}), bodies),
    st.tuples(st.just("POST"), st.just("/v1/tasks"), st.just(proper) | st.just({}), bodies),
    st.tuples(methods, paths, headers, bodies),
    st.binary(max_size=80),  # not even HTTP
)


def status(client: Client, content: bytes) -> int | None:
    """The status of the response to these bytes; None if there is none."""
    with contextlib.closing(socket.create_connection(("127.0.0.1", client.port), 60)) as connection:
        with contextlib.suppress(ConnectionError):  # it may be refused before it is complete
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            line = connection.makefile("rb").readline().split()
            return int(line[1]) if line else None
    return None


def resident(process: int) -> int:
    """Bytes of memory of a process."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * int(dict(line.split(":", 1) for line in lines)["VmRSS"].split()[0])


def campaign(client: Client, examples: int) -> set[int | None]:
    seen: set[int | None] = set()

    @settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(requests)
    def send(request: tuple[str, str, dict[str, str], bytes] | bytes) -> None:
        if isinstance(request, bytes):
            content = request + b"\r\n\r\n"
        else:
            method, path, given_headers, body = request
            lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
            lines += [f"{name}: {value}" for name, value in given_headers.items()]
            content = "\r\n".join([*lines, "", ""]).encode("latin-1") + body
        code = status(client, content)
        seen.add(code)
        assert code is None or code < 500

    send()
    return seen


def test_ten_thousand_malformed_requests(tmp_path: Path) -> None:
    with serving_process(WRITTEN, tmp_path / "log") as (process, client):
        wait_until(lambda: client.ask("GET", "/readyz").status == 200)
        seen = campaign(client, 2000)  # fills what is kept
        before = resident(process.pid)
        seen |= campaign(client, 8000)
        assert resident(process.pid) - before < _GROWTH
        assert {200, 400, 401, 404, 405} <= seen
        assert client.metric("pals_jax_waiting_answers") == 0
        assert client.predict(text="red box", task="colour").status == 200
