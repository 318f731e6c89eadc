"""Collects what a page shows of single rows, while a model is inspected."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from cda_cli.causal import Examined
from cda_cli.inspection import LiveCollector, LiveHead, Report, RowCollector, RowStore
from cda_cli.inspection.live_heads import follows_from_scores, live_bytes
from cda_cli.page.page import PageContent, bytes_for_rows
from cda_cli.restore import Restored, TextSide

MOST_LIVE = 12  # heads
LIVE_SHARE = 6  # Live heads take at most one part in so many of the budget.


class PageCollector:
    """`rows` and `live` see the layers of the first window of a text; `rows.store()` and `heads` are what a page takes.

    The page shows the heads `shown`, each by layer and head. All of it together fits into a page of `budget` bytes.
    There are live heads only if the page can compute the weights of the rule. Raises ConfigError if the model is too
    large for the budget.
    """

    def __init__(self, restored: Restored, text: TextSide, budget: int, shown: Collection[tuple[int, int]]) -> None:
        config = restored.config.model
        tokens = min(text.seq_len, len(text.sides[0].ids))
        of_live = live_bytes(tokens, config.null_kv, config.head_width) * 4 // 3
        is_exact = follows_from_scores(restored.model)
        self.live_heads = min(MOST_LIVE, len(shown), budget // LIVE_SHARE // of_live) if is_exact else 0
        self.live = LiveCollector() if self.live_heads else None
        for_rows = bytes_for_rows(budget - self.live_heads * of_live, len(shown), tokens)
        self.rows = RowCollector(config.depth, for_rows, only=shown)

    def heads(self, report: Report, store: RowStore) -> list[LiveHead]:
        """The live heads of the page."""
        return live_heads(report, store, self.live, self.live_heads) if self.live else []


def live_heads(report: Report, store: RowStore, live: LiveCollector, most: int = MOST_LIVE) -> list[LiveHead]:
    """At most so many live heads: of each layer in turn the one that adds most to the residual stream."""
    by_length = sorted(report.heads, key=lambda head: -head.measures["written_norm"])
    rank: dict[int, int] = {}
    order = []
    for head in by_length:
        rank[head.layer] = rank.get(head.layer, -1) + 1
        order.append((rank[head.layer], head.layer, head.head))
    chosen = sorted((layer, head) for _, layer, head in sorted(order)[:most])
    return [live.head(*place, store.queries, store.null_keys) for place in chosen]


def page_content(
    name: str,
    source: Mapping[str, str],
    examined: Examined,
    store: RowStore,
    tokens: Sequence[str],
    live: Sequence[LiveHead],
) -> PageContent:
    """What a page shows of the model called `name`, whose weights over the first `tokens` are in `store`."""
    return PageContent(
        title=f"What {name} selects",
        report=examined.report,
        store=store,
        labels=tokens,
        verdict=examined.verdict,
        source=source,
        reads={(head.layer, head.head): head.reads for head in examined.report.heads if head.reads},
        causal=examined.effects.document() if examined.effects else None,
        live=live,
        eps=examined.eps,
        has_budget=examined.has_budget,
    )
