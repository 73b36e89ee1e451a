"""Checkpoints of a run: the newest ones, to go on from, and the best one, to use."""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from pals_jax.runtime import distributed, storage
from pals_jax.runtime.console import say
from pals_jax.runtime.errors import UserError, reason
from pals_jax.runtime.parallel import DataParallel

Tree = Any

_KEPT = 2  # a newest checkpoint and the one before
_DIGESTS = "sha256.json"  # in each checkpoint: the digest of every file that Orbax wrote
_TIMES = "_CHECKPOINT_METADATA"  # but this one, which Orbax goes on writing and does without


class Checkpoints:
    """The checkpoints that a run writes: `checkpoints/` (the last steps) and `best/` (one).

    Saving returns when the arrays are copied; they are written while training goes on. All hosts
    call every method at the same step.
    """

    def __init__(self, workdir: epath.Path, parallel: DataParallel) -> None:
        """Opens, or creates, both directories."""
        self._parallel = parallel
        self._newest = _manager(workdir / "checkpoints", max_to_keep=_KEPT)
        self._best = _best_manager(workdir)

    def save(self, step: int, state: Tree) -> None:
        """Writes `state` as the newest checkpoint, atomically; nothing if the step is there.

        A run that goes on from here does not evaluate this step again: what `save_best` keeps of
        it must be on disk first.

        Raises:
            UserError: this or a save before could not be written.
        """
        with _reported(self._best):
            self._best.wait_until_finished()
        with _reported(self._newest):
            if step not in self._newest.all_steps():
                args = ocp.args.StandardSave(self._parallel.to_save(state))
                self._newest.save(step, args=args)

    def save_best(self, step: int, variables: Tree, score: float) -> None:
        """Keeps `variables` if no earlier score is as high.

        Raises:
            UserError: as `save`.
        """
        with _reported(self._best):
            best = self._best.best_step()
            if best is None or (step > best and score > self._best.metrics(best)["score"]):
                args = ocp.args.StandardSave(self._parallel.to_save(variables))
                self._best.save(step, args=args, metrics={"score": float(score)})

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
            UserError: something could not be written.
        """
        for manager in (self._newest, self._best):
            with _reported(manager):
                manager.wait_until_finished()

    def restore(self, state: Tree) -> Tree:
        """The newest checkpoint in the shapes of `state`, or `state` itself where there is none.

        One that is damaged is set aside, with a warning, for the one before.

        Raises:
            UserError: all are damaged, or the newest is of another model.
        """
        damaged: str | None = None
        while (step := self._newest.latest_step()) is not None:
            damaged = _damage(self._newest, step)
            if damaged is None:
                return _restore(self._newest, step, state, self._parallel)
            say(f"warning: {damaged}; it is set aside, and the one before it taken.")
            if distributed.is_main():
                _set_aside(self._newest.directory / str(step))
            distributed.barrier("set aside")
            self._newest.reload()
        if damaged is not None:
            raise UserError(
                f"{damaged}, and there is none before it; run again to begin anew, or repair it."
            )
        return state

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # What is being written is brought to its end, whatever has happened.
        with contextlib.suppress(UserError) if error else contextlib.nullcontext():
            self.wait()
        self._newest.close()
        self._best.close()


def newest_step(workdir: epath.Path) -> int:
    """The step of the newest checkpoint to go on from; 0 where there is none."""
    directory = workdir / "checkpoints"
    with storage.reported(directory):
        steps = ocp.utils.checkpoint_steps(directory) if directory.is_dir() else []
    return max(steps, default=0)


def restore_best(workdir: epath.Path, variables: Tree, parallel: DataParallel) -> tuple[int, Tree]:
    """The step of a workdir's best checkpoint, and its variables in the shapes of `variables`.

    Raises:
        UserError: there is none yet, or it is damaged or of another model.
    """
    directory = workdir / "best"
    manager = _best_manager(workdir, read_only=True) if directory.is_dir() else None
    try:
        step = manager.best_step() if manager else None
    except ValueError as error:  # its metrics are no JSON
        raise UserError(f"the checkpoint in {directory} is damaged ({error}).") from error
    if manager is None or step is None:
        raise UserError(f"{directory} holds no checkpoint; train until the first evaluation.")
    if damaged := _damage(manager, step):
        raise UserError(f"{damaged}; train again in another workdir.")
    return step, _restore(manager, step, variables, parallel)


def _best_manager(workdir: epath.Path, read_only: bool = False) -> ocp.CheckpointManager:
    return _manager(
        workdir / "best",
        max_to_keep=1,
        best_fn=lambda metrics: metrics["score"],
        best_mode="max",
        read_only=read_only,  # or it removes what a run that goes on is writing
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
    def target(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=parallel.one_per_host)

    try:
        args = ocp.args.StandardRestore(jax.tree.map(target, like))
        return parallel.put(manager.restore(step, args=args))
    except Exception as error:  # Orbax and its storage raise many kinds
        raise UserError(
            f"the checkpoint of step {step} in {manager.directory} cannot be read or is of another"
            f" model ({reason(error)}); train in another workdir, or go on from an earlier"
            " checkpoint by removing this one."
        ) from error


@contextlib.contextmanager
def _reported(manager: ocp.CheckpointManager) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax and its storage raise many kinds
        raise storage.kind_of(error)(
            f"a checkpoint could not be written to {manager.directory} ({reason(error)}); the"
            " ones before it are whole: make room, or mend it, and run the same command again."
        ) from error


def _seal(directory: epath.Path) -> None:
    """Writes down what the files of a checkpoint are, so that damage is seen before it is read.

    Orbax checks no digests, and leaves reads running when one fails. It calls this when all files
    are written, just before it says so in one more: that file, the last, makes a checkpoint of a
    folder in a bucket; a directory then gets its final name.
    """
    for folder in directory.iterdir():
        if folder.is_dir() and not (folder / ocp.path.atomicity.COMMIT_SUCCESS_FILE).exists():
            (folder / _DIGESTS).write_text(json.dumps(_digests(folder)))


def _damage(manager: ocp.CheckpointManager, step: int) -> str | None:
    """What is wrong with the files of a checkpoint, as host 0 sees them; None if nothing is."""
    wrong = 0
    if distributed.is_main():
        directory = manager.directory / str(step)
        try:
            written = json.loads((directory / _DIGESTS).read_text())
            found = _digests(directory)
            wrong = sum(found.get(name) != digest for name, digest in written.items())
        except (OSError, ValueError):
            wrong = 1  # the seal itself
    if not (wrong := distributed.of_main(wrong)):
        return None
    return (
        f"the checkpoint of step {step} in {manager.directory} is damaged ({wrong} of its files"
        " are not as they were written)"
    )


def _set_aside(directory: epath.Path) -> None:
    """Gives a damaged checkpoint another name; nothing is deleted."""
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
