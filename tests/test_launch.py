"""The scripts of launch/, run as they are against a stand-in for gcloud (fake_gcloud.py)."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCH = REPOSITORY / "launch"
ON_TPU = {"common", "on_tpu"}  # not called by users
SCRIPTS = sorted(path.stem for path in LAUNCH.glob("*.sh") if path.stem not in ON_TPU)
TPU = ("--name=pals", "--project=my-project", "--zone=europe-west4-a")
ENDS = "--project=my-project --zone=europe-west4-a --quiet"
TRAIN = ("--", "train", "--config=configs/demo.py", "--workdir=/mnt/run")

# What the TPU's pip and uv do: the environment gets a trainer that the test wrote.
PIP = """#!/usr/bin/env bash
mkdir -p ~/.local/bin && cp "$BUCKET/uv" ~/.local/bin/uv
"""
UV = """#!/usr/bin/env bash
set -e
echo "$*" >>~/uv.calls
mkdir -p .venv/bin
case $* in *install*) test -e pals_jax/cli.py && cp "$BUCKET/trainer" .venv/bin/pals-jax ;; esac
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Cloud:
    """A Google Cloud of one's own in a folder, and the scripts run against it."""

    def __init__(self, root: Path):
        self.root = root
        fake = (REPOSITORY / "tests" / "fake_gcloud.py").read_text()
        executable(root / "bin" / "gcloud", f"#!{sys.executable} -IS\n{fake}")
        executable(root / "remote_bin" / "python3", PIP)
        executable(root / "uv", UV)
        self.trainer("exit 0")
        path = f"{root / 'bin'}:{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "FAKE_GCLOUD": str(root)}

    def trainer(self, text: str) -> None:
        """Sets what `pals-jax` does there; $BUCKET is a folder that outlives every TPU."""
        executable(self.root / "trainer", f"#!/usr/bin/env bash\n{text}\n")

    def start(self, script: str, *words: str) -> subprocess.Popen:
        return subprocess.Popen(
            [LAUNCH / f"{script}.sh", *TPU, *words],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, script: str, *words: str, status: int = 0) -> tuple[str, str]:
        """What a script wrote to stdout and stderr, with the exit status that it must have."""
        process = self.start(script, *words)
        out, err = process.communicate(timeout=25)
        assert process.returncode == status, err
        return out, err

    @property
    def calls(self) -> list[str]:
        path = self.root / "calls"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def states(self) -> dict[str, str]:
        """The state of every TPU and request that exists."""
        path = self.root / "state.json"
        state = json.loads(path.read_text()) if path.exists() else {"vms": {}, "requests": {}}
        requests = {f"request {name}": r["state"] for name, r in state["requests"].items()}
        return {**state["vms"], **requests}

    def home(self, worker: int = 0) -> Path:
        return self.root / "pals" / f"worker{worker}"

    def wait_for_run(self) -> str:
        """What the run ended with, as status.sh says it."""
        for _ in range(100):
            run = self("status")[0].splitlines()[-1].removeprefix("run ")
            if run != "running":
                return run
        raise AssertionError("the run goes on and on")


@pytest.fixture
def cloud(tmp_path: Path):
    made = Cloud(tmp_path)
    yield made
    if made.states:
        made("delete")  # with what runs there


def test_shellcheck_finds_nothing():
    shellcheck = Path(sysconfig.get_path("scripts")) / "shellcheck"
    found = subprocess.run(
        [shellcheck, "--external-sources", *LAUNCH.glob("*.sh")],
        check=False,
        text=True,
        capture_output=True,
    )
    assert found.returncode == 0, found.stdout


def test_gcloud_is_called_in_one_place():
    calls = re.compile(r"^[^#]*\bgcloud (compute|alpha|beta|config)\b|\(gcloud\b", re.MULTILINE)
    for path in [*LAUNCH.glob("*.sh"), *(REPOSITORY / "pals_jax").rglob("*.py")]:
        assert len(calls.findall(path.read_text())) == (path.name == "common.sh"), path


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_the_script_does_and_calls_nothing(cloud, script):
    out, _ = cloud(script, "--help")
    assert out.startswith(f"{script}.sh: ")
    for option in ("--name=NAME", "--dry-run", f"launch/{script}.sh --name="):
        assert option in out
    assert not cloud.calls


