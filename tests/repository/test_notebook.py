"""The notebooks of the docs run, as one would run them."""

import nbformat
import pytest
from nbclient import NotebookClient
from paths import ROOT

DOCS = ROOT / "docs"


def executed(name: str):
    """The outputs of a notebook, and how many pictures there are among them."""
    notebook = nbformat.read(DOCS / name, as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": DOCS}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    return text, sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_the_notebook_of_kinds_runs():
    _, pictures = executed("explanation/kinds.ipynb")
    assert pictures == 6


@pytest.mark.slow
def test_the_notebook_of_an_own_encoding_runs():
    """It checks a formula, trains three encodings with three seeds each, and makes a table."""
    text, pictures = executed("tutorials/your_encoding.ipynb")
    assert pictures == 3
    lines = text.splitlines()
    for name in ("bipe_alibi", "bipe_plateau"):
        of_table = [line for line in lines if line.startswith(f"{name} ") and "…" in line]
        assert len(of_table) == 8  # of two sets at four lengths
    assert any(line.startswith("ROMEO: ") for line in lines)
    assert any(line.startswith("slopes ") for line in lines)


@pytest.mark.parametrize("name", ["explanation/kinds.ipynb", "tutorials/your_encoding.ipynb"])
def test_notebooks_are_saved_with_the_outputs_that_the_site_shows(name):
    notebook = nbformat.read(DOCS / name, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert not [output for output in outputs if output.output_type == "error"]
