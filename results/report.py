"""The pages of docs/results, made from the records of the runs alone."""

import shutil
import tempfile
from pathlib import Path

import numpy as np

from results import pictures, records
from results.claims import LOGISTIC, PAPERS, Arm, Claim, Claims
from results.evidence import Evidence
from results.statistics import Difference, verdict

TEXTS = Path(__file__).with_name("pages")  # what people have written; {{NAME}} marks a place
STORIES = ("H3", "U7", "P3")  # the claims whose pictures tell the story of each paper


def write(claims: Claims, pages: Path = records.PAGES) -> None:
    """Writes all pages and pictures; a failure on the way leaves the old ones as they are."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch)
        rows: list[str] = []
        stories: list[str] = []
        sections: dict[str, list[str]] = {paper: [] for paper in PAPERS}
        for claim in claims.claims.values():
            evidence = evidence_of(claims, claim, pages)
            found, said = judge(evidence, claim)
            rows.append(_row(evidence, claim, found, said))
            drawn = pictures.draw(evidence, claim, made / f"{claim.name}.png")
            if drawn and claim.name in STORIES and evidence.is_complete(claim):
                stories.append(_story(claim, said))
            sections[claim.paper].append(_section(evidence, claim, found, said, drawn))
        places = {"claims": "\n".join([*_HEAD, *rows]), "stories": "\n\n".join(stories)}
        for length, settings in claims.devices["cpu"].items():
            places[length] = f"{settings['epochs'] * settings['steps_per_epoch']:,}"
        _page(made / "README.md", places)
        for paper in PAPERS:
            here = {**places, "claims": "\n\n".join(sections[paper])}
            _page(made / f"{paper}.md", here)
        pages.mkdir(parents=True, exist_ok=True)
        for file in made.iterdir():
            partial = pages / f"{file.name}.partial"
            shutil.copyfile(file, partial)
            partial.replace(pages / file.name)
        for picture in pages.glob("*.png"):
            if not (made / picture.name).exists():
                picture.unlink()


def _story(claim: Claim, said: str) -> str:
    where = f"[{PAPERS[claim.paper]}]({claim.paper}.md#{claim.name.lower()})"
    return f"{where}: {claim.sentence} **{said}**\n\n![{claim.name}]({claim.name}.png)"


def judge(evidence: Evidence, claim: Claim) -> tuple[list[Difference | None], str]:
    """The difference of each pair of a claim, and its verdict."""
    found = [evidence.compare(claim, pair) for pair in claim.pairs]
    return found, verdict(claim, found, evidence.moved(claim) or 0.0)


def evidence_of(claims: Claims, claim: Claim, pages: Path) -> Evidence:
    """What was run on a GPU, at the papers' lengths, if it is complete; else what a CPU ran."""
    of_gpu = Evidence(claims, pages, "gpu")
    return of_gpu if of_gpu.is_complete(claim) else Evidence(claims, pages, "cpu")


def _page(path: Path, places: dict[str, str]) -> None:
    text = (TEXTS / path.name).read_text(encoding="utf-8")
    for name, value in places.items():
        text = text.replace("{{" + name + "}}", value)
    path.write_text(text, encoding="utf-8")


_HEAD = (
    "| claim | published | here, in points (95% interval) | verdict | on | runs | hours |",
    "| --- | --- | --- | --- | --- | ---: | ---: |",
)


def _row(evidence: Evidence, claim: Claim, found: list[Difference | None], said: str) -> str:
    runs = evidence.all_runs(claim)
    hours = sum(run["seconds"] for run in runs) / 3600
    here = "<br>".join(
        _signed(each) if each else evidence.lacks(claim, pair)
        for pair, each in zip(claim.pairs, found, strict=True)
    )
    name = f"[{claim.name}]({claim.paper}.md#{claim.name.lower()})"
    return (
        f"| {name} {claim.sentence} | {claim.published} | {here} | **{said}** |"
        f" {evidence.device.upper()} | {len(runs)} | {hours:.1f} |"
    )


