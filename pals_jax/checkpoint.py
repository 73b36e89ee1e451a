"""Checkpoints of a run: the newest ones, to go on from, and the best one, to use."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from pals_jax.errors import UserError

Tree = Any

_KEPT = 2  # a newest checkpoint and the one before
_DIGESTS = "sha256.json"  # in each checkpoint: the digest of every file that Orbax wrote


class Checkpoints:
    """The checkpoints that a run writes: `checkpoints/` (the last steps) and `best/` (one)."""

    def __init__(self, workdir: Path) -> None:
        """Opens, or creates, both directories."""
        self._newest = _manager(workdir / "checkpoints", max_to_keep=_KEPT)
        self._best = _best_manager(workdir)

    def save(self, step: int, state: Tree) -> None:
        """Writes `state` as the newest checkpoint, atomically."""
        self._newest.save(step, args=ocp.args.StandardSave(state))
        _seal(self._newest, step)

    def save_best(self, step: int, variables: Tree, score: float) -> None:
        """Keeps `variables` if no earlier score is as high."""
        best = self._best.best_step()
        if best is None or (step > best and score > self._best.metrics(best)["score"]):
            args = ocp.args.StandardSave(variables)
            self._best.save(step, args=args, metrics={"score": float(score)})
            _seal(self._best, step)

    def restore(self, state: Tree) -> Tree:
        """The newest checkpoint in the shapes of `state`, or `state` itself where there is none.

        Raises:
            UserError: the checkpoint is damaged or of another model.
        """
        step = self._newest.latest_step()
        return state if step is None else _restore(self._newest, step, state)


def restore_best(workdir: Path, variables: Tree) -> tuple[int, Tree]:
    """The step of a workdir's best checkpoint, and its variables in the shapes of `variables`.

    Raises:
        UserError: there is none yet, or it is damaged or of another model.
    """
    directory = workdir / "best"
    manager = _best_manager(workdir, create=False) if directory.is_dir() else None
    try:
        step = manager.best_step() if manager else None
    except ValueError as error:  # its metrics are no JSON
        raise UserError(f"the checkpoint in {directory} is damaged ({error}).") from error
    if manager is None or step is None:
        raise UserError(f"{directory} holds no checkpoint; train until the first evaluation.")
    return step, _restore(manager, step, variables)


def _best_manager(workdir: Path, create: bool = True) -> ocp.CheckpointManager:
    return _manager(
        workdir / "best",
        max_to_keep=1,
        best_fn=lambda metrics: metrics["score"],
        best_mode="max",
        create=create,
    )


def _manager(directory: Path, **options: Any) -> ocp.CheckpointManager:
    """A manager that returns from a save when it is on disk."""
    return ocp.CheckpointManager(
        directory.resolve(),
        options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False, **options),
    )


def _restore(manager: ocp.CheckpointManager, step: int, like: Tree) -> Tree:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def target(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    try:
        _check_seal(manager, step)
        return manager.restore(step, args=ocp.args.StandardRestore(jax.tree.map(target, like)))
    except Exception as error:  # Orbax and its storage raise many kinds for a damaged file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"the checkpoint of step {step} in {manager.directory} is damaged or of another"
            f" model ({reason}); train in another workdir, or go on from an earlier checkpoint by"
            " removing this one."
        ) from error


def _seal(manager: ocp.CheckpointManager, step: int) -> None:
    """Writes down what the files of a checkpoint are, so that damage is seen before it is read.

    Orbax checks no digests, and leaves reads running when one fails. A run killed before this is
    done leaves a checkpoint without a seal, which is read all the same.
    """
    directory = Path(manager.directory / str(step))
    part = directory / f"{_DIGESTS}.part"
    part.write_text(json.dumps(_digests(directory)))
    part.rename(directory / _DIGESTS)


def _check_seal(manager: ocp.CheckpointManager, step: int) -> None:
    directory = Path(manager.directory / str(step))
    if not (directory / _DIGESTS).exists():
        return
    written, found = json.loads((directory / _DIGESTS).read_text()), _digests(directory)
    if wrong := [name for name in written if found.get(name) != written[name]]:
        raise ValueError(f"{wrong[0]} is not as it was written")


def _digests(directory: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not path.name.startswith(_DIGESTS):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            digests[str(path.relative_to(directory))] = digest
    return digests
