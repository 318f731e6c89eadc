"""Writes the page of `cda inspect-sparsity --html` from what the command inspected."""

from __future__ import annotations

from pathlib import Path

from cda_cli.causal import Examined
from cda_cli.errors import ConfigError
from cda_cli.inspection import parse_size
from cda_cli.page import PageCollector, page_content, write_page
from cda_cli.restore import Restored, TextSide
from cda_cli.storage import recorded_sha256

DIGEST = 12  # characters of a SHA-256 that tell one checkpoint from another

BUDGET = "12MB"


def checked_budget(path: Path | None, budget: str | None) -> int:
    """Returns the bytes that the page at `path` may take.

    Raises ConfigError, before anything is computed, if no such page can be written, or if there is to be none.
    """
    if path is None and budget is not None:
        raise ConfigError("--budget is that of the page; add --html FILE")
    size = parse_size(budget or BUDGET)
    if path and (path.is_dir() or path.suffix.lower() not in (".html", ".htm")):
        raise ConfigError(f"--html {path} is no page; give a file whose name ends with .html")
    return size


def write_report_page(
    path: Path, collector: PageCollector, examined: Examined, restored: Restored, text: TextSide
) -> str:
    """Writes the page, and returns what to say of it."""
    store = collector.rows.store()
    digest = recorded_sha256(restored.path)[restored.weights_file][:DIGEST]
    source = {
        "checkpoint": f"{restored.path} ({restored.weights_file} {digest})",
        "text": f"{text.description}, {text.split}",
        "inspected": examined.report.extent,
        "attention": restored.model.attention_description,
    }
    content = page_content(
        restored.path.resolve().parent.parent.name or restored.path.name,
        source,
        examined,
        store,
        [restored.tokenizer.decode([int(token)]) for token in text.sides[0].ids[: store.queries]],
        collector.heads(examined.report, store),
    )
    write_page(path, content)
    return f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB"