def ssh(command: str, worker: str = "all") -> str:
    command = f"--command=bash pals_jax/launch/on_tpu.sh {command}"
    return f"tpu-vm ssh pals --worker={worker} {shlex.quote(command)}"


def describe(group: str) -> str:
    field = {"tpu-vm": "state", "queued-resources": "state.state"}[group]
    return f"{group} describe pals '--format=value({field})'"


CREATE = "tpu-vm create pals --accelerator-type=v3-8 --version=tpu-ubuntu2204-base"
QUEUE = (
    "queued-resources create pals --node-id=pals --accelerator-type=v6e-8"
    " --runtime-version=v2-alpha-tpuv6e --spot"
)
SETUP = [
    f"tpu-vm scp {REPOSITORY}/build/pals.tgz pals:pals_jax.tgz --worker=all",
    "tpu-vm ssh pals --worker=all '--command=mkdir -p pals_jax && rm -rf pals_jax/pals_jax"
    " pals_jax/build && tar -xzf pals_jax.tgz -C pals_jax &&"
    " bash pals_jax/launch/on_tpu.sh install'",
]
START = ssh("start train --config=configs/demo.py --workdir=/mnt/run")
DRY = {
    ("create",): [CREATE],
    ("create", "--spot"): [f"{CREATE} --spot"],
    ("create", "--queued", "--spot", "--kind=v6e-8"): [QUEUE],
    ("setup",): SETUP,
    ("copy", "--to=data", "/etc"): [
        "tpu-vm ssh pals --worker=all '--command=mkdir -p pals_jax/data'",
        "tpu-vm scp /etc pals:pals_jax/data --recurse --worker=all",
    ],
    ("run", *TRAIN): [START],
    ("logs",): [ssh("log")],
    ("logs", "--follow"): [ssh("follow", "0")],
    ("status",): [describe("queued-resources"), describe("tpu-vm"), ssh("state")],
    ("stop",): ["tpu-vm stop pals"],
    ("delete",): [
        describe("queued-resources"),
        "queued-resources delete pals --force",
        describe("tpu-vm"),
        "tpu-vm delete pals",
    ],
    ("babysit", *TRAIN): [CREATE, *SETUP, START, ssh("state")],
}


@pytest.mark.parametrize("words", DRY, ids=" ".join)
def test_a_dry_run_prints_the_commands_and_runs_none(cloud, words):
    script, *options = words
    out, _ = cloud(script, "--dry-run", *options)
    assert out.splitlines() == [f"gcloud compute tpus {line} {ENDS}" for line in DRY[words]]
    assert not cloud.calls


def test_the_readme_has_the_kinds_and_each_is_asked_for_with_its_runtime(cloud):
    rows = re.findall(r"^\| (v\S+) .*?\| `(\S+)` \|$", (LAUNCH / "README.md").read_text(), re.M)
    assert len(rows) == 9
    for kind, runtime in rows:
        out, err = cloud("create", "--dry-run", f"--kind={kind}")
        assert f"--accelerator-type={kind} --version={runtime} " in out
        numbers = re.search(rf"{kind}: (\d+) chips, (\d+) devices, (\d+) host", err)
        row = rf"^\| {kind} \| {numbers[1]} \| {numbers[2]} \| {numbers[3]} \|"
        assert re.search(row, (LAUNCH / "README.md").read_text(), re.M)


