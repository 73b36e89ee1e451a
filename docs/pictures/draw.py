"""Draws the pictures of the documentation: `python docs/pictures/draw.py`.

The design space comes from the methods themselves, so that it has every method at its place.
"""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from pals_jax.models import method_table
from pals_jax.models.transformer import SITES

HERE = Path(__file__).parent
INK, FAINT = "#22303c", "#e9eef2"
PARALLEL, SERIAL, OTHER = "#1f6f8b", "#d1495b", "#5c6b73"
TASKS = {"sentiment": "#d1495b", "entailment": "#1f6f8b", "similarity": "#66a182"}
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "pals_jax", "font.family": "sans-serif"}


def main() -> None:
    """Draws all."""
    mpl.rcParams.update(STYLE)
    for name, draw in PICTURES.items():
        draw().savefig(HERE / f"{name}.svg", metadata={"Date": None}, facecolor="white")


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure whose units are tenths of an inch."""
    figure = Figure(figsize=(width / 10, height / 10))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, **style) -> None:
    look = {"fc": FAINT, "ec": "none", "boxstyle": "round,pad=0,rounding_size=0.6"} | style
    colour = look.pop("color", INK)
    size = look.pop("size", 10)
    axes.add_patch(FancyBboxPatch((x, y), width, height, **look))
    axes.text(
        x + width / 2, y + height / 2, text, ha="center", va="center", color=colour, size=size
    )


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style) -> None:
    look = {"arrowstyle": "-|>", "mutation_scale": 10, "color": INK, "lw": 1.1} | style
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **look))


# ------------------------------------------------ what the system does


def system() -> Figure:
    """Texts of several tasks go through one encoder; each task has its own small parts in it."""
    figure, axes = _canvas(92, 43)
    _box(axes, 31, 4, 30, 33, "", fc="#f4f7f9", ec="#c4ced6")
    axes.text(46, 39.2, "one shared encoder (BERT, RoBERTa, BART)", ha="center", size=10, color=INK)
    for layer in range(4):
        y = 6.2 + 7.6 * layer
        _box(axes, 33, y, 13, 5.6, "layer")
        for i, colour in enumerate(TASKS.values()):
            _box(axes, 49 + 3.6 * i, y + 0.6, 2.8, 4.4, "", fc=colour)
        _arrow(axes, (46.4, y + 2.8), (48.6, y + 2.8), arrowstyle="<|-|>")
        if layer:
            _arrow(axes, (39.5, y - 1.8), (39.5, y - 0.1))
    axes.text(54, 1.4, "a few parameters for each task", ha="center", size=9, color=OTHER)
    texts = ("“The soup was cold.”", "“All left.” / “Some left.”", "“A cat sat.” / “A cat lay.”")
    answers = ("negative  97%", "entailment  91%", "4.2 of 5")
    for i, (task, colour) in enumerate(TASKS.items()):
        y = 29.5 - 11 * i
        axes.text(1, y + 6.1, task, color=colour, size=10, weight="bold")
        _box(axes, 1, y, 23, 5, texts[i], size=9, fc="white", ec=colour)
        _arrow(axes, (24.3, y + 2.5), (30.6, y + 2.5), color=colour)
        _arrow(axes, (61.4, y + 2.5), (67.2, y + 2.5), color=colour)
        _box(axes, 67.6, y, 23, 5, answers[i], size=9, fc="white", ec=colour)
    return figure


# ------------------------------------------------ the sites of a layer


# What a layer computes, from its input on: the sites at which methods act, then the next operation.
_LAYER = (
    (("embeddings",), "project to queries, keys, values"),
    (("attention.query", "attention.key", "attention.value"), "attend"),
    (("attention.heads",), "project the heads' output"),
    (("attention.projection", "attention.output"), "add the residual, layer norm"),
    ((), "expand"),
    (("ffn.intermediate",), "activate"),
    (("ffn.hidden",), "project back"),
    (("ffn.projection", "ffn.output"), "add the residual"),
    (("layer",), "layer norm"),
)
_RESIDUALS = ((0, 3), (4, 7))  # from before one operation to another


def sites() -> Figure:
    """A layer from its input (bottom) to its output (top), and the methods at its sites."""
    methods: dict[str, list[str]] = {site: [] for site in SITES}
    for (site, _), names in _cells().items():
        methods.get(site, []).extend(names)
    figure, axes = _canvas(92, 121)
    x, y = 23, 4.0
    ends: list[tuple[float, float]] = []
    axes.text(x, 1, "h, the layer's input", ha="center", size=10, color=INK)
    for names, operation in (*_LAYER, (("layer.output", "top"), "")):
        bottom, y = y, y + 2.2 + 3.8 * len(names)
        _arrow(axes, (x, bottom), (x, y))
        for i, name in enumerate(names):
            at = bottom + (y - 1.8 - bottom) * (i + 0.5) / len(names)
            axes.plot([x], [at], "o", ms=7, color=SERIAL)
            axes.plot([x, 40], [at, at], color=SERIAL, lw=0.8, ls=":")
            axes.text(41, at + 0.2, name, size=9.5, va="center", color=SERIAL, weight="bold")
            known = sorted(methods[name], key=len)
            text = ", ".join(known[:4]) + ", ..." * (len(known) > 4)
            axes.text(60, at + 0.2, text, size=8.5, va="center", color=OTHER)
        if operation:
            _box(axes, 8, y, 30, 4.2, operation)
        ends.append((y - 1.5, y + 2.1))
        y += 4.2
    axes.text(x, y - 3.4, "h', its output", ha="center", size=10, color=INK)
    for first, last in _RESIDUALS:
        bottom, top = ends[first][0], ends[last][1]
        axes.plot([x, 4, 4], [bottom, bottom, top], color=INK, lw=1.1)
        _arrow(axes, (4, top), (8, top))
    return figure


# ------------------------------------------------ the design space


def design_space() -> Figure:
    """Each method at its sites (rows) and forms (columns); one with several parts occurs again."""
    cells = _cells()
    copies = cells.pop(("", "own copy"))
    rows = [x for x in reversed(SITES) if any(site == x for site, _ in cells)]
    forms = list(dict.fromkeys(form for _, form in cells))
    heights = [max(len(names) for (x, _), names in cells.items() if x == site) for site in rows]
    width, left, line = 14.6, 17, 1.9
    top = sum(line * height + 2 for height in heights) + 9
    figure, axes = _canvas(left + width * len(forms) + 1, top + 5)
    axes.text(1, top + 2, "site ↓   form →", size=9, color=OTHER)
    for i, form in enumerate(forms):
        at = left + width * (i + 0.5)
        axes.text(at, top + 2, form, ha="center", size=9, weight="bold", color=INK)
    y = top
    for site, height in zip(rows, heights, strict=True):
        y -= line * height + 2
        for i, form in enumerate(forms):
            names = cells.get((site, form), {})
            _names(axes, left + width * i + 0.3, y, width - 0.6, line * height + 1.4, names)
        _label(axes, y + line * height / 2 + 0.7, site)
    _label(axes, y - 3, "own copy")
    _names(axes, left + 0.3, y - 4.7, width * len(forms) - 0.6, line + 1.4, copies, across=True)
    legend = {"reads the block's input (parallel)": PARALLEL, "reads the state (serial)": SERIAL}
    for i, (text, colour) in enumerate({**legend, "reads neither": OTHER}.items()):
        axes.text(left + 36 * i, 1.2, text, color=colour, size=9, weight="bold")
    return figure


def _cells() -> dict[tuple[str, str], dict[str, str]]:
    """{(site, form): {method: colour}}; the site of a task's own copy of parameters is ""."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    name = ""
    for row in method_table.rows():
        name = row["method"].split("(")[0] or name
        if row["form"]:
            place = ("" if row["form"] == "own copy" else row["site"], row["form"].split("(")[0])
            cells.setdefault(place, {})[name] = _colour(row)
    return cells


def _colour(row: Mapping[str, str]) -> str:
    if not row["input"]:
        return OTHER
    return PARALLEL if row["input"] == "block's input" else SERIAL


def _label(axes: Axes, y: float, text: str) -> None:
    axes.text(1, y, text, va="center", size=9, weight="bold", color=INK)


def _names(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    names: Mapping[str, str],
    across: bool = False,
) -> None:
    """A cell with names, one above the other or side by side."""
    _box(axes, x, y, width, height, "", fc=FAINT if names else "#fafbfc")
    for i, (name, colour) in enumerate(names.items()):
        share = (i + 0.5) / len(names)
        at = (
            (x + width * share, y + height / 2)
            if across
            else (x + width / 2, y + height - height * share)
        )
        axes.text(*at, name, ha="center", va="center", size=8, color=colour)


PICTURES = {"system": system, "sites": sites, "design_space": design_space}

if __name__ == "__main__":
    main()
