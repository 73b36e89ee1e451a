"""The time from the command to the end of the first training step, with and without caches.

    python benchmarks/startup.py --glue=DIR --encoder=DIR

Runs `pals-jax train` on configs/pals_glue.py with another encoder, until metrics.jsonl has the line
of the first step: once with empty caches, then three times with full ones. Prints one JSON line of
seconds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "pals_glue.py"


def main() -> None:
    """Times the starts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--glue", required=True, help="the official GLUE files")
    parser.add_argument("--encoder", required=True, help="a BERT in Hugging Face's format")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "pals_jax", "train", f"--config={CONFIG}"]
        command += [f"--config.encoder={args.encoder}", f"--config.data.dir={args.glue}"]
        command += ["--config.data.source=glue_dir", f"--config.data.cache_dir={cache}"]
        command += ["--config.method=pals(size=108)", "--config.checkpoint_every=1"]
        command += ["--config.dtype=float32"]
        first, *again = (_first_step(command) for _ in range(4))
    print(json.dumps({"nothing kept": first, "again": again}))


def _first_step(command: list[str]) -> float:
    with tempfile.TemporaryDirectory() as workdir:
        log, began = Path(workdir, "metrics.jsonl"), time.perf_counter()
        with subprocess.Popen(
            [*command, f"--workdir={workdir}"], stderr=subprocess.DEVNULL
        ) as process:
            while not (log.exists() and log.stat().st_size):
                if process.poll() is not None:
                    raise SystemExit(f"{' '.join(command)} has ended with {process.returncode}")
                time.sleep(0.01)
            seconds = time.perf_counter() - began
            process.kill()
    return seconds


if __name__ == "__main__":
    main()
