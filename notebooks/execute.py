"""Runs the notebooks and keeps their outputs: `python notebooks/execute.py [FILE ...]`.

Each runs from top to bottom in an empty directory, without network, with the package of this
checkout. A figure in the text is followed by a comment, which readers do not see, with an
expression for it and a tolerance:

    PALs add 4.7%<!-- 100 * added ± 0.1 --> to the encoder.

It is evaluated where it stands. If a figure is not what its expression gives, the exit status is 1.
With `--check` the files stay as they are.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
FIGURE = re.compile(r"(-?[\d,]*\.?\d+)[^\d<]{0,12}<!-- (.+?) ± (\S+) -->")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(HERE.parent),
}


def execute(path: Path) -> tuple[nbformat.NotebookNode, list[str]]:
    """Runs a notebook.

    Args:
        path: the notebook.

    Returns:
        It with its new outputs, and a sentence for each wrong figure of its text.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    wrong = []
    with tempfile.TemporaryDirectory() as directory:
        resources = {"metadata": {"path": directory}}
        client = NotebookClient(
            notebook, timeout=600, resources=resources, record_timing=False, allow_errors=False
        )
        with client.setup_kernel(env=os.environ | ENVIRONMENT):
            for index, cell in enumerate(notebook.cells):
                if cell.cell_type == "code":
                    client.execute_cell(cell, index)
                    cell.outputs = [x for x in cell.outputs if not _is_progress(x)]
                for figure, expression, tolerance in FIGURE.findall(cell.source):
                    value = _evaluate(client, index, expression)
                    if abs(float(figure.replace(",", "")) - value) > float(tolerance):
                        wrong.append(f"{path.name}: {figure} is stated, {expression} is {value:g}")
    notebook.metadata.pop("language_info", None)  # the version of Python that happened to run it
    return notebook, wrong


def _is_progress(output: nbformat.NotebookNode) -> bool:
    """Whether an output is a progress line or a message, which say nothing to a reader."""
    return output.output_type == "stream" and output.name == "stderr"


def _evaluate(client: NotebookClient, index: int, expression: str) -> float:
    """The value of an expression in the notebook's process."""
    cell = nbformat.v4.new_code_cell(f"print(float({expression}))")
    kept = client.nb.cells[index]
    client.execute_cell(cell, index, store_history=False)
    client.nb.cells[index] = kept  # the client puts what it executes there
    return float(cell.outputs[-1].text)


def main() -> int:
    """Runs the given notebooks, or all."""
    parser = argparse.ArgumentParser(description="Runs the notebooks and keeps their outputs.")
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--check", action="store_true", help="leave the files as they are")
    args = parser.parse_args()
    failed = False
    for path in args.files or sorted(HERE.glob("*.ipynb")):
        notebook, wrong = execute(path)
        print(*(wrong or [f"{path.name}: all figures are as stated"]), sep="\n")
        failed = failed or bool(wrong)
        if not args.check:
            nbformat.write(notebook, path)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
