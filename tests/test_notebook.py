"""A report in a notebook."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

CELLS = (
    "import cda_cli\nfrom tests.small_models import random_model\nreport = cda_cli.inspect(random_model(), 'λ' * 40)",
    "report",
    "report.check('support.p95 < 64')\nreport.heads.pandas()[['layer', 'head', 'keys_95']]",
)


def test_the_report_shows_itself_in_a_notebook() -> None:
    """In a kernel of Jupyter: as static HTML, and tables as data frames."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    root = Path(__file__).parents[1]
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": root}}).execute()
    _, shown, table = (cell.outputs for cell in notebook.cells)
    (output,) = shown
    assert set(output.data) == {"text/html", "text/plain"}
    assert output.data["text/html"].startswith("<div><p><b>random</b>: 4 heads")
    assert "<script" not in output.data["text/html"]
    assert table[0].data["text/plain"].splitlines()[0].split() == ["layer", "head", "keys_95"]
