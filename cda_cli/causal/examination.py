"""An inspection, and what else is measured of the model on the same text: gradients, and causal checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from cda_cli.causal.checks import TOLERANCE, Wanted, check_text
from cda_cli.causal.effects import Effects
from cda_cli.config import ModelConfig
from cda_cli.data import Batch
from cda_cli.inspection import Report, ReportWatcher, gradients, inspect
from cda_cli.restore import Restored


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
    ) -> tuple[Report, Effects | None]:
        """Has `watcher` see the model, and measures the rest. `open_batches` gives the windows of each pass."""
        model, device = restored.model, restored.device
        inspect(model, open_batches(), device, dtype, watcher, advance)
        report, effects = watcher.report(), None
        if self.with_gradients:
            found = gradients(model, open_batches(), device, dtype, advance)
            report = report.adding(found.measures(model.attention_rule.has_budget))
        if self.wanted.passes(restored.config.model):
            effects = check_text(model, self.wanted, open_batches, device, dtype, TOLERANCE, advance)
        return report, effects
