"""Agreement of the README with CI, and the design's rules for the modules."""

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()
PACKAGE = REPOSITORY / "pals_jax"


def commands() -> list[str]:
    """The one-line commands that set everything up."""
    return [line for line in README.splitlines() if line.startswith("python3 -m venv")]


def test_ci_runs_the_test_command_word_for_word():
    demo, test = commands()
    assert "configs/demo.py" in demo
    assert test.endswith("pytest")
    assert test in (REPOSITORY / ".ci" / "run").read_text().splitlines()


def test_every_link_leads_somewhere_and_nothing_is_left_to_fill_in():
    pages = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")]
    for page in pages:
        text = page.read_text()
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        assert not re.search(r"\b[A-Z]+_TABLE\b|TODO|FIXME", text)


def test_nothing_names_a_registry_host():
    for name in ("pyproject.toml", ".ci/run", "README.md"):
        text = (REPOSITORY / name).read_text()
        assert "--index-url" not in text
        assert "pypi" + ".org" not in text


def imports(path: Path) -> set[str]:
    """The modules of this package that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pals_jax"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("pals_jax")}
    return found


ROOMS = ["cli", "training", "inference", "experiment", "convert", "models", "data", "runtime"]


def rooms_imported(path: Path) -> set[str]:
    return {module.split(".")[1] for module in imports(path) if "." in module} & set(ROOMS)


def test_the_package_is_its_rooms():
    """Nothing lies beside the rooms but what is public or starts the command line."""
    found = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith((".", "__"))}
    assert found == {*ROOMS, "config"}  # `config` is the public name of experiment.config


def test_imports_point_down():
    """Each room imports itself and those below it; `models` and `data` do not know each other."""
    for place, room in enumerate(ROOMS):
        allowed = set(ROOMS[place:]) - ({"data"} if room == "models" else set())
        paths = [PACKAGE / "cli.py"] if room == "cli" else (PACKAGE / room).rglob("*.py")
        for path in paths:
            wrong = rooms_imported(path) - allowed
            assert not wrong, f"{path} imports {wrong}"


def map_rows(page: str) -> list[str]:
    """The rows of a page's map below `pals_jax/`."""
    lines = [*(REPOSITORY / page).read_text().splitlines(), ""]
    start = next(i for i, line in enumerate(lines) if line.startswith("    pals_jax/")) + 1
    return lines[start : lines.index("", start)]


def test_the_maps_have_every_room_and_module():
    """They list the rooms in the order of the imports; the contributors' names all modules."""
    for page in ("README.md", "CONTRIBUTING.md"):
        names = [re.split(" {2,}", row.strip())[0].strip("/") for row in map_rows(page)]
        assert [name for name in names if name in ROOMS] == ROOMS, page
    words = set(re.findall(r"[a-z0-9_]+", " ".join(map_rows("CONTRIBUTING.md"))))
    modules = {path.stem for path in PACKAGE.rglob("[a-z]*.py") if "demo" not in path.parts}
    assert not modules - words


def test_the_encoder_knows_no_method():
    known = (
        *("transformer", "stack", "layers", "bert", "encoder", "bart", "encoder_decoder"),
        *("adapters/forms", "adapters/spec", "adapters/places", "adapters/bound"),
    )
    for name in known:
        assert not any("methods" in x for x in imports(PACKAGE / "models" / f"{name}.py"))


def test_the_package_imports_torch_for_pickles_only_and_never_tensorflow():
    for path in set(PACKAGE.rglob("*.py")) - {PACKAGE / "convert" / "tensor_files.py"}:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"torch", "tensorflow"}, path


def test_modules_stay_small():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
