"""Training with PALs, compared with plain PyTorch code written like the original.

    python benchmarks/original.py --glue=DIR --encoder=DIR --out=DIR

Both take the same steps of the GLUE mix (see glue_mix.py) with the same weights, batch size 32,
length 128, float32, dropout and the original's optimiser, on all cores. Ours packs, theirs pads.
First both compute some losses without dropout, which must agree. Writes original.json and a plot.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import side_by_side
from glue_mix import Mix

from pals_jax.convert.bert_n_pals import to_bert_n_pals

ROUNDS, STEPS, CHECK = 8, 6, 3


def main() -> None:
    """Prepares the work, then times both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--glue", required=True, type=Path, help="the official GLUE files")
    parser.add_argument(
        "--encoder", required=True, type=Path, help="a BERT in Hugging Face's format"
    )
    parser.add_argument("--out", required=True, type=Path, help="where to write the results")
    parser.add_argument("--size", type=int, default=108, help="size of the PALs; a multiple of 12")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    python = side_by_side.environment("torch", ["torch==2.13.0", "numpy"])
    with tempfile.TemporaryDirectory() as work:
        share = prepare(Path(work), args.glue, args.encoder, args.size)
        workers = {
            "pals_jax": side_by_side.Worker(side_by_side.PEERS / "ours.py", Path(work)),
            "as the original": side_by_side.Worker(
                side_by_side.PEERS / "bert_n_pals.py", Path(work), python
            ),
        }
        ours, theirs = losses = [worker.ready["losses"] for worker in workers.values()]
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        asks = {name: worker.ask for name, worker in workers.items()}
        timing = side_by_side.run(asks, ROUNDS, STEPS, batch_size=32)
    summary = timing.summary() | {
        "share_of_padded_positions": share,
        "losses": losses,
        "shapes": workers["pals_jax"].ready["shapes"],
    }
    (args.out / "original.json").write_text(json.dumps(summary, indent=1))
    side_by_side.plot(args.out / "original.png", {"Training with PALs, the mix of GLUE": timing})
    print(json.dumps(summary))


def prepare(work: Path, glue: Path, encoder: Path, size: int) -> float:
    """Writes the work of both sides; returns packed positions as a share of padded ones."""
    ours = {
        "glue": str(glue),
        "encoder": str(encoder),
        "method": f"pals(size={size})",
    }
    mix, steps = Mix(**ours), ROUNDS * STEPS
    given = {"mix": ours, "kind": "training", "each": STEPS, "steps": steps, "check": CHECK}
    (work / "ours.json").write_text(json.dumps(given))
    weights: dict[str, Any] = to_bert_n_pals(mix.experiment.encoder(), mix.variables())
    np.savez(work / "weights.npz", **weights)
    labels = [task.num_outputs for task in mix.experiment.tasks]
    config = json.loads((encoder / "config.json").read_text())
    config |= {"labels": labels, "hidden_size_aug": size, "check": CHECK}
    (work / "config.json").write_text(json.dumps(config))
    mix.save_padded(work / "padded.npz", mix.draws[:steps], mix.splits)
    make = mix.packed()
    packed = [make.place(draw)[0].shape for draw in mix.draws]
    return float(np.mean([rows * length for rows, length in packed]) / (32 * 128))


if __name__ == "__main__":
    main()
