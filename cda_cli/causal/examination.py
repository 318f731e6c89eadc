"""An inspection, and what else is measured of the model on the same text: gradients, and causal checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from cda_cli.causal.checks import TOLERANCE, Wanted, check_text
from cda_cli.causal.effects import Effects
from cda_cli.causal.verdict import verdict
from cda_cli.config import ModelConfig
from cda_cli.data import Batch
from cda_cli.inspection import Report, ReportWatcher, gradients, inspect
from cda_cli.restore import Restored


class Examined(NamedTuple):
    """What was measured of a model: what it selects, and the effects of causal checks, or None.

    `has_budget` says whether rows have a budget k, and do not sum to 1. `eps` is the temperature of the attention, or
    None where it has none, or layers differ in it.
    """

    report: Report
    effects: Effects | None
    has_budget: bool
    eps: float | None

    def document(self, source: Mapping[str, Any]) -> dict[str, Any]:
        """All figures by the names in JSON, after `source`, which says what was inspected."""
        further = {"causal": self.effects.document()} if self.effects else {}
        return {**source, "attn_eps": self.eps, **self.report.as_dict(), **further}

    @property
    def verdict(self) -> list[str]:
        """Sentences with figures: how many keys hold a row, what the budget does, and where the rest goes."""
        return verdict(self.report, self.has_budget, self.effects)


class Examination(NamedTuple):
    """What is measured besides: whether gradients are, and the causal checks that are `wanted`, which may be none."""

    with_gradients: bool
    wanted: Wanted

    def passes(self, config: ModelConfig) -> int:
        """Counts the passes over the text, of a model as `config` describes it."""
        checks = self.wanted.passes(config)
        return 1 + self.with_gradients + (1 + checks if checks else 0)

    def run(
        self,
        restored: Restored,
        dtype: torch.dtype,
        watcher: ReportWatcher,
        open_batches: Callable[[], Iterable[Batch]],
        advance: Callable[[int], None] = lambda windows: None,
    ) -> Examined:
        """Has `watcher` see the model, and measures the rest. `open_batches` gives the windows of each pass."""
        model, device = restored.model, restored.device
        inspect(model, open_batches(), device, dtype, watcher, advance)
        report, effects = watcher.report(), None
        if self.with_gradients:
            found = gradients(model, open_batches(), device, dtype, advance)
            report = report.adding(found.measures(model.attention_rule.has_budget))
        if self.wanted.passes(restored.config.model):
            effects = check_text(model, self.wanted, open_batches, device, dtype, TOLERANCE, advance)
        return Examined(report, effects, model.attention_rule.has_budget, model.attention_eps)
