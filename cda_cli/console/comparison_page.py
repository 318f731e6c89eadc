"""A comparison of runs as one static page: no script, no request, light and dark, and readable on a phone."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

from cda_cli.console.charts import Chart, draw_svg
from cda_cli.console.comparison import Section, comparison_verdict, named_runs, sections

if TYPE_CHECKING:
    from cda_cli.comparison.result import Result
    from cda_cli.evaluation import Estimate

# The colours of lines are those of Okabe and Ito, Color Universal Design, 2008, with more light on a dark ground.
STYLE = """
:root { color-scheme: light dark; --text: light-dark(#1a1a1a, #e8e8e8);
  --edge: light-dark(#dddddd, #3c3c3c); --ground: light-dark(#ffffff, #161616);
  --1: light-dark(#0072B2, #56B4E9); --2: light-dark(#B84A00, #F08A4B); --3: light-dark(#00795A, #2FC79A);
  --4: light-dark(#A8457F, #E29AC4); --5: light-dark(#8A6200, #E6B422); --6: light-dark(#444444, #C8C8C8); }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--ground);
  max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--edge); }
table.numbers td, table.numbers th:not(:first-child) { text-align: right; white-space: nowrap; }
th { font-weight: 600; } td, tbody th { font-weight: normal; } code { overflow-wrap: anywhere; }
tbody th { white-space: pre; }
svg { width: 100%; min-width: 26rem; max-width: 45rem; height: auto; } svg text { fill: var(--text); font-size: 12px; }
svg .grid { stroke: var(--edge); } svg polyline { fill: none; stroke-width: 2; }
svg .mark { font-weight: bold; }
polyline.line2 { stroke-dasharray: 8 3; } polyline.line3 { stroke-dasharray: 3 3; }
polyline.line4 { stroke-dasharray: 8 3 2 3; } polyline.line5 { stroke-dasharray: 12 3; }
polyline.line6 { stroke-dasharray: 2 5; }
""" + "\n".join(
    f"polyline.line{n} {{ stroke: var(--{n}); }} text.line{n} {{ fill: var(--{n}); }} .run{n} {{ color: var(--{n}); }}"
    for n in range(1, 7)
)


def comparison_page(result: Result) -> str:
    """Returns the HTML of a comparison."""
    title = "Comparison of " + ", ".join(run.path.resolve().name for run in result.runs)
    runs = "".join(
        f'<li><b class="run{number}">{letter}</b> <code>{escape(words)}</code></li>'
        for number, (letter, words) in enumerate(named_runs(result).items(), start=1)
    )
    verdict = "".join(f"<p>{escape(sentence)}</p>\n" for sentence in comparison_verdict(result))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n<ul>{runs}</ul>\n{verdict}"
        + "\n".join(map(_section, sections(result)))
        + "\n</main>\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    parts = [f"<section><h2>{escape(section.title)}</h2>"]
    parts += [f"<p>{escape(sentence)}</p>" for sentence in section.sentences]
    if section.rows:
        parts.append(_table(section))
    if chart := section.chart or (section.curve and _chart(section.curve)):
        parts.append(_scrolling(draw_svg(chart, section.title), section.title))
    return "\n".join([*parts, "</section>"])


def _chart(curve: Mapping[str, Mapping[int, Estimate]]) -> Chart:
    """What cuts cost, as lines over the keys that are kept."""
    lines = {letter: [(float(keys), each.value) for keys, each in of_run.items()] for letter, of_run in curve.items()}
    return Chart("keys kept", "bits per byte more", lines, "{:.0f}".format, "{:.3g}".format, is_log=True, whole=True)


def _table(section: Section) -> str:
    heads = "".join(f'<th scope="col">{escape(each)}</th>' if each else "<td></td>" for each in section.columns)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in section.rows
    )
    kind = "words" if section.has_words else "numbers"
    table = f'<table class="{kind}"><thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table>'
    return _scrolling(table, section.title)


def _scrolling(content: str, label: str) -> str:
    """`content` that may be wider than a phone: it scrolls by itself, by keyboard too."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{content}</div>'
