"""The notebooks of the docs run, as one would run them."""

import nbformat
import pytest
from nbclient import NotebookClient
from paths import ROOT

DOCS = ROOT / "docs"


def executed(name: str):
    """The outputs of a notebook, and how many pictures there are among them."""
    notebook = nbformat.read(DOCS / name, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": DOCS}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    return text, sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_the_notebook_of_kinds_runs():
    _, pictures = executed("kinds.ipynb")
    assert pictures == 6


@pytest.mark.slow
def test_the_notebook_of_the_library_runs():
    """It trains and compares two encodings, and one that it adds."""
    text, pictures = executed("notebook.ipynb")
    assert pictures == 3
    lines = text.splitlines()
    assert [f"{name} True" in lines for name in ("bipe_rope", "rope")] == [True, True]
    for name, tables in (("bipe_rope", 2), ("bipe_plateau", 1)):
        of_table = [line for line in lines if line.startswith(f"{name} ") and "…" in line]
        assert len(of_table) == 8 * tables  # of two sets at four lengths
    assert any(line.startswith("ROMEO: ") for line in lines)
