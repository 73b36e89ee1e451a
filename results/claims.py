"""Reading `claims.toml`: the claims, and the arms that they compare."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from pals_jax.runtime.errors import UserError

FORMAT = 1
FILE = Path(__file__).with_name("claims.toml")
PAPERS = {
    "baselines": "Baselines",
    "houlsby": "Parameter-efficient transfer learning (Houlsby et al. 2019)",
    "unified": "Towards a unified view (He et al. 2022)",
    "pals": "BERT and PALs (Stickland & Murray 2019)",
}
# Kinds of arms that are not trained; the last is the model without adapters, whose tasks are texts.
LOGISTIC = ("logistic-cls", "logistic-mean")
BASELINES = ("majority", *LOGISTIC, "untouched")
PICTURES = ("differences", "scores", "size and score", "heat map")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: its key in the file, and the folder of its runs.
        title: how the tables call it.
        kind: "train"; "added", whose tasks are trained one after another, each added to the run
            before; "without", trained as another arm and evaluated without the adapters of some
            layers; "spans", evaluated without those of each span of layers; or one of `BASELINES`.
        together: whether one run has all tasks of a claim in one model.
        length: how long runs are: a key of the devices' settings.
        of: with the kind "without", the arm whose runs are evaluated again.
        layers: with the kind "without", the layers whose adapters are removed, from 0.
        config: the configuration file; empty: that of most arms.
        overrides: {dotted key: value} of the configuration; {data} stands for the data's directory.
    """

    name: str
    title: str
    kind: str
    together: bool
    length: str
    of: str
    layers: tuple[int, ...]
    config: str
    overrides: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a paper says, and what is compared to decide it.

    Attributes:
        name: for example "H1".
        paper: a key of `PAPERS`.
        sentence: the claim.
        source: the section, table or figure.
        published: the paper's figures.
        pairs: (one, other), names of arms; `one` is claimed to be above `other` - margin.
        margin: in points of the mean score x 100.
        shown: names of further arms of the table.
        tasks: the tasks whose mean score is compared.
        trained_with: all tasks of the runs that have several; by default `tasks`.
        seeds: the seeds of every arm that is compared.
        picture: one of `PICTURES`; "heat map" is of the arm of the kind "spans".
        found: what was found out about the verdict, or about methods below logistic regression.
    """

    name: str
    paper: str
    sentence: str
    source: str
    published: str
    pairs: tuple[tuple[str, str], ...]
    tasks: tuple[str, ...]
    trained_with: tuple[str, ...] = ()
    margin: float = 0.0
    shown: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    picture: str = PICTURES[0]
    found: str = ""

    def runs_of(self, arm: Arm) -> list[tuple[str, ...]]:
        """The tasks of each run of an arm."""
        return [self.trained_with or self.tasks] if arm.together else [(t,) for t in self.tasks]

    def seeds_of(self, arm: Arm) -> tuple[int, ...]:
        """The seeds of an arm's runs: 0 alone where nothing is random, or nothing is compared."""
        return (0,) if arm.kind in (*BASELINES, "spans") else self.seeds

    @property
    def compared(self) -> tuple[str, ...]:
        """The arms that decide the claim, each once."""
        return tuple(dict.fromkeys(arm for pair in self.pairs for arm in pair))

    @property
    def arms(self) -> tuple[str, ...]:
        """All arms of the claim's table, each once: those compared, then those shown."""
        return tuple(dict.fromkeys((*self.compared, *self.shown)))


@dataclasses.dataclass(frozen=True)
class Claims:
    """The content of the file.

    Attributes:
        config: the configuration file of the arms that name no other.
        devices: device -> length -> overrides of the configuration.
        arms: by name.
        claims: by name, in the order of the file.
    """

    config: str
    devices: dict[str, dict[str, dict[str, Any]]]
    arms: dict[str, Arm]
    claims: dict[str, Claim]

    def settings(self, device: str, arm: Arm) -> dict[str, Any]:
        """What an arm's runs change in the configuration, besides task and seed; as in JSON."""
        length = {} if arm.kind in BASELINES else self.devices[device][arm.length]
        settings = {**length, **arm.overrides}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in sorted(settings.items())}

    def only(self, names: str) -> list[Claim]:
        """The claims of a comma-separated list of names; all of them if it is empty.

        Raises:
            UserError: there is no such claim.
        """
        for name in (wanted := [name for name in names.split(",") if name]):
            if name not in self.claims:
                raise UserError(
                    f"there is no claim {name!r} in {FILE.name}; its claims are"
                    f" {', '.join(self.claims)}."
                )
        return [claim for name, claim in self.claims.items() if not wanted or name in wanted]


