"""One picture for each claim."""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pals_jax.inference import ablation
from results.claims import Claim
from results.evidence import Evidence

COLOURS = ("#1f6f8b", "#d1495b", "#66a182")


def draw(evidence: Evidence, claim: Claim, path: Path) -> bool:
    """Draws a claim's picture; returns whether there was anything to draw."""
    figure = _KINDS[claim.picture](evidence, claim)
    if figure is None:
        return False
    figure.savefig(path, dpi=110, metadata={"Software": None})  # the same bytes each time
    return True


def _differences(evidence: Evidence, claim: Claim) -> Figure | None:
    """For each pair: the difference on each task and on their mean, with its 95% interval."""
    rows = list(dict.fromkeys([*((task,) for task in claim.tasks), claim.tasks]))
    height = 1.2 + 0.32 * len(rows) + 0.35 * len(claim.pairs)
    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.subplots()
    drawn = False
    for at, pair in enumerate(claim.pairs):
        colour, shift = COLOURS[at % len(COLOURS)], 0.18 * (at - (len(claim.pairs) - 1) / 2)
        one, other = (evidence.claims.arms[name].title for name in pair)
        label = textwrap.fill(f"{one} minus {other}".replace("`", ""), 90)
        for row, tasks in enumerate(rows):
            found = evidence.on(claim, pair, tasks)
            if found is None:
                continue
            drawn = True
            bold = tasks == claim.tasks
            axes.plot(
                [found.low, found.high], [row + shift] * 2, color=colour, lw=3 if bold else 1.5
            )
            axes.plot(found.value, row + shift, "o", color=colour, ms=7 if bold else 5, label=label)
            label = "_nolegend_"
    if not drawn:
        return None
    axes.axvline(-claim.margin, color="black", lw=1, ls=":")
    axes.set_yticks(range(len(rows)), [*claim.tasks, "mean"][: len(rows)])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("difference in points, with its 95% interval")
    figure.legend(loc="outside lower center", frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _size_and_score(evidence: Evidence, claim: Claim) -> Figure | None:
    """Each arm's score minus full fine-tuning's, over the parameters that it trains for a task."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    named = {name: evidence.claims.arms[name] for name in claim.arms}
    sides = {
        name: [evidence.side(claim, arm, task) for task in claim.tasks]
        for name, arm in named.items()
    }
    drawn = False
    for colour, family in zip(COLOURS, ("houlsby", "top_layers", "layer_norms"), strict=True):
        points = []
        for name, arm in named.items():
            share = evidence.stored_share(claim, arm)
            pairs = zip(sides[name], sides["full"], strict=True)
            changes = [one.score() - other.score() for one, other in pairs if one and other]
            mine = arm.overrides.get("method", "").partition("(")[0] == family
            if mine and share is not None and len(changes) == len(claim.tasks):
                points.append((100 * share, *np.percentile(changes, [20, 50, 80])))
        if points:
            drawn = True
            x, low, middle, high = np.array(sorted(points)).T
            axes.plot(x, middle, "o-", color=colour, label=family)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    if not drawn:
        return None
    axes.axhline(0, color="black", lw=1, ls=":")
    axes.set_xscale("log")
    axes.set_xlabel("parameters that a task trains besides its head, % of the encoder")
    axes.set_ylabel("score minus full fine-tuning's\n(median and 20th to 80th percentile of tasks)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _heat_map(evidence: Evidence, claim: Claim) -> Figure | None:
    """What removing the adapters of each span of layers changes, the mean over tasks."""
    changes = evidence.heat_map(claim)
    return None if changes is None else ablation.draw({"mean of the tasks": changes})


def _scores(evidence: Evidence, claim: Claim) -> Figure | None:
    """Every arm's mean score over the claim's tasks, of each seed and of all."""
    found = {}
    for arm in (evidence.claims.arms[name] for name in claim.arms):
        sides = [evidence.side(claim, arm, task) for task in claim.tasks]
        if all(side is not None for side in sides):
            found[arm.title.replace("`", "")] = np.mean([s.scores() for s in sides if s], axis=0)
    if not found:
        return None
    titles = sorted(found, key=lambda title: found[title].mean())
    figure = Figure(figsize=(8, 1.0 + 0.36 * len(titles)), layout="constrained")
    axes = figure.subplots()
    for row, title in enumerate(titles):
        axes.plot(found[title], [row] * len(found[title]), "o", color=COLOURS[0], ms=4, alpha=0.5)
        axes.plot(found[title].mean(), row, "D", color=COLOURS[1], ms=6)
    axes.set_yticks(range(len(titles)), [textwrap.fill(title, 48) for title in titles])
    axes.set_xlabel("mean score (red), and that of each seed")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


_KINDS = {
    "differences": _differences,
    "scores": _scores,
    "size and score": _size_and_score,
    "heat map": _heat_map,
}
