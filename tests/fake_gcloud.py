"""A stand-in for `gcloud compute tpus` that keeps state and refuses what gcloud refuses.

Everything is under $FAKE_GCLOUD: `state.json` has the states of TPUs and requests, `calls` every
command line, and NAME/worker0, ... are the home directories of a TPU's workers, where `ssh` runs
its command with the local bash. A test makes gcloud misbehave by writing files there:

    fail-VERB      a number: that many calls of the verb fail without an effect
    break-create   creating fails, but leaves a TPU behind
    preempt        Google preempts every TPU, LAG seconds after the file was written

`remote_bin` is first on the workers' PATH.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(os.environ["FAKE_GCLOUD"])
STATE = ROOT / "state.json"
LAG = 0.25  # seconds
HOSTS = {"v3-32": 4, "v5litepod-16": 4}

FLAGS = {
    ("tpu-vm", "create"): ("accelerator-type", "version", "spot?"),
    ("tpu-vm", "describe"): ("format",),
    ("tpu-vm", "ssh"): ("worker", "command"),
    ("tpu-vm", "scp"): ("worker", "recurse?"),
    ("tpu-vm", "start"): (),
    ("tpu-vm", "stop"): (),
    ("tpu-vm", "delete"): (),
    ("queued-resources", "create"): ("node-id", "accelerator-type", "runtime-version", "spot?"),
    ("queued-resources", "describe"): ("format",),
    ("queued-resources", "delete"): ("force?",),
}


def fail(message: str) -> None:
    sys.exit(f"ERROR: (gcloud.compute.tpus) {message}")


def parse() -> argparse.Namespace:
    """The command line, with every flag that the verb does not have refused."""
    if sys.argv[1:3] != ["compute", "tpus"]:
        fail(f"Invalid choice: {sys.argv[1:3]}")
    group, verb = sys.argv[3:5]
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.set_defaults(group=group, verb=verb)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--project", required=True)
    parser.add_argument("--zone", required=True)
    parser.add_argument("--quiet", action="store_true", required=True)  # or it would ask
    for flag in FLAGS[group, verb]:
        if flag.endswith("?"):
            parser.add_argument(f"--{flag[:-1]}", action="store_true")
        else:
            parser.add_argument(f"--{flag}", required=True)
    return parser.parse_intermixed_args(sys.argv[5:])


def cue(name: str) -> bool:
    """Whether a test asked for this to happen now; uses up one of the times it asked for."""
    path = ROOT / name
    if not path.exists():
        return False
    times = int(path.read_text() or 1) - 1
    if times:
        path.write_text(str(times))
    else:
        path.unlink()
    return True


def workers(name: str) -> list[Path]:
    return sorted((ROOT / name).glob("worker*"))


def destroy(name: str) -> None:
    """Takes the machines of a TPU away, and with them what runs there."""
    for home in workers(name):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            os.killpg(int((home / "pals_jax" / "run.pid").read_text()), signal.SIGKILL)
    shutil.rmtree(ROOT / name, ignore_errors=True)


def boot(vms: dict, name: str, kind: str) -> None:
    for host in range(HOSTS.get(kind, 1)):
        (ROOT / name / f"worker{host}").mkdir(parents=True)
    vms[name] = "READY"


def preempt(vms: dict, requests: dict) -> None:
    for name in [name for name, state in vms.items() if state == "READY"]:
        destroy(name)
        if name in requests:
            requests[name]["state"] = "SUSPENDED"
            del vms[name]
        else:
            vms[name] = "PREEMPTED"


def ssh(args: argparse.Namespace, name: str) -> int:
    """Runs the command in the home of each worker; the exit status of one that failed."""
    homes = workers(name)
    if args.worker != "all":
        homes = [homes[int(args.worker)]]
    path = f"{ROOT / 'remote_bin'}:{os.environ['PATH']}"
    failed = 0
    for home in homes:
        environment = {"HOME": str(home), "PATH": path, "BUCKET": str(ROOT), "HOSTNAME": home.name}
        command = ["bash", "-c", args.command]
        failed = (
            subprocess.run(command, cwd=home, env=environment, check=False).returncode or failed
        )
    return failed


def scp(args: argparse.Namespace) -> int:
    name, _, folder = args.names[-1].partition(":")
    for home in workers(name):
        for source in map(Path, args.names[:-1]):
            if not source.is_dir():
                shutil.copy(source, home / folder)
            elif args.recurse:
                shutil.copytree(source, home / folder / source.name, dirs_exist_ok=True)
            else:
                fail(f"{source}: not a regular file")
    return 0


def request(args: argparse.Namespace, name: str, vms: dict, requests: dict) -> int:
    """What becomes of `queued-resources VERB`."""
    if args.verb == "create":
        if name in requests or name in vms:
            fail(f"ALREADY_EXISTS: Resource {name} already exists")
        requests[name] = {"state": "WAITING_FOR_RESOURCES", "kind": args.accelerator_type}
    elif name not in requests:
        fail(f"NOT_FOUND: Resource 'projects/{args.project}/{name}' was not found")
    elif args.verb == "delete":
        if name in vms and not args.force:
            fail("FAILED_PRECONDITION: the request has nodes")
        destroy(name)
        vms.pop(name, None)
        del requests[name]
    else:
        this = requests[name]
        print(this["state"])
        # It moves on each time somebody looks.
        steps = {"WAITING_FOR_RESOURCES": "PROVISIONING", "PROVISIONING": "ACTIVE"}
        if steps.get(this["state"]) == "ACTIVE":
            boot(vms, name, this["kind"])
        this["state"] = steps.get(this["state"], this["state"])
    return 0


def vm(args: argparse.Namespace, name: str, vms: dict, requests: dict) -> int:
    """What becomes of `tpu-vm VERB`, but for those that need its machines."""
    if args.verb == "create":
        if name in vms:
            fail(f"ALREADY_EXISTS: Resource {name} already exists")
        boot(vms, name, args.accelerator_type)
        if cue("break-create"):
            fail("INTERNAL: the operation was lost")
    elif name not in vms:
        fail(f"NOT_FOUND: Resource 'projects/{args.project}/{name}' was not found")
    elif args.verb == "describe":
        print("Updates are available for some components.", file=sys.stderr)
        print(vms[name])
    elif args.verb == "delete":
        destroy(name)
        del vms[name]
    elif name in requests:
        fail("FAILED_PRECONDITION: a node of a queued resource cannot be stopped")
    else:
        vms[name] = {"start": "READY", "stop": "STOPPED"}[args.verb]
    return 0


def call(args: argparse.Namespace, vms: dict, requests: dict) -> int:
    """Does what the real one would do, to `vms` and `requests`."""
    name = args.names[-1].partition(":")[0]
    if cue(f"fail-{args.verb}"):
        fail("RESOURCE_EXHAUSTED: There is no more capacity in the zone")
    if args.group == "queued-resources":
        return request(args, name, vms, requests)
    if args.verb not in ("ssh", "scp"):
        return vm(args, name, vms, requests)
    if vms.get(name) != "READY":
        fail(f"TPU {name} is {vms.get(name, 'NOT_FOUND')}")
    return ssh(args, name) if args.verb == "ssh" else scp(args)


def main() -> int:
    """One call: what it changed is remembered also when it fails."""
    args = parse()
    with (ROOT / "calls").open("a") as calls:
        calls.write(f"{args.group} {args.verb}\n")
    state = json.loads(STATE.read_text()) if STATE.exists() else {"vms": {}, "requests": {}}
    written = ROOT / "preempt"
    if written.exists() and time.time() - written.stat().st_mtime > LAG:
        written.unlink()
        preempt(**state)
    try:
        return call(args, **state)
    finally:
        STATE.write_text(json.dumps(state))


if __name__ == "__main__":
    sys.exit(main())