def read(file: Path = FILE) -> Claims:
    """The claims of a file.

    Raises:
        UserError: the file is not TOML, of another format, or a claim is not complete.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{file} cannot be read as a list of claims: {error}.") from error
    if content.get("format") != FORMAT:
        raise UserError(
            f"{file} has the format {content.get('format')!r}, not {FORMAT}; use the commit that"
            " wrote it."
        )
    if not isinstance(content.get("config"), str):
        raise UserError(f"{file} names no config; add config = 'configs/FILE.py'.")
    arms = {name: _arm(name, dict(given), file) for name, given in content.get("arm", {}).items()}
    for name, arm in arms.items():
        if arm.kind == "without":
            if arm.of not in arms or not arm.layers:
                raise UserError(
                    f"{file}: arm {name} is of {arm.of!r} without the layers {arm.layers}; name an"
                    " arm of the file, and the layers whose adapters are removed."
                )
            trained = arms[arm.of]
            arms[name] = dataclasses.replace(
                arm,
                together=trained.together,
                length=trained.length,
                config=trained.config,
                overrides=trained.overrides,
            )
    claims = [_claim(given, arms, file) for given in content.get("claim", ())]
    by_name = {claim.name: claim for claim in claims}
    if len(by_name) < len(claims):
        raise UserError(f"{file} has two claims of one name; rename one.")
    devices = content.get("device", {})
    for name, arm in arms.items():
        for device in devices if arm.kind not in BASELINES else ():
            if arm.length not in devices[device]:
                raise UserError(
                    f"{file}: arm {name} has the length {arm.length!r}, which device {device} has"
                    " not; add it there."
                )
    return Claims(content["config"], devices, arms, by_name)


def _arm(name: str, given: dict[str, Any], file: Path) -> Arm:
    kind = given.pop("kind", "train")
    together = given.pop("together", kind == "added")
    length = given.pop("length", "together" if together and kind != "added" else "alone")
    title = given.pop("title", given.get("method", name).removesuffix(" + mean_pooling()"))
    of, layers = given.pop("of", ""), tuple(given.pop("layers", ()))
    config = given.pop("config", "")
    if kind not in ("train", "added", "without", "spans", *BASELINES):
        raise UserError(f"{file}: arm {name} is of an unknown kind, {kind!r}.")
    if "learning_rate" in given:
        given["optimizer.learning_rate"] = given.pop("learning_rate")
    overrides = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return Arm(name, title, kind, together, length, of, layers, config, overrides)


def _claim(given: dict[str, Any], arms: dict[str, Arm], file: Path) -> Claim:
    where = f"{file}: claim {given.get('name', '?')}"
    known = {field.name: field for field in dataclasses.fields(Claim)}
    if wrong := given.keys() - known.keys():
        raise UserError(f"{where} has {', '.join(sorted(wrong))}, which no claim has.")
    needed = [n for n, field in known.items() if field.default is dataclasses.MISSING]
    if missing := [name for name in needed if not given.get(name)]:
        raise UserError(f"{where} has no {', '.join(missing)}; add it.")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    if any(len(pair) != 2 for pair in given["pairs"]):
        raise UserError(f"{where} compares {given['pairs']}; give pairs, [one, other].")
    claim = Claim(**values | {"pairs": tuple(tuple(pair) for pair in given["pairs"])})
    if claim.paper not in PAPERS:
        raise UserError(f"{where} is of an unknown paper, {claim.paper!r}.")
    for arm in claim.arms:
        if arm not in arms:
            raise UserError(f"{where} compares {arm!r}, which is no arm of the file.")
    if claim.picture not in PICTURES:
        raise UserError(f"{where} has an unknown picture, {claim.picture!r}.")
    spans = sum(arms[arm].kind == "spans" for arm in claim.arms)
    if spans != (claim.picture == "heat map"):
        raise UserError(f"{where} needs one arm of the kind 'spans' if its picture is a heat map.")
    return claim
