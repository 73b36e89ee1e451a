"""Ablation: a run's scores without the adapters of a span of layers (Houlsby et al., figure 6)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from pals_jax.inference.run import Run
from pals_jax.models.adapters.parse import title
from pals_jax.models.adapters.spec import Adapter
from pals_jax.runtime import storage
from pals_jax.runtime.console import progress
from pals_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def ablate(run: Run) -> dict[str, np.ndarray]:
    """The change of each task's score when the adapters of a span of layers are removed.

    Nothing is retrained, and one compiled step evaluates all spans.

    Returns:
        {task: float [N, N]}; at [first, last] the score without the adapters of layers first to
        last (inclusive), minus the score with all adapters; NaN where last < first.

    Raises:
        UserError: if no layer of the run has adapters, or it is of an encoder-decoder.
    """
    experiment, depth = run.experiment, run.experiment.encoder().config.num_hidden_layers
    adapters = [spec for spec in experiment.model().method if isinstance(spec, Adapter)]
    if not any(adapter.layer_indices(depth) for adapter in adapters):
        raise UserError(
            f"the layers of {title(experiment.config.method)} carry no adapters to remove; ablate a"
            " run whose layers have adapters."
        )
    splits = {t.name: experiment.read_eval(t, run.tokenizer) for t in experiment.tasks}

    def scores(active: np.ndarray) -> dict[str, float]:
        results = run.evaluator.evaluate(run.variables, splits, active)
        return {t.name: run.evaluator.score({t.name: results[t.name]}) for t in experiment.tasks}

    whole = scores(np.ones(depth, bool))
    changes = {name: np.full((depth, depth), np.nan) for name in whole}
    spans = [(first, last) for first in range(depth) for last in range(first, depth)]
    with progress(len(spans), 0, "span") as bar:
        for first, last in spans:
            layers = np.arange(depth)
            without = scores((layers < first) | (layers > last))
            for name, change in changes.items():
                change[first, last] = without[name] - whole[name]
            bar.update()
    return changes


def to_json(changes: Mapping[str, np.ndarray]) -> dict[str, list[list[float | None]]]:
    """The same with None for NaN, which JSON does not have."""
    return {
        name: [[None if np.isnan(x) else float(x) for x in row] for row in change]
        for name, change in changes.items()
    }


def plot(changes: Mapping[str, np.ndarray], path: epath.Path) -> None:
    """Saves what `draw` draws."""
    with storage.reported(path), path.open("wb") as file:
        draw(changes).savefig(file)


def draw(changes: Mapping[str, np.ndarray]) -> "Figure":
    """One heat map for each task, of changes as `ablate` returns them."""
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(4 * len(changes), 4), layout="constrained")
    panels = figure.subplots(1, len(changes), squeeze=False)[0]
    for axes, (name, change) in zip(panels, changes.items(), strict=True):
        largest = max(np.nanmax(np.abs(change)), 1e-9)
        image = axes.imshow(100 * change, cmap="RdBu", vmin=-100 * largest, vmax=100 * largest)
        axes.set(title=name, xlabel="last layer without adapters", ylabel="first layer")
        figure.colorbar(image, ax=axes, label="change of the score x 100", shrink=0.8)
        for (first, last), value in np.ndenumerate(change):
            if not np.isnan(value):
                colour = "white" if abs(value) > 0.6 * largest else "black"
                axes.text(last, first, f"{100 * value:.1f}", ha="center", va="center", color=colour)
    return figure
