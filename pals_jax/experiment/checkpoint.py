"""Checkpoints of a run: the newest ones, for resuming, and the best one, for inference."""

import contextlib
import hashlib
import itertools
import json
import logging
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath

from pals_jax.runtime import distributed, storage
from pals_jax.runtime.console import say
from pals_jax.runtime.errors import UserError, reason
from pals_jax.runtime.parallel import DataParallel

Tree = TypeVar("Tree")

BEST = "best"  # the folder of a workdir with its best checkpoint
_KEPT = 2  # the newest checkpoint, and the previous one in case it is damaged
_DIGESTS = "sha256.json"  # in each checkpoint: the digest of every file that Orbax wrote
_TIMES = "_CHECKPOINT_METADATA"  # not digested: Orbax rewrites it later and does not need it


class Checkpoints:
    """The checkpoints that a run writes: `checkpoints/` (the last steps) and `best/` (one).

    Saving is asynchronous: it returns once the arrays are copied. All hosts must call every method
    at the same step.
    """

    def __init__(self, workdir: epath.Path, parallel: DataParallel) -> None:
        """Opens, or creates, both directories."""
        self._parallel = parallel
        self._newest = _manager(workdir / "checkpoints", max_to_keep=_KEPT)
        self._best = _best_manager(workdir)

    def save(self, step: int, state: Any) -> None:
        """Writes `state` as the newest checkpoint, atomically; does nothing if the step exists.

        A resumed run does not evaluate this step again, so the checkpoint that `save_best` wrote
        for it must be on disk first.

        Raises:
            UserError: if this checkpoint, or an earlier one, could not be written.
        """
        with _reported(self._best):
            self._best.wait_until_finished()
        with _reported(self._newest):
            if step not in self._newest.all_steps():
                args = ocp.args.StandardSave(self._parallel.to_save(state))
                self._newest.save(step, args=args)

    def save_best(
        self,
        step: int,
        variables: optax.Params,
        score: float,
        results: dict[str, Any],
        predictions: dict[str, dict[str, np.ndarray]],
    ) -> None:
        """Keeps `variables` if their score is higher than all earlier ones.

        Args:
            step: the number of steps taken.
            variables: the model's.
            score: what checkpoints are compared by.
            results: the dev results of every task.
            predictions: task -> dev set -> [N], which the results were measured on.

        Raises:
            UserError: as for `save`.
        """
        with _reported(self._best):
            best = self._best.best_step()
            if best is None or (step > best and score > self._best.metrics(best)["score"]):
                args = ocp.args.StandardSave(self._parallel.to_save(variables))
                listed = {
                    task: {split: x.tolist() for split, x in splits.items()}
                    for task, splits in predictions.items()
                }
                metrics = {"score": float(score), "results": results, "predictions": listed}
                self._best.save(step, args=args, metrics=metrics)

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
            UserError: if a checkpoint could not be written.
        """
        for manager in (self._newest, self._best):
            with _reported(manager):
                manager.wait_until_finished()

    def restore(self, state: Tree) -> Tree:
        """The newest checkpoint, or `state` if there is none, as steps take it.

        A damaged checkpoint is set aside with a warning, and the previous one is used.

        Raises:
            UserError: if all checkpoints are damaged, or the newest belongs to another model.
        """
        damaged: str | None = None
        while (step := self._newest.latest_step()) is not None:
            damaged = _damage(self._newest, step)
            if damaged is None:
                return _restore(self._newest, step, state, self._parallel)
            say(f"warning: {damaged}; it is set aside, and the previous one is used.")
            if distributed.is_main():
                _set_aside(self._newest.directory / str(step))
            distributed.barrier("set aside")
            self._newest.reload()
        if damaged is not None:
            raise UserError(
                f"{damaged}, and there is no earlier one; run again to start over, or repair it."
            )
        return self._parallel.put(state)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # Finish pending writes even after an exception, without hiding that exception.
        with contextlib.suppress(UserError) if error else contextlib.nullcontext():
            self.wait()
        self._newest.close()
        self._best.close()


def newest_step(workdir: epath.Path) -> int:
    """The step of the newest checkpoint to resume from; 0 if there is none."""
    directory = workdir / "checkpoints"
    with storage.reported(directory):
        steps = ocp.utils.checkpoint_steps(directory) if directory.is_dir() else []
    return max(steps, default=0)


def restore_best(workdir: epath.Path, variables: Tree, parallel: DataParallel) -> tuple[int, Tree]:
    """The step of a workdir's best checkpoint, and its variables in the shapes of `variables`.

    Raises:
        UserError: if there is no checkpoint yet, or it is damaged or belongs to another model.
    """
    manager, step = _open_best(workdir)
    return step, _restore(manager, step, variables, parallel)


def best_results(workdir: epath.Path) -> tuple[int, dict[str, Any]]:
    """The step of a workdir's best checkpoint, and the dev results that it was chosen for.

    Raises:
        UserError: if there is no checkpoint yet, or it is damaged or has no results.
    """
    return _kept_with_best(workdir, "results")


def best_predictions(workdir: epath.Path) -> dict[str, dict[str, np.ndarray]]:
    """What a workdir's best checkpoint predicts for every dev example: task -> dev set -> [N].

    Raises:
        UserError: as for `best_results`.
    """
    _, listed = _kept_with_best(workdir, "predictions")
    return {
        task: {split: np.array(x) for split, x in splits.items()} for task, splits in listed.items()
    }


def _kept_with_best(workdir: epath.Path, name: str) -> tuple[int, dict[str, Any]]:
    manager, step = _open_best(workdir)
    if not (kept := manager.metrics(step).get(name)):
        raise UserError(
            f"{workdir / BEST} holds no dev {name}, because no training of this version wrote it;"
            f" run `pals-jax evaluate --workdir={workdir}`."
        )
    return step, kept


def _open_best(workdir: epath.Path) -> tuple[ocp.CheckpointManager, int]:
    directory = workdir / BEST
    with _without_warnings():
        manager = _best_manager(workdir, read_only=True) if directory.is_dir() else None
    try:
        step = manager.best_step() if manager else None
    except ValueError as error:  # its metrics are not valid JSON
        raise UserError(f"the checkpoint in {directory} is damaged ({error}).") from error
    if manager is None or step is None:
        raise UserError(f"{directory} holds no checkpoint; train until the first evaluation.")
    if damaged := _damage(manager, step):
        raise UserError(f"{damaged}; train again in another workdir.")
    return manager, step


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Keeps Orbax from warning of every option that has no meaning where nothing is written."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(max(before, logging.ERROR))
    try:
        yield
    finally:
        log.setLevel(before)


def _best_manager(workdir: epath.Path, read_only: bool = False) -> ocp.CheckpointManager:
    return _manager(
        workdir / BEST,
        max_to_keep=1,
        best_fn=lambda metrics: metrics["score"],
        best_mode="max",
        read_only=read_only,  # otherwise it deletes the files that a live run is writing
    )


def _manager(directory: epath.Path, **options: Any) -> ocp.CheckpointManager:
    directory = storage.absolute(directory)
    callback = ocp.options.AsyncOptions(post_finalization_callback=lambda: _seal(directory))
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(
            async_options=callback, cleanup_tmp_directories=True, **options
        ),
    )


def _restore(manager: ocp.CheckpointManager, step: int, like: Tree, parallel: DataParallel) -> Tree:
    def target(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=parallel.checkpoint_sharding(path))

    try:
        args = ocp.args.StandardRestore(jax.tree_util.tree_map_with_path(target, like))
        return parallel.put(manager.restore(step, args=args))
    except Exception as error:  # Orbax and its storage raise many types
        raise UserError(
            f"the checkpoint of step {step} in {manager.directory} cannot be read or is of another"
            f" model ({reason(error)}); train in another workdir, or remove this checkpoint to"
            " resume from an earlier one."
        ) from error


@contextlib.contextmanager
def _reported(manager: ocp.CheckpointManager) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax and its storage raise many types
        raise storage.kind_of(error)(
            f"a checkpoint could not be written to {manager.directory} ({reason(error)}); earlier"
            " ones are intact: make room or fix the problem, and run the same command again."
        ) from error


def _seal(directory: epath.Path) -> None:
    """Stores the digests of a checkpoint's files, so that damage is detected before a restore.

    Orbax checks no digests, and leaves other reads running when one fails. It calls this after
    writing all files, just before it commits the checkpoint: by one more file in a bucket, by a
    rename in a local directory.
    """
    for folder in directory.iterdir():
        if folder.is_dir() and not (folder / ocp.path.atomicity.COMMIT_SUCCESS_FILE).exists():
            (folder / _DIGESTS).write_text(json.dumps(_digests(folder)))


def _damage(manager: ocp.CheckpointManager, step: int) -> str | None:
    """A description of the damage to a checkpoint's files, as host 0 sees them; None if intact."""
    wrong = 0
    if distributed.is_main():
        directory = manager.directory / str(step)
        try:
            written = json.loads((directory / _DIGESTS).read_text())
            found = _digests(directory)
            wrong = sum(found.get(name) != digest for name, digest in written.items())
        except (OSError, ValueError):
            wrong = 1  # the file of digests itself
    if not (wrong := distributed.of_main(wrong)):
        return None
    return (
        f"the checkpoint of step {step} in {manager.directory} is damaged ({wrong} of its files"
        " changed since they were written)"
    )


def _set_aside(directory: epath.Path) -> None:
    """Renames a damaged checkpoint; nothing is deleted."""
    names = (f"damaged-{directory.name}.{n}" for n in itertools.count(1))
    directory.rename(next(p for name in names if not (p := directory.with_name(name)).exists()))


def _digests(directory: epath.Path) -> dict[str, str]:
    digests = {}
    for path in storage.files(directory):
        if path.name not in (_DIGESTS, _TIMES):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            digests[str(path.relative_to(directory))] = digest
    return digests
