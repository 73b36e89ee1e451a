"""The scripts of launch/ at work: TPU VMs and runs from creation to deletion, and babysitting."""

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable

import pytest
from fake_cloud import ENDS, TRAIN, Cloud


@pytest.fixture
def cloud(tmp_path):
    with Cloud(tmp_path) as made:
        yield made


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_create_status_stop_delete(cloud):
    assert "nothing is paid for" in cloud("status")[1]
    cloud("create")
    assert cloud.states == {"pals": "READY"}
    out, err = cloud("status")
    assert out.splitlines()[:2] == ["request ABSENT", "tpu READY"]
    assert "launch/delete.sh --name=pals" in err
    _, err = cloud("stop")
    assert cloud.states == {"pals": "STOPPED"}
    assert f"gcloud compute tpus tpu-vm start pals {ENDS}" in err
    assert "tpu-vm pals is STOPPED: you may be paying" in err
    _, err = cloud("delete")
    assert "nothing is paid for" in err
    assert cloud.states == {}
    cloud("delete")  # again does no harm


@pytest.mark.slow
def test_a_request_that_waits_is_deleted_too(cloud):
    cloud("create", "--queued", "--spot")
    assert cloud.states == {"request pals": "WAITING_FOR_RESOURCES"}
    cloud("delete")
    assert cloud.states == {}
    cloud("create", "--queued")
    for _ in range(3):
        out, _ = cloud("status")
    assert out == "request ACTIVE\ntpu READY\nrun unknown\n"
    assert cloud.states == {"pals": "READY", "request pals": "ACTIVE"}
    assert "cannot be stopped" in cloud("stop", status=1)[1]
    cloud("delete")
    assert cloud.states == {}


def test_a_failure_to_create_says_what_is_left_and_how_to_delete_it(cloud):
    (cloud.root / "fail-create").write_text("1")
    _, err = cloud("create", status=1)
    assert "nothing is paid for" in err
    (cloud.root / "break-create").write_text("1")
    _, err = cloud("create", status=1)
    assert "nothing is paid for" not in err
    command = re.search(r"tpu-vm pals is READY: you may be paying for it until you run: (.*)", err)
    subprocess.run(shlex.split(command[1]), env=cloud.environment, check=True, capture_output=True)
    assert cloud.states == {}


def test_a_failure_to_delete_is_no_success(cloud):
    cloud("create")
    (cloud.root / "fail-delete").write_text("1")
    assert "tpu-vm pals is READY" in cloud("delete", status=1)[1]
    (cloud.root / "fail-describe").write_text("9")  # nobody knows: it must not say "nothing"
    assert "nothing is paid for" not in cloud("delete", status=1)[1]
    (cloud.root / "fail-describe").unlink()


def test_a_run_gets_its_words_unchanged_on_every_worker(cloud):
    words = ["train", "--config.method=pals(size=204) + pooler()", 'it\'s "$HOME" `id` *;&\\']
    cloud.trainer('printf "<%s>\\n" "$@"; [[ $HOSTNAME != worker2 ]] || exit 5')
    cloud("create", "--kind=v3-32")
    cloud("run", "--", *words, status=1)  # nothing is installed yet
    cloud("setup")
    cloud("run", "--", *words)
    assert cloud.wait_for_run() == "5"  # one that failed is a failure
    out, _ = cloud("logs")
    assert out.count("== worker") == 4
    for word in words:
        assert out.count(f"<{word}>\n") == 4


@pytest.mark.slow
def test_there_is_one_run_at_a_time_and_its_exit_status_is_kept(cloud):
    cloud.trainer('until [[ -e "$BUCKET/go" ]]; do sleep 0.05; done; exit 7')
    cloud("create")
    cloud("setup")
    cloud("run", "--", "train")
    assert cloud("status")[0].splitlines()[-1] == "run running"
    assert "going on" in cloud("run", "--", "train", status=1)[1]
    assert "going on" in cloud("setup", status=1)[1]
    (cloud.root / "go").touch()
    assert cloud.wait_for_run() == "7"
    cloud.trainer("kill -9 $PPID")
    cloud("setup")
    cloud("run", "--", "train")
    assert cloud.wait_for_run() == "none"


def test_a_run_that_is_told_to_stop_says_how_it_ended(cloud):
    """The signal of a machine that shuts down reaches all of its process group."""
    cloud.trainer('trap "exit 143" TERM; touch "$BUCKET/up"; while :; do sleep 0.05; done')
    cloud("create")
    cloud("setup")
    cloud("run", "--", "train")
    until((cloud.root / "up").exists)
    os.killpg(int((cloud.home() / "pals_jax" / "run.pid").read_text()), signal.SIGTERM)
    assert cloud.wait_for_run() == "143"


def test_setup_again_updates_the_code_and_keeps_what_is_there(cloud, tmp_path):
    cloud("create")
    cloud("setup")
    there = cloud.home() / "pals_jax"
    (there / "runs").mkdir()
    (there / "pals_jax" / "removed.py").touch()
    (tmp_path / "my tasks").mkdir()
    (tmp_path / "my tasks" / "a:b.tsv").write_text("text")
    cloud("copy", "--to=data/own", str(tmp_path / "my tasks"))
    cloud("setup")
    assert (there / "runs").is_dir()
    assert (there / "data" / "own" / "my tasks" / "a:b.tsv").read_text() == "text"
    assert not (there / "pals_jax" / "removed.py").exists()
    install = (cloud.home() / "uv.calls").read_text().splitlines()[-1]
    assert install.endswith(".[tpu,gcs]")