WRONG = [
    ("create", ["--kind=v9-8"], "--kind=v9-8 is unknown: take one of v2-8 "),
    ("create", ["--name=Pals"], "--name=Pals is not of small letters"),
    ("create", ["--name=x; rm -rf /"], "is not of small letters"),
    ("create", ["--project=My Project"], "--project=My Project is not a project's id"),
    ("create", ["--zone=europe"], "--zone=europe is not a zone"),
    ("create", ["--zone"], "--zone: give it a value, as in --zone=VALUE"),
    ("create", ["--spot=no"], "--spot takes no value"),
    ("create", ["--sport"], "--sport"),
    ("create", ["--size=8"], "unknown option --size"),
    ("create", ["v3-8"], "unexpected argument v3-8"),
    ("delete", ["--spot"], "unknown option --spot"),
    ("run", [], "nothing to run"),
    ("copy", [], "nothing to copy"),
    ("copy", ["no-such-file"], "there is no no-such-file to copy"),
    ("copy", ["--to=a b", "/etc"], "--to=a b is not a relative path"),
    ("babysit", ["--failures=0", *TRAIN], "--failures=0 is not a number from 1"),
    ("babysit", ["--", "train", "--config=x"], "nothing to babysit"),
]


@pytest.mark.parametrize(("script", "words", "message"), WRONG)
def test_wrong_input_is_refused_before_anything_is_paid_for(cloud, script, words, message):
    _, err = cloud(script, *words, status=2)
    assert message in err
    assert not cloud.calls


@pytest.mark.parametrize("option", TPU)
def test_nothing_is_guessed(cloud, option):
    done = subprocess.run(
        [LAUNCH / "create.sh", *(word for word in TPU if word != option)],
        env=cloud.environment,
        check=False,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 2
    assert f"{option.partition('=')[0]} is missing" in done.stderr
    assert not cloud.calls


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
    assert install.endswith(".[tpu]")


# Trains an epoch each time it is called, and is then preempted, $BUCKET/preemptions times in all.
PREEMPTED = """
echo epoch >>"$BUCKET/epochs"
(($(wc -l <"$BUCKET/epochs") > $(<"$BUCKET/preemptions"))) && exit
touch "$BUCKET/preempt"
exit 143
"""


@pytest.mark.parametrize(("times", "options"), [(3, ["--spot"]), (1, ["--spot", "--queued"])])
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


def test_babysit_warns_of_a_workdir_that_a_preemption_takes_away(cloud):
    words = ("--", "train", "--config=configs/demo.py", "--workdir=runs/demo")
    assert "a run that is preempted starts over" in cloud("babysit", "--dry-run", *words)[1]
    assert "starts over" not in cloud("babysit", "--dry-run", *TRAIN)[1]


def test_babysit_stops_at_once_on_a_wrong_input(cloud):
    cloud.trainer("echo run >>$BUCKET/runs; exit 2")
    _, err = cloud("babysit", "--poll=0.02", *TRAIN, status=2)
    assert (cloud.root / "runs").read_text() == "run\n"
    assert "wrong input" in err
    assert "tpu-vm pals is READY: you may be paying" in err


def test_babysit_gives_up_after_failures_that_are_not_preemptions(cloud):
    cloud.trainer("echo run >>$BUCKET/runs; exit 1")
    (cloud.root / "fail-create").write_text("1")
    _, err = cloud("babysit", "--poll=0.02", "--failures=3", *TRAIN, status=1)
    assert (cloud.root / "runs").read_text() == "run\n" * 2  # the third failure is the first create
    assert "giving up" in err
    assert cloud.calls.count("tpu-vm create") == 2
    assert "tpu-vm pals is READY: you may be paying" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_babysit_interrupted_says_what_is_left_and_can_go_on(cloud, number):
    cloud.trainer('until [[ -e "$BUCKET/go" ]]; do sleep 0.05; done')
    process = cloud.start("babysit", "--poll=0.02", *TRAIN)
    deadline = time.monotonic() + 10
    while not (cloud.home() / "pals_jax" / "run.pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    err = process.communicate(timeout=10)[1]
    assert process.returncode == 128 + number
    assert "interrupted" in err
    assert "tpu-vm pals is READY: you may be paying" in err
    (cloud.root / "go").touch()
    cloud("babysit", "--poll=0.02", *TRAIN)
