"""Writes the page of `cda inspect-sparsity --html` from what the command inspected."""

from __future__ import annotations

from pathlib import Path

from cda_cli.causal import Effects
from cda_cli.console import head_type, verdict
from cda_cli.errors import ConfigError
from cda_cli.inspection import Report, parse_size
from cda_cli.page import PageCollector, PageContent, write_page
from cda_cli.plurals import counted
from cda_cli.restore import Restored, TextSide
from cda_cli.storage import recorded_sha256

DIGEST = 12  # characters of a SHA-256 that tell one checkpoint from another


def require_page(path: Path, budget: str) -> None:
    """Raises ConfigError, before anything is computed, if no page of so many bytes can be written to `path`."""
    parse_size(budget)
    if path.is_dir() or path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--html {path} is no page; give a file whose name ends with .html")


def write_report_page(
    path: Path, collector: PageCollector, report: Report, restored: Restored, text: TextSide, checked: Effects | None
) -> str:
    """Writes the page, and returns what to say of it."""
    store, has_budget = collector.store(report), restored.model.attention_rule.has_budget
    digest = recorded_sha256(restored.path)[restored.weights_file][:DIGEST]
    in_run = restored.path.parent.parent.name
    reads = {(head.layer, head.head): head_type(head) for head in report.heads}
    content = PageContent(
        title=f"What {in_run or restored.path.name} selects",
        report=report,
        store=store,
        labels=[restored.tokenizer.decode([int(token)]) for token in text.sides[0].ids[: store.queries]],
        verdict=verdict(report, has_budget, checked),
        source={
            "checkpoint": f"{restored.path} ({restored.weights_file} {digest})",
            "text": f"{text.description}, {text.split}",
            "tokens": f"{report.tokens:,} in {counted(report.windows, 'window')}",
            "attention": restored.model.attention_description,
        },
        reads={place: pattern for place, pattern in reads.items() if pattern is not None},
        causal=checked.document() if checked else None,
        live=collector.heads(report, store),
        eps=restored.model.attention_eps,
    )
    write_page(path, content)
    return f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB"
