"""The scripts of launch/: help, printed commands and refusals, before anything is paid for."""

import re
import shlex
import subprocess
import sysconfig
from pathlib import Path

import pytest
from fake_cloud import ENDS, LAUNCH, REPOSITORY, TPU, TRAIN, Cloud

ON_TPU = {"common", "on_tpu"}  # not called by users
SCRIPTS = sorted(path.stem for path in LAUNCH.glob("*.sh") if path.stem not in ON_TPU)


@pytest.fixture
def cloud(tmp_path: Path):
    with Cloud(tmp_path) as made:
        yield made


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
