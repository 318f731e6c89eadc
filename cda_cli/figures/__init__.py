"""Figures of a sparsity report for papers and slides, each with the numbers that it is drawn from.

`Material`, which is a report and what else was measured → rows of numbers, of a type for each figure → a CSV file, and
pictures that are drawn from these rows alone. So `redraw` draws a figure again from its CSV file.
"""

from cda_cli.figures.material import HeadMap, Material, gather
from cda_cli.figures.write import FIGURES, Written, draw, redraw, require_figures, write_figures

__all__ = ["FIGURES", "HeadMap", "Material", "Written", "draw", "gather", "redraw", "require_figures", "write_figures"]
