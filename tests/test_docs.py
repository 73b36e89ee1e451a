"""The documentation has every public name, every page and every method."""

import importlib
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from pals_jax.models.adapters.methods import METHODS
from pals_jax.models.transformer import SITES

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"


@pytest.mark.parametrize("module", ["pals_jax", "pals_jax.convert", "pals_jax.config"])
def test_public_names_have_docstrings_and_a_place_in_the_reference(module: str) -> None:
    reference = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    for name in importlib.import_module(module).__all__:
        value = getattr(importlib.import_module(module), name)
        assert f"::: {module}.{name}\n" in reference, name
        assert inspect.getdoc(value), name
        members = vars(value).items() if inspect.isclass(value) else ()
        for key, member in members:
            if not key.startswith("_") and (callable(member) or isinstance(member, property)):
                assert inspect.getdoc(member), f"{name}.{key}"


def test_every_page_is_in_the_navigation() -> None:
    project = tomllib.loads((REPOSITORY / "zensical.toml").read_text())["project"]
    found = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert set(_leaves(project["nav"])) == found


def _leaves(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    items = nav.values() if isinstance(nav, dict) else nav
    return [leaf for item in items for leaf in _leaves(item)]


def test_the_pictures_have_every_site_and_method() -> None:
    """If this fails, run docs/pictures/draw.py."""

    def words(name: str) -> set[str]:
        return set(re.findall(r">([^<]+)</text>", (DOCS / "pictures" / name).read_text()))

    assert set(SITES) <= words("sites.svg")
    assert set(METHODS) - {"shared"} <= words("design_space.svg")