# Trains an epoch each time it is called, and is then preempted, $BUCKET/preemptions times in all.
PREEMPTED = """
echo epoch >>"$BUCKET/epochs"
(($(wc -l <"$BUCKET/epochs") > $(<"$BUCKET/preemptions"))) && exit
touch "$BUCKET/preempt"
exit 143
"""


@pytest.mark.parametrize(
    ("times", "options"),
    [pytest.param(3, ["--spot"], marks=pytest.mark.slow), (1, ["--spot", "--queued"])],
)
def test_babysit_brings_a_run_through_preemptions(cloud, times, options):
    cloud.trainer(PREEMPTED)
    (cloud.root / "preemptions").write_text(str(times))
    _, err = cloud("babysit", "--poll=0.3", "--failures=1", *options, *TRAIN)
    assert (cloud.root / "epochs").read_text() == "epoch\n" * (times + 1)
    assert err.count("was preempted") == times
    group = "queued-resources" if "--queued" in options else "tpu-vm"
    assert cloud.calls.count(f"{group} create") == times + 1
    assert "the run is complete" in err
    assert "tpu-vm pals is READY: you may be paying" in err.splitlines()[-1]


@pytest.mark.slow
def test_babysit_waits_for_capacity_and_brings_the_data_again(cloud, tmp_path):
    """A TPU that was preempted cannot be had again at once, and has nothing of what was copied."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "train.tsv").write_text("text")
    cloud.trainer("test -e data/tasks/train.tsv || exit 2" + PREEMPTED)
    (cloud.root / "preemptions").write_text("1")
    process = cloud.start(
        *("babysit", "--poll=0.3", "--failures=1", "--spot"),
        *(f"--copy={tmp_path / 'tasks'}", "--to=data", *TRAIN),
    )
    until((cloud.root / "epochs").exists)
    (cloud.root / "fail-create").write_text("3")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert err.count("could not be created again yet") == 3
    assert (cloud.root / "epochs").read_text() == "epoch\n" * 2


def test_babysit_warns_of_a_workdir_that_a_preemption_takes_away(cloud):
    words = ("--", "train", "--config=configs/demo.py", "--workdir=runs/demo")
    assert "a run that is preempted starts over" in cloud("babysit", "--dry-run", *words)[1]
    for lasting in ("/mnt/run", "gs://bucket/run"):
        words = ("--", "train", "--config=configs/demo.py", f"--workdir={lasting}")
        assert "starts over" not in cloud("babysit", "--dry-run", *words)[1]


def test_babysit_stops_at_once_on_a_wrong_input(cloud):
    cloud.trainer("echo run >>$BUCKET/runs; exit 2")
    _, err = cloud("babysit", "--poll=0.02", *TRAIN, status=2)
    assert (cloud.root / "runs").read_text() == "run\n"
    assert "wrong input" in err
    assert "tpu-vm pals is READY: you may be paying" in err


@pytest.mark.slow
@pytest.mark.parametrize("status", [1, 75])  # 75: a bucket, a hub or a host did not answer
def test_babysit_gives_up_after_failures_that_are_not_preemptions(cloud, status):
    cloud.trainer(f"echo run >>$BUCKET/runs; exit {status}")
    (cloud.root / "fail-create").write_text("1")
    _, err = cloud("babysit", "--poll=0.02", "--failures=3", *TRAIN, status=1)
    assert (cloud.root / "runs").read_text() == "run\n" * 2  # the third failure is the first create
    assert "giving up" in err
    assert cloud.calls.count("tpu-vm create") == 2
    assert "tpu-vm pals is READY: you may be paying" in err


@pytest.mark.slow
def test_babysit_starts_again_what_was_told_to_stop(cloud):
    """The TPU is still there, and nothing has failed: the run has saved, and goes on."""
    cloud.trainer('echo run >>$BUCKET/runs; (($(wc -l <"$BUCKET/runs") > 2)) && exit; exit 143')
    _, err = cloud("babysit", "--poll=0.02", "--failures=1", *TRAIN)
    assert (cloud.root / "runs").read_text() == "run\n" * 3
    assert err.count("told to stop and has saved") == 2
    assert cloud.calls.count("tpu-vm create") == 1
    assert "the run is complete" in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_babysit_interrupted_says_what_is_left_and_can_go_on(cloud, number):
    cloud.trainer('until [[ -e "$BUCKET/go" ]]; do sleep 0.05; done')
    process = cloud.start("babysit", "--poll=0.02", *TRAIN)
    until((cloud.home() / "pals_jax" / "run.pid").exists)
    process.send_signal(number)
    err = process.communicate(timeout=10)[1]
    assert process.returncode == 128 + number
    assert "interrupted" in err
    assert "tpu-vm pals is READY: you may be paying" in err
    _, err = cloud("babysit", *TRAIN, "--config.seed=1", status=2)
    assert "another run is going on: 'train' '--config=configs/demo.py'" in err
    (cloud.root / "go").touch()
    cloud("babysit", "--poll=0.02", *TRAIN)
