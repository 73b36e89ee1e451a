"""Counting parameters: what is shared, what each task adds, and the multiple of the encoder."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from pals_jax.models.adapters.places import places
from pals_jax.models.architectures import Model, num_tasks
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.models.shapes import variable_shapes

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers of parameters.

    Attributes:
        encoder: of the shared encoder, pooler included, or of the whole encoder-decoder.
        adapters: of the adapters of one task, by their places; biases in, head out.
        heads: of the head of each task, without the padding to the largest; 0 where there is none.
    """

    encoder: int
    adapters: dict[str, int]
    heads: tuple[int, ...]

    @property
    def per_task(self) -> int:
        """What one task adds besides its head."""
        return sum(self.adapters.values())

    @property
    def total(self) -> int:
        """The encoder and all tasks, heads in."""
        return self.encoder + len(self.heads) * self.per_task + sum(self.heads)

    @property
    def multiple(self) -> float:
        """The encoder and all adapters over the encoder, heads out, as the papers count."""
        return 1.0 + len(self.heads) * self.per_task / self.encoder

    def to_json(self) -> dict[str, Any]:
        """All of it, for --json."""
        return {
            "encoder": self.encoder,
            "tasks": len(self.heads),
            "adapters": self.adapters,
            "per_task": self.per_task,
            "heads": list(self.heads),
            "total": self.total,
            "multiple": self.multiple,
        }


def count(model: Model) -> Counts:
    """The counts of a model, from shapes alone: no array is built.

    The bias of an encoder-decoder's logits is no parameter: it is not trained.
    """
    shapes, tasks = variable_shapes(model), num_tasks(model)

    def size(tree: Any) -> int:
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))

    names = [place.name for b in model.config.stacks for place in places(model.method, b)]
    adapters = {name: size(shapes["adapters"].get(name, {})) // tasks for name in names}
    if isinstance(model, Seq2SeqModel):
        return Counts(size(shapes["params"]) - model.config.vocab_size, adapters, (0,) * tasks)
    heads = tuple((model.config.hidden_size + 1) * outputs for outputs in model.num_outputs)
    return Counts(size(shapes["params"]), adapters, heads)


def counts_table(counts: Counts, method: str, tasks: tuple[str, ...]) -> "Table":
    """The counts for a person."""
    from rich.table import Table

    rows = Table(title=f"parameters of {method}, {len(tasks)} tasks", title_justify="left")
    rows.add_column("part")
    rows.add_column("parameters", justify="right")
    rows.add_column("of the encoder", justify="right")

    def row(name: str, number: int) -> None:
        rows.add_row(name, f"{number:,}", f"{number / counts.encoder:.2%}")

    row("encoder, shared", counts.encoder)
    for name, number in counts.adapters.items():
        row(f"{name}, one task", number)
    for task, number in zip(tasks, counts.heads, strict=True):
        if number:
            row(f"head of {task}", number)
    rows.add_section()
    rows.add_row("total", f"{counts.total:,}", f"{counts.total / counts.encoder:.2%}")
    rows.add_row("multiple of the encoder, heads out", f"{counts.multiple:.4f}x", "")
    return rows
