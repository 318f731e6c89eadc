"""A small report with the rows of all heads, as the page takes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cda_cli.config import ModelConfig
from cda_cli.data import Tokens, evaluation_batches
from cda_cli.evaluation import Estimate
from cda_cli.inspection import LiveCollector, ReportWatcher, RowCollector, inspect
from cda_cli.model import Transformer
from cda_cli.page import PageContent

TOKENS, LAYERS, HEADS, EPS = 24, 2, 3, 0.02
# What a page must show as it is: a script's end, quotes, a line break, and letters of more than one byte.
LABELS = ["</script>", '"', "'", "\n", " ", "<!--", "λ", "🙂", "a,b", "\\", *(f"w{place}" for place in range(14))]


def cuts() -> dict[str, Any]:
    """Causal checks as JSON has them: two choices of 1 and 4 keys."""
    found = []
    for choice, scale in (("top", 1.0), ("recent", 4.0)):
        for keys in (1, 4):
            value = scale * 0.2 / keys
            difference = Estimate(value, 0.05 * value, 0.9 * value, 1.1 * value).as_dict("difference")
            found.append({"choice": choice, "keys": keys, "drops": False, **difference})
    interval = Estimate(0.25, 0.025, 0.2, 0.3).as_dict("difference")
    ablations = [{"layer": layer, "head": head, **interval} for layer in range(LAYERS) for head in range(HEADS)]
    return {"cuts": found, "ablations": ablations}


def content(**changes: Any) -> PageContent:
    """What a model of random weights selects. Two of its heads are live."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "seq_len": TOKENS, "dim": 24, "depth": LAYERS, "heads": HEADS, "null_kv": 1}
    model = Transformer(ModelConfig(**sizes, attn_k=2.0, attn_eps=EPS)).eval()
    ids = np.random.default_rng(0).integers(0, 31, 2 * TOKENS + 1, dtype=np.uint16)
    batches = list(evaluation_batches(Tokens(ids, np.ones_like(ids), len(ids)), TOKENS, 1))
    collector, live = RowCollector(LAYERS, 60_000), LiveCollector()
    watcher = ReportWatcher(2.0, collector=collector, live=live)
    inspect(model, batches, torch.device("cpu"), torch.float32, watcher)
    given: dict[str, Any] = {
        "title": "What <the model> selects",
        "labels": LABELS,
        "verdict": ["4 keys suffice.", "Rows & sums < 2."],
        "source": {"text": "words, validation"},
        "reads": {(1, 2): "previous"},
        "causal": cuts(),
        "live": [live.head(layer, 1, TOKENS, 1) for layer in range(LAYERS)],
        "eps": EPS,
    }
    return PageContent(report=watcher.report(), store=collector.store(), **{**given, **changes})
