"""The server as a process: it listens, is told to end, answers what it has accepted, and ends."""

import json
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving import TOKEN, serving_process, wait_until
from test_written_before import COLOUR, WRITTEN

pytestmark = pytest.mark.slow


def test_from_start_to_end(tmp_path: Path) -> None:
    workdir, log = Path(shutil.copytree(WRITTEN, tmp_path / "run")), tmp_path / "log"
    with serving_process(workdir, log) as (process, client):
        assert client.ask("GET", "/healthz").status == 200
        early = client.predict(text="red box", task="colour")
        assert early.status in (200, 503)  # while it compiles
        wait_until(lambda: client.ask("GET", "/readyz").status == 200)

        shutil.rmtree(workdir)  # read once
        upload = (WRITTEN / "same.task").read_bytes()
        assert client.ask("DELETE", "/v1/tasks/same", token=TOKEN).status == 204
        assert client.ask("POST", "/v1/tasks", upload, TOKEN).status == 201
        (text, (label, probability)), *_ = COLOUR.items()
        answer = client.predict(text=text, task="colour").body["answers"][0][0]
        assert (answer["label"], answer["probabilities"]["red"]) == (
            label,
            pytest.approx(probability, abs=1e-5),
        )

        many = {"texts": [text] * 1024, "task": "colour"}
        with ThreadPoolExecutor(2) as threads:
            accepted = [threads.submit(client.predict, **many) for _ in range(2)]
            wait_until(lambda: client.metric("pals_jax_waiting_answers") > 1024)
            process.send_signal(signal.SIGTERM)
            for response in accepted:
                assert response.result().status == 200
                assert len(response.result().body["answers"]) == 1024
        assert process.wait(60) == 0
        with pytest.raises(OSError, match="refused"):
            client.ask("GET", "/healthz")
    entries = [json.loads(entry) for entry in log.read_text().splitlines()]
    assert entries[-1]["event"] == "ended"
    assert {entry["event"] for entry in entries} == {"listening", "request", "ended"}
