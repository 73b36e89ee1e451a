"""What the README and CI promise each other, and what the design promises of the modules."""

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
    for page in [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]:
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


def test_imports_point_down():
    """models and data know neither each other nor anything above them; convert knows no data."""
    allowed = {
        "models": ("pals_jax.models", "pals_jax.errors"),
        "data": ("pals_jax.data", "pals_jax.errors"),
        "convert": ("pals_jax.convert", "pals_jax.models", "pals_jax.errors"),
    }
    for folder, names in allowed.items():
        for path in (PACKAGE / folder).rglob("*.py"):
            wrong = {name for name in imports(path) if not name.startswith(names)}
            assert not wrong, f"{path.name} imports {wrong}"


def test_the_map_has_every_module_and_imports_point_down_in_it():
    """A row imports what is on it and below it, and the three folders are below all rows."""
    rows = README.split("    pals_jax/\n")[1].split("      models/")[0].splitlines()
    names = [re.split(" {2,}", row.strip())[0].split() for row in rows]
    modules = {path.stem: path for path in PACKAGE.glob("[a-z]*.py")}
    place = {name: i for i, row in enumerate(names) for name in row}
    assert place.keys() == modules.keys()
    for name, path in modules.items():
        for other in {x.split(".")[1] for x in imports(path) if "." in x} & modules.keys():
            assert place[name] <= place[other], f"{name} imports {other}"


def test_the_encoder_knows_no_method():
    for name in ("bert", "encoder", "layers", "forms", "adapters"):
        assert not any("methods" in x for x in imports(PACKAGE / "models" / f"{name}.py"))


def test_the_package_imports_torch_for_pickles_only_and_never_tensorflow():
    for path in set(PACKAGE.rglob("*.py")) - {PACKAGE / "convert" / "files.py"}:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"torch", "tensorflow"}, path


def test_modules_stay_small():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