def _signed(found: Difference) -> str:
    return f"{found.value:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def _section(
    evidence: Evidence, claim: Claim, found: list[Difference | None], said: str, drawn: bool
) -> str:
    lines = [
        f"## {claim.name}",
        "",
        f"**{claim.sentence}** {claim.source}; published: {claim.published}.",
        "",
        f"Verdict: **{said}**. {claim.found}".rstrip(),
        "",
    ]
    for pair, each in zip(claim.pairs, found, strict=True):
        one, other = (evidence.claims.arms[name].title for name in pair)
        here = _signed(each) if each else evidence.lacks(claim, pair)
        lines.append(f"- {_code(one)} minus {_code(other)}: {here}")
    if (moved := evidence.moved(claim)) is not None:
        lines.append(
            f"- Largest change of a task's parameters while later tasks were added: {moved:g}"
        )
    if (changes := evidence.heat_map(claim)) is not None:
        lines.append(
            "- Without the adapters of one layer, the mean score changes by at most"
            f" {100 * abs(np.diag(changes)).max():.1f} points"
        )
    if below := _below_logistic(evidence, claim):
        lines.append(f"- Below the better logistic regression: {'; '.join(below)}")
    lines += ["", *_table(evidence, claim)]
    if drawn:
        lines += ["", f"![{claim.name}]({claim.name}.png)"]
    return "\n".join(lines)


def _table(evidence: Evidence, claim: Claim) -> list[str]:
    """Each arm's mean score of each task x 100, and the standard deviation over seeds."""
    size = "encoders, of all tasks" if claim.paper == "pals" else "parameters of a task"
    columns = [size, *claim.tasks, *(["mean"] if len(claim.tasks) > 1 else [])]
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for arm in (evidence.claims.arms[name] for name in claim.arms):
        if arm.kind == "spans":  # it is drawn
            continue
        sides = [evidence.side(claim, arm, task) for task in claim.tasks]
        scores = [None if side is None else side.scores() for side in sides]
        if len(scores) > 1:
            complete = [each for each in scores if each is not None]
            whole = len(complete) == len(sides)
            scores.append(np.mean(np.broadcast_arrays(*complete), axis=0) if whole else None)
        cells = [_cell(each) for each in scores]
        size = _parameters(evidence, claim, arm)
        lines.append(f"| {_code(arm.title)} | {size} | {' | '.join(cells)} |")
    return lines


def _below_logistic(evidence: Evidence, claim: Claim) -> list[str]:
    """The trained arms whose mean score of a task is below a logistic regression's."""
    arms = [evidence.claims.arms[name] for name in claim.arms]
    found = []
    for arm in (arm for arm in arms if arm.kind in ("train", "added")):
        behind = []
        for task in claim.tasks:
            side = evidence.side(claim, arm, task)
            simple = [
                other.score()
                for each in arms
                if each.kind in LOGISTIC and (other := evidence.side(claim, each, task))
            ]
            if side and simple and side.score() < max(simple):
                behind.append(f"{task} ({side.score():.1f} against {max(simple):.1f})")
        if behind:
            found.append(f"{_code(arm.title)} on {', '.join(behind)}")
    return found


def _cell(scores: np.ndarray | None) -> str:
    if scores is None:
        return ""
    spread = f" ± {scores.std(ddof=1):.1f}" if len(scores) > 1 else ""
    return f"{scores.mean():.1f}{spread}"


def _parameters(evidence: Evidence, claim: Claim, arm: Arm) -> str:
    """What is stored of a task, as a percentage of the encoder; or of all tasks, in encoders."""
    if claim.paper == "pals":
        return "" if (times := evidence.stored(claim, arm)) is None else f"{times:.2f}"
    return "" if (share := evidence.stored_share(claim, arm)) is None else f"{100 * share:.2f}%"


def _code(title: str) -> str:
    return f"`{title}`" if title[-1] == ")" else title
