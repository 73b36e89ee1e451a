"""A plan for people: as a table, and as a picture of where the time goes."""

from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from pals_jax.runtime import storage
from pals_jax.runtime.console import in_bytes
from pals_jax.training.plan.plan import ASSUMPTIONS, Plan

if TYPE_CHECKING:
    from rich.table import Table


def plan_table(plan: Plan) -> "Table":
    """The plan as a table."""
    from rich.table import Table  # takes a while to import

    kind, steps = plan.kind, (plan.train, plan.evaluation)
    rows = Table(
        title=f"{plan.topology}: {kind.chips} chips, {kind.devices} devices",
        caption="\n".join(ASSUMPTIONS),
        title_justify="left",
        caption_justify="left",
    )
    rows.add_column("")
    rows.add_column("training step", justify="right")
    rows.add_column("evaluation step", justify="right")
    rows.add_row("examples", *(str(s.examples) for s in steps))
    shapes = (f"{s.shape.rows} x {' and '.join(map(str, s.shape.room))}" for s in steps)
    rows.add_row("rows x positions", *shapes)
    rows.add_row("FLOPs, all chips", *(f"{s.flops:.4g}" for s in steps))
    rows.add_row("  the model's share", *(f"{s.model_share:.1%}" for s in steps))
    rows.add_row("moved, per chip", *(in_bytes(s.bytes_moved) for s in steps))
    rows.add_row("arguments, per chip", *(in_bytes(s.arguments) for s in steps))
    rows.add_row("temporaries, per chip", *(in_bytes(s.temporaries) for s in steps))
    for name in sorted({name for s in steps for name in s.program.exchanges}):
        cells = (s.program.exchanges.get(name, (0, 0)) for s in steps)
        rows.add_row(f"{name}s", *(f"{count} of {in_bytes(size)}" for count, size in cells))
    rows.add_row("transfers to the host", *(str(s.program.host_transfers) for s in steps))
    rows.add_row("compiled in", *(f"{s.compiled.seconds:.0f} s" for s in steps))
    rows.add_section()
    rows.add_row("computing", *(_milliseconds(s.seconds_computing) for s in steps))
    rows.add_row("moving", *(_milliseconds(s.seconds_moving) for s in steps))
    rows.add_row("exchanging", *(_milliseconds(s.seconds_exchanging) for s in steps))
    rows.add_row("roofline", *(_milliseconds(s.roofline) for s in steps))
    if parts := plan.train.seconds_by_part:
        rows.add_section()
        for part in parts:
            rows.add_row(part, *(_milliseconds(s.seconds_by_part[part]) for s in steps))
        together = (sum(s.seconds_by_part.values()) for s in steps)
        rows.add_row("the compiler's estimate", *map(_milliseconds, together))
        rows.add_section()
    rows.add_row("step", *(_milliseconds(s.seconds) for s in steps))
    rows.add_row("model FLOPs utilisation", *(f"{s.utilisation:.1%}" for s in steps))
    rows.add_row("examples per second", *(f"{s.examples / s.seconds:,.0f}" for s in steps))
    rows.add_section()
    room = kind.chip.hbm
    verdict = "fits" if plan.fits else "does not fit"
    rows.add_row("memory of a chip", f"{in_bytes(plan.memory)} of {in_bytes(room)}: {verdict}")
    rows.add_row("positions of all batches, on average", f"{plan.mean_batch:.1%} of these")
    rows.add_row(f"{plan.steps:,} steps", duration(plan.hours))
    if plan.cost is not None:
        rows.add_row(f"at {plan.price:.2f} USD per hour", f"{plan.cost:.2f} USD")
    return rows


def duration(hours: float) -> str:
    """A time, formatted for people."""
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{60 * hours:.0f} min" if hours >= 1 / 60 else f"{3600 * hours:.1f} s"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def plot(plan: Plan, path: epath.Path) -> None:
    """Draws the time of both steps, as bars stacked by part or, without an estimate, the roofline.

    Raises:
        UserError: if the file cannot be written.
    """
    from matplotlib.figure import Figure  # takes a second to import

    steps = {"training": plan.train, "evaluation": plan.evaluation}
    times = [step.seconds_by_part or {"roofline": step.roofline} for step in steps.values()]
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    below = np.zeros(len(steps))
    for index, part in enumerate(times[0]):
        heights = np.array([1e3 * time[part] for time in times])
        axes.bar(
            [*steps],
            heights,
            0.6,
            below,
            color=f"C{index % 10}",
            hatch="//" * (index // 10),
            label=part,
        )
        below += heights
    axes.set(title=f"a step on {plan.topology}", ylabel="milliseconds")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5))
    with storage.reported(path), path.open("wb") as file:
        figure.savefig(file)
